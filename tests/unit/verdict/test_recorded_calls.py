"""Verdicts on recorded calls of other people's code: one test for each defect that real programs have."""

import pytest

from dinfer.verdict.recorded import explain_events
from dinfer.verdict.signs import Raised, Signs, StackFrame
from dinfer.verdict.verdict import Verdict
from tests.support.made_ops import MadeOps

DONE = Signs(phase="done")
SLEEPS = StackFrame("/code/rank1.py", 9, "main", "time.sleep(99)")


def explained(ops: MadeOps, signs: dict[int, Signs] | None = None) -> Verdict:
    return explain_events(ops.events, signs, groups=ops.groups)


def assert_verdict(verdict: Verdict, kind: str, ranks: tuple[int, ...], *words: str) -> None:
    assert (verdict.kind, verdict.ranks) == (kind, ranks), verdict
    assert verdict.is_hung
    for word in words:
        assert word in verdict.sentence, (word, verdict.sentence)


def test_one_rank_in_all_gather_while_another_waits_in_recv() -> None:
    ops = MadeOps(3)
    ops.all("all_reduce", 0, 1, 2)
    ops.message(0, 1)
    ops.recv(0, 2, open=True, shape=(8, 2))
    ops.add(2, "all_gather", open=True)
    ops.add(1, "all_gather", open=True)
    verdict = explained(ops)
    assert_verdict(
        verdict, "cycle", (2, 0), "`recv <- 2` ([8, 2] float32) at rank0.py:3", "`all_gather`", "rank2.py:2"
    )
    assert verdict.blocked == (1,)


def test_one_send_for_two_recvs() -> None:
    ops = MadeOps(2)
    ops.message(0, 1)
    ops.recv(1, 0, open=True)
    assert_verdict(
        explained(ops, {0: DONE, 1: Signs()}),
        "never sent",
        (0,),
        "has ended after `send -> 1` ([4] float32) at rank0.py:1",
        "1 such send, and not sent the 2nd, for which rank 1 is in `recv <- 0` ([4] float32) at rank1.py:2",
    )


def astray() -> MadeOps:
    """A ring of 4, in which rank 2 sends to 1 what rank 3 waits for."""
    ops = MadeOps(4)
    ops.all("all_reduce", 0, 1, 2, 3)
    for rank in (0, 1):
        ops.message(rank, rank + 1)
    ops.add(0, "barrier", open=True)
    ops.add(1, "barrier", open=True)
    ops.send(2, 1, open=True, shape=(8, 2))
    ops.recv(3, 2, open=True, shape=(8, 2))
    return ops


def test_a_message_that_goes_to_another_rank_than_the_one_that_waits() -> None:
    verdict = explained(astray())
    assert_verdict(
        verdict,
        "wrong peer",
        (2,),
        "rank 2 is in `send -> 1` ([8, 2] float32) at rank2.py:3, and rank 1 has not received from it",
        "rank 3 is in `recv <- 2` ([8, 2] float32) at rank3.py:2, which rank 2 has not sent",
        "rank 1 is in `barrier` ([4] float32) at rank1.py:4",
    )
    assert verdict.blocked == (0, 1, 3)


def test_a_message_that_is_awaited_from_another_rank_than_the_one_that_sends() -> None:
    """A ring the other way round, in which rank 1 waits for 0, and 2 sends to it."""
    ops = MadeOps(4)
    ops.all("all_reduce", 0, 1, 2, 3)
    ops.message(0, 3)
    ops.message(1, 0)
    ops.add(0, "barrier", open=True)
    ops.recv(1, 0, open=True)
    ops.send(2, 1, open=True)
    ops.add(3, "barrier", open=True)
    assert_verdict(
        explained(ops),
        "wrong peer",
        (1,),
        "rank 1 is in `recv <- 0` ([4] float32) at rank1.py:3, and rank 0 has not sent to it",
        "rank 2 is in `send -> 1` ([4] float32) at rank2.py:2, which rank 1 has not received",
    )


@pytest.mark.parametrize("scatters", [True, False])
@pytest.mark.parametrize("before", ["nothing", "a ring", "a ring and a barrier"])
@pytest.mark.parametrize("left_out", [1, 2])
def test_a_rank_that_leaves_out_its_turn_is_to_blame(scatters: bool, before: str, left_out: int) -> None:
    """Rank 0 sends to one after the other, or receives from them: the one that waits behind is right to wait."""
    ops = MadeOps(4)
    if before != "nothing":
        for rank in range(4):
            ops.message(rank, (rank - 1) % 4 if scatters else (rank + 1) % 4)
    if before == "a ring and a barrier":
        ops.all("barrier", 0, 1, 2, 3)
    begin, answer = (ops.send, ops.recv) if scatters else (ops.recv, ops.send)
    for rank in range(1, left_out):
        begin(0, rank)
        answer(rank, 0)
    begin(0, left_out, open=True)
    for rank in range(left_out + 1, 4):
        answer(rank, 0, open=True)
    for rank in range(1, left_out + 1):
        ops.add(rank, "all_reduce", open=True)
    assert_verdict(explained(ops), "cycle", (left_out, 0), "`all_reduce`", f"rank{left_out}.py")


def test_a_turn_back_in_a_pipeline_is_no_message_astray() -> None:
    """Rank 1 leaves out the first gradients from rank 2; rank 3 waits for the next micro-batch."""
    ops = MadeOps(4)
    for rank in range(3):
        ops.message(rank, rank + 1)
    ops.message(3, 2)
    ops.add(0, "all_reduce", open=True)
    ops.add(1, "all_reduce", open=True)
    ops.send(2, 1, open=True)
    ops.recv(3, 2, open=True)
    assert_verdict(explained(ops), "cycle", (1, 2), "`all_reduce`", "`send -> 1`")


def test_a_rank_that_has_left_a_link_that_it_used_is_to_blame_itself() -> None:
    """The last micro-batch of a pipeline is one too many for it; that the first rank waits for gradients is right."""
    ops = MadeOps(3)
    ops.message(0, 1)
    ops.message(1, 2)
    ops.add(2, "all_reduce", open=True)
    ops.send(1, 2, open=True)
    ops.recv(0, 1, open=True)
    assert_verdict(explained(ops), "cycle", (2, 1), "`all_reduce`", "`send -> 2`")


def test_an_exception_then_a_barrier_in_the_handler() -> None:
    ops = MadeOps(2)
    ops.message(0, 1)
    ops.add(1, "barrier", open=True)
    ops.recv(0, 1, open=True)
    raised = Raised("ValueError: bad shape", op="rank1.py:7")
    assert_verdict(
        explained(ops, {0: Signs(), 1: Signs(raised=raised)}),
        "exception",
        (1,),
        "raised ValueError: bad shape at rank1.py:7; it now waits in its handler, in `barrier`",
        "rank 0 waits for it: rank 0 is in `recv <- 1`",
    )


def test_both_ends_send_first() -> None:
    ops = MadeOps(2)
    ops.send(0, 1, open=True)
    ops.send(1, 0, open=True)
    assert_verdict(explained(ops), "cycle", (0, 1), "rank0.py:1", "rank1.py:1")


def test_an_isend_before_the_recv_is_no_cycle_but_lost_if_nobody_waits_for_it() -> None:
    ops = MadeOps(2)
    for rank in (0, 1):
        ops.send(rank, 1 - rank, open=True, is_async=True, is_waited=False)
        ops.recv(rank, 1 - rank, open=True)
    assert_verdict(explained(ops), "never sent", (0, 1), "does not wait for it", "rank0.py:1", "rank1.py:2")
    just_now = explain_events(ops.events, groups=ops.groups, now=int(2.5e9))
    assert just_now.kind == "moving"


def test_a_link_that_does_not_carry_what_both_ends_wait_for() -> None:
    ops = MadeOps(2)
    ops.send(0, 1, open=True)
    ops.recv(1, 0, open=True)
    assert_verdict(explained(ops), "stalled link", (0,), "both ends are there")


def test_a_send_to_oneself_by_group_rank() -> None:
    ops = MadeOps(3)
    ops.group("pair", 1, 2)
    ops.send(1, 1, open=True, group="pair")
    ops.recv(2, 1, open=True, group="pair")
    assert_verdict(
        explained(ops), "wrong peer", (1,), "itself", "group pair", "rank1.py:1", "rank 2 waits for it"
    )


def test_ranks_that_disagree_on_the_number_of_micro_batches() -> None:
    ops = MadeOps(2)
    for _ in range(3):
        ops.message(0, 1)
    ops.recv(1, 0, open=True, chunk=3)
    ops.add(0, "all_reduce", open=True)
    assert_verdict(explained(ops), "cycle", (0, 1), "`all_reduce`", "`recv c3 <- 0`")


def test_a_subgroup_that_one_rank_alone_creates() -> None:
    ops = MadeOps(2)
    ops.add(1, "new_group", open=True)
    ops.add(0, "all_reduce", open=True)
    assert_verdict(explained(ops), "cycle", (1, 0), "`new_group`", "`all_reduce`", "rank0.py:1", "rank1.py:1")


def test_messages_of_other_tags_do_not_meet_on_gloo_and_do_on_nccl() -> None:
    for backend, kind in (("gloo", "cycle"), ("nccl", "stalled link")):
        ops = MadeOps(2, backend)
        ops.send(0, 1, open=True, tag=1)
        ops.recv(1, 0, open=True, tag=2)
        verdict = explained(ops)
        assert verdict.kind == kind, verdict
    assert "another tag" not in verdict.sentence


def test_messages_match_first_in_first_out_within_their_group() -> None:
    ops = MadeOps(3)
    ops.group("pair", 0, 1)
    ops.message(0, 1, group="pair")
    ops.send(0, 1, open=True, group="pair")
    ops.recv(1, 0, open=True)
    assert_verdict(explained(ops), "cycle", (0, 1), "group pair")


def test_a_collective_of_a_subgroup_waits_for_its_members_alone() -> None:
    ops = MadeOps(4)
    ops.group("left", 0, 1)
    ops.group("right", 2, 3)
    ops.all("all_reduce", 2, 3, group="right")
    ops.add(0, "all_reduce", open=True, group="left")
    verdict = explained(
        ops, {rank: Signs(frames={"main": SLEEPS}) if rank == 1 else Signs() for rank in range(4)}
    )
    assert_verdict(
        verdict, "stuck in Python", (1,), "time.sleep(99)", "rank 0 waits for it: rank 0 is in `all_reduce`"
    )


@pytest.mark.parametrize(
    ("signs", "kind", "word"),
    [
        (
            Signs(frames={"main": SLEEPS}, cpu_moves=False),
            "stuck in Python",
            "time.sleep(99)` in main (rank1.py:9)",
        ),
        (Signs(answers=False, cpu_moves=False), "stuck in C", "the GIL"),
        (Signs(process="T"), "stopped", "is stopped by a signal"),
        (Signs(ended="was killed by SIGKILL"), "dead", "was killed by SIGKILL"),
    ],
)
def test_a_rank_that_does_not_come(signs: Signs, kind: str, word: str) -> None:
    ops = MadeOps(2)
    ops.message(0, 1)
    ops.recv(0, 1, open=True)
    assert_verdict(explained(ops, {0: Signs(), 1: signs}), kind, (1,), word, "rank 0 is in `recv <- 1`")


def test_a_rank_that_computes_is_no_hang() -> None:
    ops = MadeOps(2)
    ops.message(0, 1)
    ops.recv(0, 1, open=True)
    verdict = explain_events(ops.events, {0: Signs(), 1: Signs(cpu_moves=True)}, int(90e9), ops.groups)
    assert (verdict.kind, verdict.ranks, verdict.is_hung) == ("computing", (1,), False)


def test_two_ranks_that_miss_one_collective_are_both_named() -> None:
    ops = MadeOps(4)
    ops.all("all_reduce", 0, 1, 2, 3)
    ops.all("all_reduce", 0, 2, open=True)
    verdict = explained(ops, {rank: DONE if rank in (1, 3) else Signs() for rank in range(4)})
    assert verdict.kind == "never joined"
    assert verdict.ranks[0] == 1
    assert "rank1.py:1" in verdict.sentence


def test_collectives_of_other_kinds_and_sizes() -> None:
    ops = MadeOps(3)
    ops.all("all_reduce", 0, 2, open=True)
    ops.add(1, "broadcast", open=True)
    assert_verdict(explained(ops), "out of order", (1,), "`broadcast`", "rank1.py:1", "rank0.py:1")
    ops = MadeOps(3)
    ops.all("all_reduce", 0, 2, open=True)
    ops.add(1, "all_reduce", open=True, shape=(9,))
    assert_verdict(explained(ops), "other size", (1,), "[9] float32", "[4] float32")


def test_a_device_that_stands_still_while_others_have_ended_the_op() -> None:
    ops = MadeOps(3, "nccl")
    ops.group("pair", 0, 1)
    ops.add(0, "all_reduce", group="pair", number=7)
    ops.add(1, "all_reduce", group="pair", number=7, open=True)
    ops.add(1, "all_reduce", number=3, open=True)
    ops.all("all_reduce", 0, 2, number=3, open=True)
    assert_verdict(explained(ops), "stuck", (1,), "group pair", "rank 0 has ended", "stands still")


def test_a_recv_from_anyone_waits_for_those_who_are_free() -> None:
    ops = MadeOps(3)
    ops.recv(0, None, open=True)
    ops.recv(1, 0, open=True)
    verdict = explained(ops, {0: Signs(), 1: Signs(), 2: Signs(frames={"main": SLEEPS})})
    assert_verdict(verdict, "stuck in Python", (2,))


def test_a_large_message_has_the_time_that_it_needs() -> None:
    ops = MadeOps(2)
    big = (100_000_000,)
    ops.send(0, 1, open=True, shape=big)
    ops.recv(1, 0, open=True, shape=big)
    assert explain_events(ops.events, groups=ops.groups, now=int(60e9)).kind == "moving"
    assert explain_events(ops.events, groups=ops.groups, now=int(600e9)).kind == "stalled link"


def test_ranks_that_raise_the_same_are_told_at_once() -> None:
    same = Signs(raised=Raised("KeyError: 'ring'", op="infer.py:118"), ended="ended by its exception")
    for n, ranks in ((3, "ranks 0, 1 and 2"), (16, "ranks 0–15")):
        ops = MadeOps(n)
        verdict = explained(ops, dict.fromkeys(range(n), same))
        assert (verdict.kind, verdict.ranks) == ("exception", tuple(range(n)))
        assert verdict.sentence == f"{ranks} raised KeyError: 'ring' at infer.py:118"
        assert verdict.lines == (f"ranks 0–{n - 1}: raised KeyError: 'ring' at infer.py:118",)


def test_of_ranks_that_raise_other_things_the_first_are_told() -> None:
    signs = {
        rank: Signs(raised=Raised(f"ValueError: {rank}"), ended="ended by its exception") for rank in range(8)
    }
    sentence = explained(MadeOps(8), signs).sentence
    assert (
        sentence
        == "rank 0 raised ValueError: 0; rank 1 raised ValueError: 1; rank 2 raised ValueError: 2; and 5 more"
    )


def test_several_ranks_are_told_in_the_plural() -> None:
    ops = MadeOps(16)
    for rank in range(16):
        if rank not in (3, 4):
            ops.add(rank, "all_reduce", open=True)
    stopped = explained(ops, {rank: Signs(process="T" if rank in (3, 4) else "S") for rank in range(16)})
    assert stopped.sentence.startswith(
        "ranks 3 and 4 are stopped by a signal or a debugger; ranks 0–2, 5–15 wait for them: rank 0 is in"
    )
    assert len(stopped.lines) == 15  # their lines of code differ


def test_of_a_long_cycle_its_beginning_and_end_are_told() -> None:
    ops = MadeOps(16)
    for rank in range(16):
        ops.send(rank, (rank + 1) % 16, open=True)
    sentence = explained(ops).sentence
    assert sentence.count("`send -> ") == 4
    assert "and so on, 12 ranks; rank 15 is in `send -> 0`" in sentence


@pytest.mark.parametrize("signs", [Signs(frames={"main": SLEEPS}, cpu_moves=False), Signs(answers=False)])
def test_a_rank_for_which_nobody_waits_hangs_nobody(signs: Signs) -> None:
    """It serves, or sleeps, while two others send to each other."""
    ops = MadeOps(3)
    ops.message(0, 1)
    ops.send(1, 0, open=True)
    ops.recv(0, 1, open=True, at=3600.0)
    found = explain_events(ops.events, {0: Signs(), 1: Signs(), 2: signs}, int(3601e9), ops.groups)
    assert (found.kind, found.is_hung) == ("moving", False), found
    ops.add(1, "barrier", open=True)
    found = explain_events(ops.events, {0: Signs(), 1: Signs(), 2: signs}, int(7200e9), ops.groups)
    assert found.rank == 2
    assert found.is_hung


def test_a_rank_that_waits_for_a_request_is_idle_and_said_to_be() -> None:
    """As a serving engine does: its workers wait for what rank 0 will broadcast."""
    ops = MadeOps(3)
    ops.all("broadcast", 0, 1, 2)
    ops.all("broadcast", 1, 2, open=True)
    accepts = StackFrame("/code/serve.py", 9, "serve", "sock.accept()")
    idle = Signs(frames={"MainThread": accepts}, cpu_moves=False, outside="a connection")
    found = explain_events(ops.events, {0: idle, 1: Signs(), 2: Signs()}, int(90e9), ops.groups)
    assert (found.kind, found.ranks, found.is_hung) == ("idle", (0,), False), found
    assert (
        "waits for a connection, at `sock.accept()` in serve (serve.py:9); ranks 1 and 2 wait for it"
        in found.sentence
    )


def test_a_rank_that_waits_for_its_child_is_told_so() -> None:
    ops = MadeOps(2)
    ops.all("barrier", 0, 1)
    ops.add(0, "barrier", open=True)
    frame = StackFrame("/code/a.py", 9, "main", "subprocess.run(command)")
    waits = Signs(frames={"MainThread": frame}, cpu_moves=False, child="its child process 77 (sleep)")
    found = explained(ops, {0: Signs(), 1: waits})
    assert_verdict(found, "stuck in Python", (1,), "waits for its child process 77 (sleep)", "a.py:9")


def test_an_exception_that_is_handled_is_told_only_once_the_run_hangs() -> None:
    ops = MadeOps(3)
    ops.message(0, 1)
    ops.group("pair", 0, 1)
    ops.add(1, "barrier", open=True, group="pair")
    handled = Raised("ValueError: a shape", op="rank1.py:7", handled=True)
    signs = {0: Signs(cpu_moves=True), 1: Signs(raised=handled), 2: Signs()}
    assert explain_events(ops.events, signs, int(60e9), ops.groups).kind == "computing"
    ops.add(0, "all_reduce", open=True)
    ops.add(2, "all_reduce", open=True)
    assert_verdict(
        explain_events(ops.events, {0: Signs(), 1: signs[1], 2: Signs()}, int(60e9), ops.groups),
        "exception",
        (1,),
        "raised ValueError: a shape at rank1.py:7 and handled it; it now waits in `barrier`",
        "ranks 0 and 2 wait for it: rank 0 is in `all_reduce`",
    )


def test_an_exception_that_ended_a_thread_is_told_if_the_rank_does_not_go_on() -> None:
    ops = MadeOps(2)
    ops.all("barrier", 0, 1)
    lost = Raised("KeyError: 3", op="a.py:7", lane="sender", handled=True)
    waits = Signs(frames={"MainThread": SLEEPS}, cpu_moves=False, raised=lost)
    assert explained(ops, {0: Signs(), 1: waits}).kind == "done"
    ops.recv(0, 1, open=True)
    assert_verdict(
        explained(ops, {0: Signs(), 1: waits}),
        "exception",
        (1,),
        "rank 1 raised KeyError: 3 at a.py:7 in thread sender and handled it; it has not gone on since",
    )


def test_what_a_rank_that_has_ended_did_not_do_is_missing_at_once() -> None:
    ops = MadeOps(2)
    ops.message(0, 1)
    ops.recv(1, 0, open=True)
    signs = {0: DONE, 1: Signs()}
    assert explain_events(ops.events, signs, int(2.1e9), ops.groups).kind == "never sent"
    ops.events.pop()
    ops.add(1, "barrier", open=True)
    assert explain_events(ops.events, signs, int(3.1e9), ops.groups).kind == "never joined"


def test_a_link_has_its_time_from_when_the_later_end_came() -> None:
    ops = MadeOps(2)
    ops.send(0, 1, open=True, at=1.0)
    ops.recv(1, 0, open=True, at=3600.0)
    assert explain_events(ops.events, groups=ops.groups, now=int(3601e9)).kind == "moving"
    assert explain_events(ops.events, groups=ops.groups, now=int(3610e9)).kind == "stalled link"
