"""What a prompt and a plan must be for an engine to take them, said before anything is given up or sent."""

from dinfer.config import Backend
from dinfer.engine.faults import Faults
from dinfer.engine.lanes import Execution, LaneExecutor
from dinfer.engine.streams import StreamIssuer
from dinfer.engine.threads import ThreadExecutor
from dinfer.model.decoder import Decoder
from dinfer.model.errors import ModelError
from dinfer.plan.lower import lower
from dinfer.plan.ops import PlanError
from dinfer.plan.partition import Shape
from dinfer.plan.plan import Plan
from dinfer.plan.verify import verify
from dinfer.transport.streams import StreamComm


def check_length(decoder: Decoder, tokens: int) -> None:
    """Raises ModelError for a prompt that is longer than the model's positions."""
    if tokens > decoder.max_positions:
        raise ModelError(
            f"the prompt has {tokens} tokens; this model has {decoder.max_positions} positions: shorten it."
        )


def check_plan(plan: Plan, own: Shape, *, unsafe: bool) -> None:
    """Raises PlanError for a plan of another shape than the engine's own, or one that verify refutes."""
    given = plan.shape
    if (given.layers, given.tokens, given.world_size) != (own.layers, own.tokens, own.world_size):
        raise PlanError(
            f"the plan is for {given.layers} layers, {given.tokens} tokens and {given.world_size} ranks; "
            f"here are {own.layers} layers, {own.tokens} tokens and {own.world_size} ranks."
        )
    verdict = verify(plan)
    if not verdict.proved and not unsafe:
        raise PlanError(f"{verdict}. Nothing was run; unsafe=True would run it all the same.")


def capacity(decoder: Decoder, tokens: int, new: int, faults: Faults | None = None) -> int:
    """Rows for a prompt of `tokens` and `new` tokens after it, as far as the model's positions go; and for those that
    faults add, which have no positions of their own."""
    rows = tokens + new * (2 if faults and faults.repeats else 1)
    return min(rows, decoder.max_positions) + (faults.room if faults else 0)


def as_issued(plan: Plan, backend: Backend) -> Plan:
    """The plan as the backend can run it: on NCCL, lowered."""
    return lower(plan) if backend == "nccl" and not plan.is_lowered else plan


def executor_for(backend: Backend, given: Execution) -> LaneExecutor:
    """What runs this rank's lanes: threads, or, on NCCL, one thread that issues to streams."""
    if backend != "nccl":
        return ThreadExecutor(given)
    assert isinstance(given.comm, StreamComm), "this transport takes no work to be run later"
    return StreamIssuer(given, given.comm.open_streams(given.state.decoder.device))
