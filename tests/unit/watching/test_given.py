"""What `dinfer explain` makes of what is damaged, doubled, mixed, or of a host whose clock is off."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from dinfer.trace.export import TraceError
from dinfer.watch.probe.records import HEADER_BYTES, KINDS, NOTHING
from dinfer.watch.probe.writing import Records
from dinfer.watching.given import ExplainError, read
from tests.support.made_processes import SECOND

DUMPS = Path(__file__).parent.parent / "trace/flight"


def record(
    folder: Path,
    rank: int,
    ops: Sequence[tuple[str, int | None, float, float]],
    *,
    host: str = "far",
    store: str = "far:29500",
    world_size: int = 2,
    ended: str = "",
    ahead_s: float = 0.0,
) -> Path:
    """The files of a rank of another host; its clock is so many seconds ahead. `ops`: kind, peer, when it began and
    ended (0: it has not). Returns the path of its lines."""
    written = Records(folder, "kernels")
    group = written.groups.number((1, "0", tuple(range(world_size)), "gloo", "default_pg"))
    written.lines.write("rank", rank=rank, world_size=world_size, store=store)
    for n, (kind, peer, began, done) in enumerate(ops):
        # Messages are numbered for each peer, collectives together.
        alike = [one for one in ops[:n] if (one[1] == peer and (peer is None or one[0] == kind))]
        place = written.places.number((f"rank{rank}.py", 1 + len(ops), "main"))
        ticket = written.ops.begin(
            now=int(began * SECOND),
            kind=KINDS.index(kind),
            is_async=False,
            group=group,
            peer=NOTHING if peer is None else peer,
            tag=0,
            place=place,
            form=written.forms.number(((4,), "float32", "cpu")),
            thread=written.threads.number((4, "MainThread")),
            nbytes=16,
            layer=NOTHING,
            chunk=NOTHING,
            number=len(alike),
        )
        written.ops.waiting(*ticket, int(began * SECOND), place)
        if done:
            written.ops.done(*ticket, int(done * SECOND))
    written.ops.beat(max(int(max(began, done) * SECOND) for _, _, began, done in ops))
    if ended:
        written.lines.write("end", how=ended)
    path = folder / f"{written.name}.jsonl"
    first, *rest = path.read_text().splitlines()
    start = json.loads(first) | {
        "host": host,
        "pid": 1000 + rank,
        "parent": 7,
        "started_ns": 0,
        "clock_ns": int((1e6 + ahead_s) * SECOND),
    }
    path.write_text("\n".join([json.dumps(start), *rest]) + "\n")
    return path


BARRIER, OPEN = ("barrier", None, 1.0, 1.1), ("all_reduce", None, 2.0, 0.0)
RECV = ("recv", 0, 2.0, 0.0)


def hang(folder: Path) -> list[Path]:
    return [record(folder, 0, [BARRIER, OPEN]), record(folder, 1, [BARRIER, RECV])]


def test_a_hang_of_another_host(tmp_path: Path) -> None:
    hang(tmp_path)
    (found,) = read([tmp_path])
    assert found.problem
    assert (found.problem.kind, found.problem.ranks) == ("cycle", (0, 1))
    assert found.notes == ()


def test_one_damaged_file_blinds_nobody_to_the_others(tmp_path: Path) -> None:
    _, lines = hang(tmp_path)
    ops = lines.with_suffix(".ops")
    data = bytearray(ops.read_bytes())
    data[HEADER_BYTES + 8 : HEADER_BYTES + 16] = b"\xff" * 8  # when an op was issued
    ops.write_bytes(data)
    (found,) = read([tmp_path])
    (note,) = found.notes
    assert "the record of op 0 is damaged" in note
    assert found.problem
    assert (found.problem.kind, found.problem.ranks) == ("stuck", (1,))
    assert "rank 1 left a record that cannot be read; rank 0 waits for it: rank 0 is in `all_reduce`" in str(
        found.problem
    )


def test_rows_that_cannot_be_read_leave_the_verdict(tmp_path: Path) -> None:
    first, lines = hang(tmp_path)
    assert first != lines
    lines.with_suffix(".kv").write_bytes(b"x" * 100)
    (found,) = read([tmp_path])
    assert found.notes == (f"{lines.with_suffix('.kv')}: it is damaged at byte 0",)
    assert found.problem
    assert found.problem.kind == "cycle"


@pytest.mark.parametrize("damage", [b"", b"\x00\xff{", b'{"is": "start"}\n', b"[" * 100_000 + b"\n"])
def test_lines_that_say_nothing(damage: bytes, tmp_path: Path) -> None:
    _, lines = hang(tmp_path)
    lines.write_bytes(damage)
    (found,) = read([tmp_path])
    assert found.problem
    assert found.problem.ranks == (1,)
    assert found.ranks == [0, 1]
    if damage.endswith(b"\n"):
        assert lines.name in found.notes[0]


def test_where_nothing_can_be_read_all_is_named(tmp_path: Path) -> None:
    for lines in hang(tmp_path):
        lines.write_text("{}\n")
    with pytest.raises(
        ExplainError, match=r"cannot read what was watched: .*\.jsonl: line 1.*\.jsonl: line 1"
    ):
        read([tmp_path])


def test_a_folder_and_its_copy_are_one(tmp_path: Path) -> None:
    hang(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (alone,) = read([tmp_path / "a"])
    for paths in (["a", "b"], ["a", "a"], ["a", "b/../a"]):
        (found,) = read([tmp_path / path for path in paths])
        assert found.problem == alone.problem
        assert len(found.trace.events) == len(alone.trace.events)


def test_folders_of_other_runs_are_judged_by_themselves(tmp_path: Path) -> None:
    hang(tmp_path / "a")
    for rank in (0, 1, 2):
        place = tmp_path / "b"
        record(place, rank, [BARRIER], host="near", store="near:3", world_size=3, ended="exit")
    jobs = read([tmp_path / "a", tmp_path / "b"])
    found = {len(job.ranks): job for job in jobs}
    assert sorted(found) == [2, 3]
    assert found[2].problem
    assert found[2].problem.kind == "cycle"
    assert found[2].problem.sentence.startswith("job ")
    assert found[3].problem is None


def test_two_hosts_of_one_run_whose_clocks_are_hours_apart(tmp_path: Path) -> None:
    ops = [("barrier", None, float(at), at + 0.5) for at in range(1, 6)]
    record(tmp_path / "a", 0, [*ops, ("all_reduce", None, 7.0, 0.0)])
    hours = {"host": "near", "ahead_s": 7200.0}
    record(tmp_path / "b", 1, [*ops, ("recv", 0, 7.5, 0.0)], **hours)  # type: ignore[arg-type]
    (found,) = read([tmp_path / "a", tmp_path / "b"])
    assert found.problem
    assert (found.problem.kind, found.problem.ranks) == ("cycle", (0, 1))
    assert found.notes == (
        "the clock of near is 7200 s ahead of that of far: its times are told by the clock of far, right to 0.5 s",
    )
    waited = {event.waited for event in found.trace.events if event.end}
    assert max(waited) < SECOND


def message(at: float, peer: int, kind: str) -> tuple[str, int, float, float]:
    """A message on its way for 10 ms: sent at `at`, or received. It is sent, and awaited, 1 ms before."""
    later = 0.01 if kind == "recv" else 0.0
    return kind, peer, at - 0.001 + later, at + 0.001 + later


@pytest.mark.parametrize("ahead_s", [0.3, -0.3, 0.004])
def test_no_message_of_two_hosts_runs_backwards(ahead_s: float, tmp_path: Path) -> None:
    """Also where their clocks are less than a second apart; and one that shows nothing wrong is left as it is."""
    there = [message(float(at), 1, "send") for at in range(1, 6)]
    back = [message(at + 0.5, 1, "recv") for at in range(1, 6)]
    record(tmp_path / "a", 0, sorted([*there, *back], key=lambda op: op[2]), ended="exit")
    there = [message(float(at), 0, "recv") for at in range(1, 6)]
    back = [message(at + 0.5, 0, "send") for at in range(1, 6)]
    ops = sorted([*there, *back], key=lambda op: op[2])
    record(tmp_path / "b", 1, ops, host="near", ahead_s=ahead_s, ended="exit")
    (found,) = read([tmp_path / "a", tmp_path / "b"])
    for rank, peer in ((0, 1), (1, 0)):
        sends = [event for event in found.trace.events if (event.rank, event.kind) == (rank, "send")]
        recvs = [event for event in found.trace.events if (event.rank, event.kind) == (peer, "recv")]
        assert len(sends) == len(recvs) == 5
        for send, recv in zip(sends, recvs, strict=True):
            assert recv.end > send.ready
            assert abs(ahead_s) < 0.01 or abs(recv.end - send.ready - 0.012 * SECOND) < 0.001 * SECOND
    assert bool(found.notes) == (abs(ahead_s) > 0.01)
    assert all("right to 12 ms" in note for note in found.notes)


def test_where_messages_go_one_way_only_nobody_knows_how_exact_it_is(tmp_path: Path) -> None:
    record(tmp_path / "a", 0, [message(float(at), 1, "send") for at in range(1, 6)], ended="exit")
    ops = [message(float(at), 0, "recv") for at in range(1, 6)]
    record(tmp_path / "b", 1, ops, host="near", ahead_s=-0.3, ended="exit")
    (found,) = read([tmp_path / "a", tmp_path / "b"])
    assert "but how exactly is not known: no messages went both ways" in found.notes[0]
    ends = {(event.rank, event.chunk): event for event in found.trace.events}
    assert ends
    assert all(event.end for event in found.trace.events)


def test_of_dumps_those_that_can_be_read_are_judged(tmp_path: Path) -> None:
    for rank, dump in json.loads((DUMPS / "never_sent.json").read_text()).items():
        (tmp_path / f"trace_rank_{rank}").write_text(json.dumps(dump))
    whole = (tmp_path / "trace_rank_0").read_text()
    (tmp_path / "trace_rank_7").write_text(whole[: len(whole) // 2])
    (found,) = read([tmp_path])
    assert found.problem
    assert (found.problem.kind, found.problem.ranks[0]) == ("never sent", 1)
    assert "trace_rank_7" in found.notes[0]
    for path in tmp_path.iterdir():
        path.write_text(whole[: len(whole) // 2])
    with pytest.raises(TraceError, match=r"trace_rank_0.*trace_rank_7"):
        read([tmp_path])


def test_a_dump_given_twice_counts_once(tmp_path: Path) -> None:
    for rank, dump in json.loads((DUMPS / "never_sent.json").read_text()).items():
        (tmp_path / f"trace_rank_{rank}").write_text(json.dumps(dump))
    (found,) = read([tmp_path, tmp_path / "trace_rank_0"])
    assert found.problem
    assert found.problem.ranks[0] == 1


def test_an_all_to_all_of_which_one_part_is_empty_shifts_no_clock(tmp_path: Path) -> None:
    """Who is sent nothing may end before the others have begun."""
    early = [("all_to_all", None, float(at), at + 0.1) for at in range(1, 6)]
    late = [("all_to_all", None, at + 0.5, at + 0.6) for at in range(1, 6)]
    record(tmp_path / "a", 0, early, ended="exit")
    record(tmp_path / "b", 1, late, host="near", ended="exit")
    (found,) = read([tmp_path / "a", tmp_path / "b"])
    assert len(found.trace.events) == 10
    assert found.notes == ()
