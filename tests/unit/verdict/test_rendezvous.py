"""Orders of ops, recorded or of a pipeline's schedule, played with sends that wait for their recvs."""

import pytest

from dinfer.verdict.pipelining import ScheduleError, is_schedule, parse_schedule, verify_schedule
from dinfer.verdict.rendezvous import rendezvous_verdict
from dinfer.verdict.verdict import Verdict
from tests.support.made_ops import MadeOps


def played(ops: MadeOps) -> Verdict:
    return rendezvous_verdict(ops.events, ops.groups)


def test_sends_first_that_a_buffer_hides() -> None:
    ops = MadeOps(2)
    for rank in (0, 1):
        ops.send(rank, 1 - rank)
    for rank in (0, 1):
        ops.recv(rank, 1 - rank)
    verdict = played(ops)
    assert (verdict.kind, verdict.ranks) == ("cycle", (0, 1))
    assert "rank0.py:1" in verdict.sentence


def test_isends_that_are_waited_for_last_do_not_hang() -> None:
    ops = MadeOps(2)
    for rank in (0, 1):
        ops.send(rank, 1 - rank, is_async=True, waited_at=9)
        ops.recv(rank, 1 - rank)
    assert played(ops).kind == "done"
    early = MadeOps(2)
    for rank in (0, 1):
        early.send(rank, 1 - rank, is_async=True)  # the wait follows at once
        early.recv(rank, 1 - rank)
    assert played(early).kind == "cycle"


def test_a_ring_of_three_in_which_one_receives_first_does_not_hang() -> None:
    ops = MadeOps(3)
    ops.recv(0, 2)
    ops.send(0, 1)
    for rank in (1, 2):
        ops.send(rank, (rank + 1) % 3)
        ops.recv(rank, rank - 1)
    ops.all("barrier", 0, 1, 2)
    assert played(ops).kind == "done"


def test_a_collective_that_one_rank_reaches_only_after_a_send() -> None:
    ops = MadeOps(2)
    ops.send(0, 1)
    ops.all("all_reduce", 0, 1)
    ops.recv(1, 0)
    verdict = played(ops)
    assert (verdict.kind, verdict.ranks) == ("cycle", (1, 0))


ONE_F_ONE_B = "0F0,0F1,0B0,0F2,0B1,0B2\n1F0,1B0,1F1,1B1,1F2,1B2\n"
WITH_SENDS = "0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0B0\n1RECV_F0,1F0,1RECV_F1,1B0,1SEND_B0,1F1"
RECV_TOO_LATE = "0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0B0\n1RECV_F0,1F0,1B0,1SEND_B0,1RECV_F1,1F1"


def test_computations_alone_are_judged_by_what_they_need() -> None:
    proof = verify_schedule(parse_schedule(ONE_F_ONE_B))
    assert proof.proved
    assert "with blocking sends" in proof.note
    assert "each before: deadlock" in proof.note
    forwards = verify_schedule(parse_schedule("0F0,0F1\n1F0,1F1\n"))
    assert forwards.note.startswith("also with blocking sends")


def test_sends_are_judged_as_they_stand() -> None:
    assert verify_schedule(parse_schedule(WITH_SENDS)).proved
    refuted = verify_schedule(parse_schedule(RECV_TOO_LATE))
    assert refuted.verdict
    assert (refuted.verdict.kind, refuted.verdict.ranks) == ("cycle", (0, 1))
    assert "0SEND_F1" in str(refuted)
    assert "1SEND_B0" in str(refuted)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0F0,0F1,0B0,0B1\n1F0,1B1,1F1,1B0\n", "`1B1`, which needs `1F1`"),
        ("0F0,0SEND_F0,0F1,0SEND_F1\n1RECV_F1,1RECV_F0,1F0,1F1", "messages cross"),
        ("0F0,0SEND_F0\n1F0", "rank 1 nowhere receives it"),
        ("0F0\n1RECV_F0,1F0", "rank 0 nowhere sends it"),
        ("0F0\n0F1", "stage 0 is on rank 0 and on rank 1"),
        ("0F0\n2F0", "no rank has stage 1"),
        ("0F0,0SEND_B0\n1F0", "no stage at its other end"),
    ],
)
def test_flaws_of_schedules(text: str, words: str) -> None:
    proof = verify_schedule(parse_schedule(text))
    assert not proof.proved
    assert words in str(proof)


def test_what_is_a_schedule() -> None:
    assert all(map(is_schedule, (ONE_F_ONE_B, "\n,,0F0,1B0", "(0F0;1B0)OVERLAP_F_B", "3UNSHARD")))
    assert not any(map(is_schedule, ("dinfer plan 1\n", "", "embed c0", "0X0")))
    (only,) = parse_schedule("(0F0;1B0)OVERLAP_F_B,0W0,")
    assert list(map(str, only)) == ["0F0", "1B0", "0W0"]
    with pytest.raises(ScheduleError, match=r"line 2: '1X1' is no action"):
        parse_schedule("0F0\n1X1")


def test_the_text_is_torchs() -> None:
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    texts = [str(schedules._Action.from_str(text)) for text in ("2F0", "1SEND_F3", "0RECV_B1", "1UNSHARD")]
    assert [str(action) for action in parse_schedule(",".join(texts))[0]] == texts
