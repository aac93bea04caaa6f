"""Custom schedules: turns what a user's function returns into a plan, or an error that names the place."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dinfer.config import Config
from dinfer.errors import excerpt
from dinfer.plan.ops import Op, PlanError, parse_op
from dinfer.plan.partition import Shape, check_same_prefill
from dinfer.plan.plan import Lane, Plan, parse_plan

CustomSchedule = Callable[[Config, Shape], Any]
"""Called with the run's config and shape. Returns a Plan, a plan's text, or a list with a dict for each rank, from lane
names to lists of ops; an op may be text: `[{"main": ["embed c0", "layer c0 l0", …]}, …]`."""


def custom_plan(given: "Plan | str | CustomSchedule", config: Config, shape: Shape) -> Plan:
    """The user's plan for a run of this shape. Raises PlanError, and whatever a user's function raises.

    It may still hang or lack ops: `verify` finds that.
    """
    name = getattr(given, "__name__", "own")
    made = given(config, shape) if callable(given) else given
    if isinstance(made, str):
        made = parse_plan(made)
    if not isinstance(made, Plan):
        source = f"{name}(…)" if callable(given) else "plan"
        if not isinstance(made, Sequence) or not all(isinstance(rank, Mapping) for rank in made):
            raise PlanError(
                f"{source} returned {excerpt(made)}; it must return a Plan, a plan's text, or a list with a dict for "
                'each rank, such as {"main": ["embed c0", "layer c0 l0"]}.'
            )
        if len(made) != shape.world_size:
            raise PlanError(f"{source} has lanes for {len(made)} ranks; this run has {shape.world_size}.")
        lanes = tuple(tuple(_lane(rank, *lane) for lane in lanes.items()) for rank, lanes in enumerate(made))
        made = Plan(shape, name if name.isidentifier() else "own", config.sync_strategy, lanes)
    check_same_prefill(made.shape, shape)
    return made


def _lane(rank: int, name: Any, ops: Any) -> Lane:
    where = f"rank {rank}, lane {name!r}"
    if not isinstance(name, str) or not name or "#" in name or name.split() != [name]:
        raise PlanError(f"{where}: a lane's name must be one word, without #.")
    if isinstance(ops, str) or not isinstance(ops, Sequence):
        raise PlanError(f"{where}: its ops are {excerpt(ops)}; they must be a list.")
    found = list[Op]()
    for number, op in enumerate(ops):
        if not isinstance(op, Op | str):
            raise PlanError(
                f"{where}, op {number} is {excerpt(op)}; it must be an Op or its text, such as 'layer c0 l3'."
            )
        try:
            found.append(op if isinstance(op, Op) else parse_op(op))
        except PlanError as error:
            raise PlanError(f"{where}, op {number}: {error}") from None
    return Lane(name, tuple(found))
