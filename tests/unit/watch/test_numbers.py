"""The numbers of ops: who reads matches them though older ones are gone, on each rank others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from dinfer.trace.flight import groups_of
from dinfer.verdict.completed import findings_of_events
from dinfer.verdict.matching import MatchedOps
from dinfer.verdict.recorded import explain_events
from dinfer.verdict.signs import Signs
from dinfer.watch.probe import recorder as recorders
from dinfer.watch.probe.groups import GroupFacts, facts_of
from dinfer.watch.probe.reading import Reader
from dinfer.watch.probe.recorder import OpRecorder, PendingOp
from dinfer.watch.probe.records import NOTHING, SEGMENT_RECORDS, UNNUMBERED, WatchedOp
from dinfer.watch.probe.writing import OpsWriter
from dinfer.watching.events import ranks_of, trace_of

LONG = torch.zeros(8)


class RecordedRank:
    """A rank of a world of `size`, in this process, that remembers few ops."""

    def __init__(self, folder: Path, rank: int, size: int, backend: str = "gloo") -> None:
        self.recorder, self.rank = OpRecorder(folder), rank
        records = self.recorder.open()
        assert records is not None
        records.ops.close()
        path = folder / f"{records.name}.ops"
        path.unlink()
        records.ops = OpsWriter(path, most_segments=1)
        records.lines.write("rank", rank=rank, world_size=size)
        everyone = tuple(range(size))
        number = records.groups.number((1, "0", everyone, backend, "default_pg"))
        self.world: GroupFacts = facts_of(number, everyone, backend)

    def op(
        self, kind: str, peer: int = NOTHING, *, tag: int = 0, length: int = 1, is_open: bool = False
    ) -> PendingOp:
        """An op that somebody waits for."""
        pending = self.recorder.issued(kind, self.world, peer, tag, [LONG[:length]], False, None)
        assert pending is not None
        self.recorder.waiting(pending, None)
        if not is_open:
            self.recorder.done(pending)
        return pending


Ranks = list[RecordedRank]
COUNT = SEGMENT_RECORDS + 50


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    """Three of them."""
    made = [RecordedRank(tmp_path, rank, 3) for rank in range(3)]
    yield made
    for one in made:
        one.recorder.close()


@pytest.fixture
def read(tmp_path: Path) -> Callable[[int], list[WatchedOp]]:
    """The ops of a rank."""
    return lambda rank: ranks_of(Reader(tmp_path).read())[rank].ops


def pass_on(ranks: Ranks, count: int) -> None:
    """Messages from each rank to the next, of ever other sizes, a few with another tag, and sometimes a collective."""
    for number in range(count):
        for one, other in ((0, 1), (1, 2)):
            for _ in range(1 + one):  # so that the ranks forget differently many
                length, tag = 1 + number % 5, int(number % 7 == 0)
                ranks[one].op("send", other, length=length, tag=tag)
                ranks[other].op("recv", one, length=length, tag=tag)
        if number % 50 == 0:
            for rank in ranks:
                rank.op("all_reduce", length=1 + number % 3)


@pytest.fixture(scope="module")
def forgetful(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Ranks]]:
    """Ranks that have forgotten ops; each test leaves them without an open one."""
    folder = tmp_path_factory.mktemp("records")
    made = [RecordedRank(folder, rank, 3) for rank in range(3)]
    pass_on(made, COUNT)
    yield folder, made
    for one in made:
        one.recorder.close()


def test_messages_meet_though_the_ranks_have_forgotten_differently_many(
    forgetful: tuple[Path, Ranks],
) -> None:
    folder, _ = forgetful
    found = Reader(folder).read()
    assert len({process.dropped for process in found}) == 3
    assert min(process.dropped for process in found) > 0
    trace = trace_of(ranks_of(found))
    ops = MatchedOps(trace.events, groups_of(trace))
    messages = list(ops.messages())
    assert len(messages) > COUNT / 2
    assert all(send.event.bytes == recv.event.bytes for send, recv in messages)
    assert all(send.event.call.tag == recv.event.call.tag for send, recv in messages)  # type: ignore[union-attr]
    assert all(len({op.event.bytes for op in parts.values()}) == 1 for parts in ops.collectives())
    assert findings_of_events(trace.events, groups_of(trace), ended=range(3)) == []


def test_a_hang_after_ops_were_forgotten_is_judged_right(forgetful: tuple[Path, Ranks]) -> None:
    folder, ranks = forgetful
    waits = [ranks[1].op("recv", 0, length=3, is_open=True), ranks[2].op("recv", 1, length=3, is_open=True)]
    trace = trace_of(ranks_of(Reader(folder).read()))
    signs = {0: Signs(phase="done"), 1: Signs(), 2: Signs()}
    verdict = explain_events(trace.events, signs, groups=groups_of(trace))
    sent = sum(number % 7 != 0 for number in range(COUNT))
    assert (verdict.kind, verdict.ranks, verdict.blocked) == ("never sent", (0,), (1, 2))
    assert f"with {sent} such sends, and not sent the " in verdict.sentence
    for rank, pending in zip((0, 1), waits, strict=True):
        ranks[rank].op("send", rank + 1, length=3)
        ranks[rank + 1].recorder.done(pending)


def test_a_collective_that_one_rank_left_out_after_ops_were_forgotten(forgetful: tuple[Path, Ranks]) -> None:
    folder, ranks = forgetful
    waits = [rank.op("all_reduce", is_open=True) for rank in ranks[:2]]
    waits.append(ranks[2].op("recv", 0, is_open=True))
    trace = trace_of(ranks_of(Reader(folder).read()))
    verdict = explain_events(trace.events, groups=groups_of(trace))
    assert verdict.kind == "cycle"
    assert set(verdict.ranks) == {0, 2}
    for rank, pending in zip(ranks, waits, strict=True):
        rank.recorder.done(pending)
    ranks[0].op("send", 2)
    ranks[2].op("all_reduce")


def test_what_failed_before_it_was_issued_takes_no_number(
    ranks: Ranks, read: Callable[[int], list[WatchedOp]]
) -> None:
    ranks[0].op("send", 1)
    failed = ranks[0].op("send", 1, is_open=True)
    ranks[0].recorder.not_issued(failed, RuntimeError("not contiguous"))
    ranks[0].op("send", 1)
    assert [(op.number, op.state) for op in read(0)] == [(0, "done"), (UNNUMBERED, "failed"), (1, "done")]


class FromRank:
    """The Work of a recv from any rank."""

    def __init__(self, source: int) -> None:
        self._source = source

    def _source_rank(self) -> int:
        return self._source


def test_a_recv_from_any_rank_is_numbered_once_it_is_over(
    ranks: Ranks, read: Callable[[int], list[WatchedOp]]
) -> None:
    rank = ranks[0]
    rank.op("recv", 1)
    for source in (1, 2):
        rank.recorder.done(rank.op("recv", is_open=True), None, FromRank(source))
    rank.op("recv", 1)
    assert [(op.peer, op.number) for op in read(0)] == [(1, 0), (1, 1), (2, 0), (1, 2)]


def test_what_recvs_beside_one_from_any_rank_get_is_not_known(
    ranks: Ranks, read: Callable[[int], list[WatchedOp]]
) -> None:
    rank = ranks[0]
    any_source = rank.op("recv", is_open=True)
    rank.op("recv", 1)
    rank.recorder.done(any_source, None, FromRank(1))
    rank.op("recv", 1)  # it gets the third message, whoever got the first
    assert [(op.peer, op.number) for op in read(0)] == [(1, UNNUMBERED), (1, UNNUMBERED), (1, 2)]


def test_backends_that_ignore_tags_number_messages_without_them(tmp_path: Path) -> None:
    for backend, expected in (("gloo", [0, 0, 1]), ("nccl", [0, 1, 2])):
        rank = RecordedRank(tmp_path / backend, 0, 2, backend)
        for tag in (3, 4, 3):
            rank.op("send", 1, tag=tag)
        (process,) = Reader(tmp_path / backend).read()
        assert [op.number for op in process.ops] == expected
        rank.recorder.close()


def test_a_program_may_use_any_number_of_tags(
    ranks: Ranks, read: Callable[[int], list[WatchedOp]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorders, "MOST_CHANNELS", 3)
    for tag in (1, 2, 3, 4, 4, 3, 1):
        ranks[0].op("send", 1, tag=tag)
    assert [op.number for op in read(0)] == [0, 0, 0, 0, 1, 1, 0]
    assert len(ranks[0].recorder._counts) == 3
