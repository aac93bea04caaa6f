"""The text that says which rank a rank waits for."""

from dinfer.engine.board import Stand
from dinfer.engine.by_hand import blocked_on_text
from dinfer.plan.partition import partition
from dinfer.plan.plan import Plan
from dinfer.plan.schedule import build
from dinfer.verdict.where import at_text

SHAPE = partition(layers=4, tokens=8, world_size=2, chunk_size=4)


def stood(plan: Plan, rank: int, *, done: int, started: bool, limit: int) -> Stand:
    """One lane that has done so many ops; lockstep plans have no other."""
    assert len(plan.lanes[rank]) == 1
    return Stand((done,), (started,), (limit,))


def test_a_rank_that_stepped_alone_names_what_it_waits_for_and_where_the_other_stands() -> None:
    plan = build(SHAPE, "lockstep", "pairwise")
    ops = plan.lanes[1][0].ops
    at = next(n for n, op in enumerate(ops) if op.what == "hidden" and op.kind == "recv")
    zero = plan.lanes[0][0].ops
    before = 1 + next(n for n, op in enumerate(zero) if (op.kind, op.layer) == ("layer", 1))
    stands = [
        stood(plan, 0, done=before, started=False, limit=before),
        stood(plan, 1, done=at, started=True, limit=at + 1),
    ]
    assert blocked_on_text(plan, 1, stands) == (
        "rank 1 waits for hidden c0 before layer 2 from rank 0, which stands at c0 l1"
    )
    assert blocked_on_text(plan, 0, stands) == "rank 0 stands at c0 l1"


def test_a_sender_waits_for_its_block_to_be_taken() -> None:
    plan = build(SHAPE, "lockstep", "pairwise")
    at = next(n for n, op in enumerate(plan.lanes[0][0].ops) if op.kind == "send")
    stands = [stood(plan, 0, done=at, started=True, limit=at + 1), None]
    assert blocked_on_text(plan, 0, stands) == (
        "rank 0 waits for rank 1 to take block c0 l0, which stands somewhere unknown"
    )
    assert blocked_on_text(plan, 1, stands) == "rank 1: position unknown"


def test_a_rank_at_work_is_in_its_op() -> None:
    plan = build(SHAPE, "lockstep", "pairwise")
    stands = [stood(plan, 0, done=1, started=True, limit=3), None]
    assert blocked_on_text(plan, 0, stands) == "rank 0 is in `layer c0 l0`"
    assert at_text(plan.lanes[0], (1,)) == "before its first layer"
