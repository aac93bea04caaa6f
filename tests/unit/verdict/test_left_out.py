"""A message that one rank leaves out of a row of them: all later ones meet the place before their own."""

from __future__ import annotations

from dinfer.verdict.completed import findings_of_events
from dinfer.verdict.recorded import explain_events
from tests.support.made_ops import MadeOps


def row(sent: list[int], received: list[int], waits: int | None = None) -> MadeOps:
    """Sends of rank 2 to rank 1 by chunk, and rank 1's recvs; `waits`: the chunk of a last recv, which rank 1 is in
    while rank 2 waits for an answer."""
    ops = MadeOps(3)
    for chunk in sent:
        ops.send(2, 1, chunk=chunk)
    for chunk in received:
        ops.recv(1, 2, chunk=chunk)
    if waits is not None:
        ops.recv(1, 2, chunk=waits, open=True)
        ops.recv(2, 1, chunk=0, open=True)
    return ops


def said(ops: MadeOps) -> list[tuple[str, tuple[int, ...], int | None, str]]:
    found = findings_of_events(ops.events, ops.groups)
    return [(one.kind, one.ranks, one.chunk, one.text) for one in found if one.kind.startswith("missing")]


def test_a_send_that_is_left_out_is_why_the_last_recv_waits() -> None:
    ops = row([0, 1, 2, 3, 4, 6, 7], [0, 1, 2, 3, 4, 5, 6], waits=7)
    verdict = explain_events(ops.events, {}, groups=ops.groups)
    assert (verdict.kind, verdict.ranks, verdict.blocked) == ("cycle", (2,), (1,))
    assert verdict.sentence.startswith("missing send: rank 2 has left out a send of c5 to rank 1")
    for part in ("rank 1's `recv c5 <- 2`", "at rank1.py:6", "rank 2's `send c6 -> 1`", "at rank2.py:6"):
        assert part in verdict.sentence
    ((kind, ranks, chunk, text),) = said(ops)
    assert (kind, ranks, chunk) == ("missing send", (2, 1), 5)
    assert text in verdict.sentence


def test_a_recv_that_is_left_out() -> None:
    ((kind, ranks, chunk, text),) = said(row([0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 4, 5, 6]))
    assert (kind, ranks, chunk) == ("missing recv", (1, 2), 3)
    assert text.startswith("rank 1 has left out a recv of c3 from rank 2: rank 2's `send c3 -> 1`")
    assert "was received by rank 1's `recv c4 <- 2`" in text


def test_what_agrees_or_was_never_alike_says_nothing() -> None:
    for sent, received in (
        ([0, 1, 2, 3], [0, 1, 2, 3]),
        ([0, 1, 2, 3], [0, 1, 2]),  # one is under way
        ([1, 2, 3, 4, 5], [0, 1, 2, 3, 4]),  # each side counts in its own way
        ([0, 1, 2, 4, 3, 5], [0, 1, 2, 3, 4, 5]),  # two changed places
        ([0, 1, 2, 9], [0, 1, 2, 3]),  # what comes after is not known
    ):
        assert said(row(sent, received)) == [], (sent, received)


def test_messages_without_chunks_say_nothing() -> None:
    ops = MadeOps(2)
    for shape in (4, 4, 4, 5, 6):
        ops.message(0, 1, shape=(shape,))
    assert said(ops) == []


def test_messages_that_have_changed_places_at_the_end_are_none_left_out() -> None:
    ops = row([0, 1, 2, 3, 4], [0, 1, 2, 4, 3])
    assert said(ops) == []
    assert [one.kind for one in findings_of_events(ops.events, ops.groups)] == ["crossed"]
