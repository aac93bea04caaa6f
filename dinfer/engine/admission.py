"""What a prompt and a plan must be for an engine to take them, said before anything is given up or sent."""

from dinfer.model.decoder import Decoder
from dinfer.model.errors import ModelError
from dinfer.plan.ops import PlanError
from dinfer.plan.partition import Shape
from dinfer.plan.plan import Plan
from dinfer.plan.verify import verify


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
