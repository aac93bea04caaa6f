"""Evidence: all that a verdict is made of, as plain data, to be kept and judged again where no ranks are."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from dinfer.plan.ops import Value
from dinfer.plan.plan import Plan
from dinfer.verdict.explain import explain
from dinfer.verdict.signs import Came, Frame, Raised, Signs, Sizes
from dinfer.verdict.verdict import Verdict

SETS = ("empty", "full")
"""fields of Signs that are sets of (lane, index)"""


@dataclass(frozen=True)
class Evidence:
    """`signs` are by rank, `stacks` texts; `ahead_s` is `explain`'s; `told`: the sentence that was told of it."""

    signs: tuple[Signs, ...]
    sizes: Sizes
    stacks: Mapping[int, str]
    ahead_s: float = 0.0
    told: str = ""

    def judge(self, plan: Plan) -> Verdict:
        """The verdict that they give."""
        found = explain(plan, self.signs, self.sizes, self.stacks, ahead_s=self.ahead_s)
        return replace(found, sentence=self.told) if self.told else found

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them."""
        signs = [{**asdict(its), **{name: sorted(getattr(its, name)) for name in SETS}} for its in self.signs]
        plain: dict[str, Any] = json.loads(json.dumps({**asdict(self), "signs": signs}))
        return plain

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """From plain values. Raises KeyError, TypeError or ValueError where they are none of this."""
        stacks = {int(rank): text for rank, text in values["stacks"].items()}
        signs = tuple(map(_signs, values["signs"]))
        return cls(signs, Sizes(*values["sizes"]), stacks, values["ahead_s"], values["told"])


def _signs(values: Mapping[str, Any]) -> Signs:
    lists = {name: tuple(values[name]) for name in ("positions", "started", "limits", "still_s")}
    sets = {name: frozenset((lane, index) for lane, index in values.get(name, ())) for name in SETS}
    return Signs(
        **{
            **values,
            **lists,
            **sets,
            "raised": _raised(values["raised"]) if values["raised"] else None,
            "frames": {lane: Frame(*frame) for lane, frame in values["frames"].items()},
            "links": {int(source): seconds for source, seconds in values["links"].items()},
        }
    )


def _raised(values: Sequence[Any]) -> Raised:
    message, op, lane, secondary, came = values
    found = Came(Value(*came[0]), *came[1:]) if came else None
    return Raised(message, op, lane, secondary, found)
