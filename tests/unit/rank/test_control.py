"""A rank's end of the line: what is refused is an answer too, and the line goes on."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from dinfer.cluster.link import Link
from dinfer.cluster.ranks import RankRefused
from dinfer.messages import Message
from dinfer.rank.commands import Command
from dinfer.rank.control import Control

ANSWER_S = 60


@pytest.fixture
def link() -> Iterator[Link]:
    """A session's line to one rank, which is this process."""
    link = Link(1)
    control = Control(link.job_part(0, launcher=os.getpid()))
    control.serve(
        {
            "quick": Command(refuse),
            "slow": Command(refuse, slow=True),
            "double": Command(double),
            "double slowly": Command(double, slow=True),
            "repeat": Command(repeat, slow=True),
        }
    )
    with link.changed:  # before, there is nobody to whom a command could be sent
        assert link.changed.wait_for(lambda: link.ranks[0].heard, ANSWER_S)
    yield link
    control.close()
    link.close()


def refuse(message: Message) -> Message:
    raise ValueError(f"not {message['number']}")


def double(message: Message) -> Message:
    return {"number": 2 * message["number"]}


def repeat(message: Message) -> Message:
    return {"text": message["text"] * message["times"]}


@pytest.mark.parametrize(("refused", "next_one"), [("quick", "double"), ("slow", "double slowly")])
def test_the_line_goes_on_after_a_command_that_was_refused(link: Link, refused: str, next_one: str) -> None:
    for number in (3, 4):
        with pytest.raises(RankRefused, match=rf"^rank 0: ValueError: not {number}$"):
            link.ask({0: {"do": refused, "number": number}}, ANSWER_S)
        assert link.ask({0: {"do": next_one, "number": number}}, ANSWER_S)[0]["number"] == 2 * number


def test_long_answers_come_whole_and_in_order(link: Link) -> None:
    texts = ["安静\n", "x\r\n", '"'] * 3
    begun = [
        (text, times, link.begin({0: {"do": "repeat", "text": text, "times": times}}))
        for times in (1, 30_000)
        for text in texts
    ]
    for text, times, ids in begun:
        assert link.finish(ids, ANSWER_S)[0]["text"] == text * times
