"""The files of a watched process: written by the probe, read by anybody with the standard library."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from dinfer.watch.probe import reading, writing
from dinfer.watch.probe.reading import Reader, ask_stacks, read
from dinfer.watch.probe.records import (
    HEADER_BYTES,
    KINDS,
    NOTHING,
    RECORD,
    SEGMENT_BYTES,
    SEGMENT_RECORDS,
    RecordsError,
    WatchedOp,
)
from dinfer.watch.probe.writing import OpsWriter, Records

SEND = KINDS.index("send")


def begin(written: Records, number: int, peer: int = 1) -> tuple[int, int]:
    """An op of rank 0, with everything that an op can say."""
    return written.ops.begin(
        now=1000 + number,
        kind=SEND,
        is_async=True,
        group=written.groups.number((1, "0", (0, 1), "gloo", "default_pg")),
        peer=peer,
        tag=7,
        place=written.places.number(("infer.py", 12, "step")),
        form=written.forms.number(((2, number % 5), "float32", "cpu")),
        thread=written.threads.number((4, "MainThread")),
        nbytes=8 * number,
        layer=number,
        chunk=NOTHING,
        number=2 * number,
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written = Records(tmp_path, "kernels", torch="2.13.0")
    written.lines.write("rank", rank=0, world_size=2)
    ticket = begin(written, 3)
    begin(written, 4)
    written.ops.waiting(*ticket, 2000, written.places.number(("infer.py", 15, "step")))
    written.ops.done(*ticket, 3000)
    written.ops.beat(4000)
    written.ops.set_now(5, NOTHING)

    (process,) = read(tmp_path)
    first, second = process.ops
    assert (process.pid, process.rank, process.world_size, process.hook) == (os.getpid(), 0, 2, "kernels")
    assert process.groups["0"] == ("0", (0, 1), "gloo", "default_pg")
    assert (first.seq, first.kind, first.group, first.peer, first.tag) == (0, "send", "0", 1, 7)
    assert (first.shape, first.dtype, first.nbytes, first.is_async) == ((2, 3), "float32", 24, True)
    assert (first.file, first.line, first.function, first.thread) == ("infer.py", 12, "step", "MainThread")
    assert (first.layer, first.chunk) == (3, None)
    assert (first.backend, first.number, second.number) == ("gloo", 6, 8)
    times = (first.issued_ns, first.waited_ns, first.done_ns)
    assert times == tuple(process.clock + at for at in (1003, 2000, 3000))
    assert (first.state, first.waited_line) == ("done", 15)
    assert (second.state, second.waited_ns, second.done_ns, second.waited_file) == ("issued", 0, 0, "")
    assert process.heartbeat_ns == process.clock + 4000
    assert process.now == (5, None)
    assert process.ended is None


def test_only_the_first_wait_and_the_first_end_count(tmp_path: Path) -> None:
    written = Records(tmp_path, "none")
    ticket = begin(written, 0)
    for now in (10, 20):
        written.ops.waiting(*ticket, now, 0)
        written.ops.done(*ticket, now + 1, failed=now == 10)
    (process,) = read(tmp_path)
    (op,) = process.ops
    assert (op.waited_ns - process.clock, op.done_ns - process.clock, op.state) == (10, 11, "failed")


def test_old_ops_make_room_and_open_ones_last(tmp_path: Path) -> None:
    written = Records(tmp_path, "none")
    written.ops = OpsWriter(tmp_path / "small.ops", most_segments=2)
    open_one = begin(written, 0)
    for number in range(1, 2 * SEGMENT_RECORDS + 10):
        written.ops.done(*begin(written, number), number)
    (tmp_path / f"{written.name}.ops").unlink()
    (tmp_path / "small.ops").rename(tmp_path / f"{written.name}.ops")

    (process,) = read(tmp_path)
    assert len(process.ops) == 2 * SEGMENT_RECORDS
    assert [op.seq for op in process.ops[:2]] == [0, 11]
    assert process.ops[0].state == "issued"
    assert process.dropped == 10
    written.ops.done(*open_one, 5)
    assert read(tmp_path)[0].ops[0].state == "done"


def test_a_look_reads_again_only_what_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also an old op that ends, and records that make room; what it finds is what a first look finds."""
    written = Records(tmp_path, "none")
    (tmp_path / f"{written.name}.ops").unlink()
    written.ops = OpsWriter(tmp_path / f"{written.name}.ops", most_segments=2)
    reader, block = Reader(tmp_path), reading.BLOCK_BYTES // RECORD.size
    tickets = [begin(written, number) for number in range(SEGMENT_RECORDS + 100)]

    def look() -> int:
        """How many records it reads."""
        made, original = list[object](), reading._ProcessFiles._op

        def op(files: reading._ProcessFiles, record: tuple[int, ...], clock: int) -> WatchedOp:
            made.append(record)
            return original(files, record, clock)

        with monkeypatch.context() as patch:
            patch.setattr(reading._ProcessFiles, "_op", op)
            (process,) = reader.read()
        assert process.ops == read(tmp_path)[0].ops
        return len(made)

    assert look() == len(tickets)
    assert look() == 0
    written.ops.done(*tickets[5], 7)
    assert look() == block
    begin(written, len(tickets))
    assert 0 < look() <= block
    for number in range(SEGMENT_RECORDS - 90):  # the last ones take the places of the first
        begin(written, number)
    assert look() < SEGMENT_RECORDS + 16 * block


def test_the_end_of_an_op_that_made_room_is_not_written_into_another(tmp_path: Path) -> None:
    written = Records(tmp_path, "none")
    (tmp_path / f"{written.name}.ops").unlink()
    written.ops = OpsWriter(tmp_path / f"{written.name}.ops", most_segments=1)
    tickets = [begin(written, number) for number in range(SEGMENT_RECORDS + 80)]
    kept = {op.seq for op in read(tmp_path)[0].ops}
    gone = [ticket for number, ticket in enumerate(tickets) if number not in kept]
    assert len(gone) == 80  # though none is over
    for ticket in gone:
        written.ops.waiting(*ticket, 4, 0)
        written.ops.done(*ticket, 5)
    assert {op.state for op in read(tmp_path)[0].ops} == {"issued"}


def test_threads_write_and_somebody_reads_at_the_same_time(tmp_path: Path) -> None:
    written = Records(tmp_path, "none")
    start, many = threading.Barrier(3), SEGMENT_RECORDS

    def work() -> None:
        start.wait()
        for number in range(many):
            written.ops.done(*begin(written, number), 7)

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    start.wait()
    reader = Reader(tmp_path)
    while any(worker.is_alive() for worker in workers):
        for process in reader.read():
            assert all(op.nbytes == 8 * (op.layer or 0) and op.kind == "send" for op in process.ops)
    (process,) = reader.read()
    assert [op.seq for op in process.ops] == list(range(2 * many))
    assert {op.state for op in process.ops} == {"done"}


def test_groups_of_one_name_are_told_apart(tmp_path: Path) -> None:
    written = Records(tmp_path, "none")
    for made, ranks in enumerate(((0, 1), (0, 1, 2))):
        written.groups.number((made, "0", ranks, "gloo", ""))
    assert {name: group.ranks for name, group in read(tmp_path)[0].groups.items()} == {
        "0": (0, 1),
        "0#2": (0, 1, 2),
    }


def test_stacks_are_asked_for_through_the_file(tmp_path: Path) -> None:
    written = Records(tmp_path, "none")
    assert written.ops.asked == 0
    number = ask_stacks(tmp_path, read(tmp_path)[0])
    assert written.ops.asked == number
    written.ops.answered(number)
    assert written.ops.asked == 0


def test_a_process_that_replaced_itself_has_files_of_its_own(tmp_path: Path) -> None:
    first, second = Records(tmp_path, "none"), Records(tmp_path, "none")
    assert second.name == f"{first.name}-2"
    assert [process.name for process in read(tmp_path)] == [first.name, second.name]


def test_the_number_of_names_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "MOST_NAMES", 3)
    written = Records(tmp_path, "none")
    assert [written.forms.number(((n,), "int8", "cpu")) for n in (1, 2, 3, 4, 1)] == [1, 2, 3, 0, 1]


def test_a_line_under_way_is_read_once_it_is_whole(tmp_path: Path) -> None:
    written = Records(tmp_path, "none")
    path = tmp_path / f"{written.name}.jsonl"
    reader = Reader(tmp_path)
    with path.open("a") as file:
        file.write('{"is":"problem","te')
        file.flush()
        assert reader.read()[0].problems == []
        file.write('xt":"lost"}\n')
    assert reader.read()[0].problems == ["lost"]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("not json", "line 2: Expecting value"),
        ("[]", "line 2: it is not a JSON object"),
        ('{"is":"rank","rank":"0","world_size":2}', "line 2: `rank` is '0'"),
        ('{"is":"rank","rank":0}', "line 2: it has no `world_size`"),
        ('{"is":"group","id":1,"name":"0","ranks":[0,"a"],"backend":"gloo"}', "line 2: `ranks` is 'a'"),
        ('{"is":"rank","rank":99999999999999999999,"world_size":2}', "line 2: `rank` is '9999"),
        ("[" * 100_000, "line 2: "),
        ('{"is":"start","version":2}', "line 2: a second start"),
    ],
)
def test_damaged_lines_are_refused_by_name(tmp_path: Path, line: str, why: str) -> None:
    path = tmp_path / f"{Records(tmp_path, 'none').name}.jsonl"
    with path.open("a") as file:
        file.write(f"{line}\n")
    reader = Reader(tmp_path)
    for _ in range(2):  # it is not taken for good the next time
        with pytest.raises(RecordsError, match=why) as caught:
            reader.read()
        assert str(path) in str(caught.value)


def test_damaged_records_are_refused_by_name(tmp_path: Path) -> None:
    written = Records(tmp_path, "none")
    begin(written, 0)
    path = tmp_path / f"{written.name}.ops"
    whole = path.read_bytes()[: HEADER_BYTES + SEGMENT_BYTES]  # behind that it has only holes
    damages = {
        "not a file of a watched process": b"x" * 64 + whole[64:],
        "format is 9": whole[:8] + (9).to_bytes(8, "little") + whole[16:],
        "cut short": whole[:-1],
        "says that it has -1 segments": whole[:16] + b"\xff" * 8 + whole[24:],
        "op 0 is damaged": whole[: HEADER_BYTES + 40] + b"\xff" + whole[HEADER_BYTES + 41 :],
    }
    for why, data in damages.items():
        path.write_bytes(data)
        with pytest.raises(RecordsError, match=why) as caught:
            read(tmp_path)
        assert str(path) in str(caught.value)


def test_a_pipe_in_the_folder_does_not_block(tmp_path: Path) -> None:
    for name in ("host-1.jsonl", "host-1.ops"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(RecordsError, match="not a plain file"):
        read(tmp_path)


def test_a_trace_beside_the_records_is_no_process(tmp_path: Path) -> None:
    begin(Records(tmp_path, "none"), 0)
    (tmp_path / "trace.jsonl").write_text("{}\n", encoding="utf-8")
    assert len(read(tmp_path)) == 1


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecordsError, match="nowhere"):
        read(tmp_path / "nowhere")
