"""A rank's end of the line: what is refused is an answer too, and the line goes on."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from dinfer.cluster.link import Link
from dinfer.cluster.ranks import RankRefused
from dinfer.messages import BegunTokens, HashKv, KvHash, LimitDecode, ReadMore, StepBackDecode, TensorData
from dinfer.rank.commands import quick, slow, table_of
from dinfer.rank.control import Control

ANSWER_S = 60


@pytest.fixture
def link() -> Iterator[Link]:
    """A session's line to one rank, which is this process."""
    link = Link(1)
    control = Control(link.job_part(0, launcher=os.getpid()))
    control.table = table_of(
        [quick(LimitDecode, double), slow(HashKv, double_slowly), slow(ReadMore, repeat)]
    )
    with link.changed:  # before, there is nobody to whom a command could be sent
        assert link.changed.wait_for(lambda: link.ranks[0].heard, ANSWER_S)
    yield link
    control.close()
    link.close()


def double(command: LimitDecode) -> BegunTokens:
    if command.limit is None:
        raise ValueError("not None")
    return BegunTokens(2 * command.limit)


def double_slowly(command: HashKv) -> KvHash:
    if command.tokens < 0:
        raise ValueError("not None")
    return KvHash(str(2 * command.tokens))


def repeat(command: ReadMore) -> TensorData:
    data = bytes([command.number]) * command.start
    return TensorData(len(data), command.number, data)


def test_the_line_goes_on_after_a_command_that_was_refused(link: Link) -> None:
    for number in (3, 4):
        with pytest.raises(RankRefused, match=r"^rank 0: ValueError: not None$"):
            link.ask({0: LimitDecode(None)}, ANSWER_S)
        assert link.ask({0: LimitDecode(number)}, ANSWER_S)[0].begun == 2 * number
        with pytest.raises(RankRefused, match=r"^rank 0: ValueError: not None$"):
            link.ask({0: HashKv(-1)}, ANSWER_S)
        assert link.ask({0: HashKv(number)}, ANSWER_S)[0].sha256 == str(2 * number)


def test_an_unknown_command_is_refused_by_name(link: Link) -> None:
    with pytest.raises(RankRefused, match="StepBackDecode"):
        link.ask({0: StepBackDecode(1)}, ANSWER_S)


def test_long_answers_come_whole_and_in_order(link: Link) -> None:
    begun = [
        (number, times, link.begin({0: ReadMore(number, times)}))
        for times in (0, 1, 3_000_000)
        for number in (0, 7, 255)
    ]
    for number, times, pending in begun:
        answer = link.finish(pending, ANSWER_S)[0]
        assert (answer.size, answer.number, answer.data) == (times, number, bytes([number]) * times)
