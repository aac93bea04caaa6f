"""A job on several hosts: the files of one are copied to the other as they grow, and it says how its processes live."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinfer.watch.probe.reading import Reader
from dinfer.watch.probe.records import ASKED_AT, HEADER_BYTES, SEGMENT_RECORDS
from dinfer.watch.probe.writing import Records
from dinfer.watching.folders import Watched
from dinfer.watching.joining import Joined, parsed_address
from dinfer.watching.listening import JoinError, Listener
from dinfer.watching.mirror import Changes, FilePiece, Mirror, MirrorError
from tests.support.runs import wait_for
from tests.unit.watch.test_records import begin


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Listener]:
    made = Listener(tmp_path / "here", "127.0.0.1:0")
    yield made
    made.close()


# -- files


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 1500), st.booleans()), min_size=1, max_size=5))
def test_what_is_copied_piece_by_piece_is_read_as_at_home(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, bool]]
) -> None:
    home, away = (tmp_path_factory.mktemp(name) for name in ("home", "away"))
    written, changes, mirror = Records(home, "kernels"), Changes(home), Mirror(away)
    written.lines.write("rank", rank=0, world_size=2)
    number, last = 0, (0, 0)
    for count, ends in steps:
        for _ in range(count):
            last = begin(written, number)
            number += 1
        if ends:
            written.ops.done(*last, 5000 + number, False)
        for piece in changes.pieces():
            mirror.write(piece)
        assert Reader(away).read() == Reader(home).read()
    assert not list(changes.pieces())
    written.close()
    shutil.rmtree(home)
    shutil.rmtree(away)


def test_a_piece_that_could_not_be_sent_comes_again(tmp_path: Path) -> None:
    written, changes = Records(tmp_path, "kernels"), Changes(tmp_path)
    for number in range(SEGMENT_RECORDS + 10):
        begin(written, number)
    first = next(changes.pieces())
    again = list(changes.pieces())
    assert again[0] == first
    assert max(piece.at for piece in again if piece.name.endswith(".ops")) > HEADER_BYTES
    written.close()


@pytest.mark.parametrize(
    ("name", "at"),
    [("../x.jsonl", 0), ("x.py", 0), ("a/b.ops", 0), ("x.ops", -1), ("x.ops", 1 << 40), ("x.jsonl", 1 << 40)],
)
def test_what_is_of_no_watched_process_is_refused(tmp_path: Path, name: str, at: int) -> None:
    with pytest.raises(MirrorError, match="of no file of a watched process"):
        Mirror(tmp_path).write(FilePiece(name, at, b"x"))
    assert not list(tmp_path.iterdir())


# -- hosts


def test_the_listening_host_reads_and_asks_what_another_has(tmp_path: Path, listener: Listener) -> None:
    told: list[str] = []
    home = tmp_path / "there"
    written = Records(home, "kernels")
    written.lines.write("rank", rank=1, world_size=2)
    begin(written, 0)
    joined = Joined(listener.address, home, told.append, 20)
    (host,) = listener.hosts
    watched = Watched([tmp_path / "here"])
    watched.add(host)
    watched.add(host)
    wait_for(lambda: watched.look()[0].trace.events, "its op has arrived")
    found = watched.look()[0]
    (process,) = found.processes.values()
    wait_for(lambda: host.pulse_of(process).is_followed, "it says how its process lives")
    wait_for(lambda: watched.look()[0].signs[1].answers is not None, "and whether it runs Python")
    watched.ask([process])
    ops = home / f"{process.name}.ops"
    wait_for(lambda: asked(ops), "its process is asked for stacks")
    listener.tell("rank 1 waits")
    wait_for(lambda: told == ["rank 1 waits"], "the verdict is told there")
    begin(written, 1)
    assert joined.end(3)
    assert host.status == 3
    assert len(watched.look()[0].trace.events) == 2
    written.close()


def asked(ops: Path) -> bool:
    """Whether the process of this file has been asked for stacks."""
    with ops.open("rb") as file:
        return file.read(64)[ASKED_AT * 8 :][:8] != bytes(8)


def test_a_host_that_falls_silent_is_named(
    tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    joined = Joined(listener.address, tmp_path / "there", lambda _: None, 20)
    watched = Watched([tmp_path / "here"])
    watched.add(listener.hosts[0])
    assert not watched.look()[0].notes
    monkeypatch.setattr("dinfer.watching.listening.SILENT_S", -1.0)
    assert "nothing has been heard of host" in watched.look()[0].notes[0]
    listener.wait_for_ends()  # not for this one
    assert joined.end(0)


def test_records_that_cannot_be_written_are_missed_on_both_hosts(
    tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Mirror, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    written = Records(tmp_path / "there", "kernels")
    joined = Joined(listener.address, tmp_path / "there", lambda _: None, 20)
    wait_for(lambda: listener.hosts[0].trouble, "a piece has come")
    assert "are missing: [Errno 28] No space left" in listener.hosts[0].note()
    assert not joined.end(0)
    written.close()


def test_a_folder_that_is_removed_ends_nothing(tmp_path: Path, listener: Listener) -> None:
    joined = Joined(listener.address, tmp_path / "never made", lambda _: None, 20)
    assert joined.end(0)
    assert listener.hosts[0].status == 0


@pytest.mark.parametrize("address", ["", "host", "host:x/00", "host:70000/" + "0" * 64, ":1/" + "0" * 64])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(JoinError, match=r"it must be ADDRESS:PORT/KEY, as `dinfer watch --listen"):
        parsed_address(address)


@pytest.mark.parametrize("key", ["", "zz", "0" * 63, "0" * 66])
def test_a_key_that_is_cut_is_refused(key: str) -> None:
    with pytest.raises(JoinError, match="copy it whole"):
        parsed_address(f"127.0.0.1:7000/{key}")


def test_nobody_joins_with_another_key(tmp_path: Path, listener: Listener) -> None:
    place = listener.address.rpartition("/")[0]
    with pytest.raises(JoinError, match=r"nobody has answered at .* key and firewall"):
        Joined(f"{place}/{'12' * 32}", tmp_path, lambda _: None, 1.0)
    assert not listener.hosts


def test_other_records_are_refused(
    tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dinfer.watching.joining.VERSION", 1)
    with pytest.raises(JoinError, match="refuses this host: it has dinfer"):
        Joined(listener.address, tmp_path, lambda _: None, 20)


@pytest.mark.parametrize("at", ["", "x", "host:", "70000", "1.2.3.4:x"])
def test_where_to_listen_must_be_a_port(tmp_path: Path, at: str) -> None:
    with pytest.raises(JoinError, match="it must be a port, or ADDRESS:PORT"):
        Listener(tmp_path, at)


def test_a_port_that_is_taken_is_named(tmp_path: Path, listener: Listener) -> None:
    port = listener.address.partition("/")[0].rpartition(":")[2]
    with pytest.raises(JoinError, match=f"cannot listen at port {port} of 127.0.0.1"):
        Listener(tmp_path, f"127.0.0.1:{port}")
