"""What a bisect says: the part with which an answer turns wrong, and each probe that led there."""

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, field, fields

from dinfer.display import Composed, Displayable, Table
from dinfer.model.kernels.token_graph import NO_TOKEN
from dinfer.saved.bisect.parts import PartName, RunPart
from dinfer.severity import Severity
from dinfer.tabular import TableRow, Tabular

REFERENCE = "reference"
"""what `against` says for transformers' own forward"""


@dataclass(frozen=True)
class BisectStep:
    """One re-run: `kept`: what of the run was kept as it was, all that follows being computed again; `agrees`: whether
    its answer was the other's; `token`: the new token there at which the two answers part, or the last that was
    compared; `logits_error`: the largest difference from the other's logits; `seconds`: how long it took."""

    kept: str
    agrees: bool
    token: int
    logits_error: float
    seconds: float


@dataclass(frozen=True)
class AnswerFigures:
    """An answer: its new `tokens`, the last of them NO_TOKEN where its logits are not finite, and their `text`, ""
    without a tokenizer; the `token` at which the two answers part, and how far its logits are from the other's."""

    tokens: tuple[int, ...]
    text: str
    token: int
    logits_error: float

    def __str__(self) -> str:
        chosen = [token for token in self.tokens if token != NO_TOKEN]
        ids = f"token{'s' * (len(chosen) != 1)} {', '.join(map(str, chosen))}" * bool(chosen)
        said = repr(self.text.strip()) if self.text else ids
        return ", then ".join(filter(None, [said, "NaN" * (len(chosen) < len(self.tokens))]))


@dataclass(frozen=True, repr=False, kw_only=True)
class Bisection(Tabular, Composed):
    """What `run.bisect` returns. `against`: the other's name; `what`: in what the answers were compared: "tokens",
    "logits" or "hidden"; `before`: the run's answer, `after`: its answer once the part is repaired, `wanted`: the
    other's.

    `parts`: the part with which the answer turns wrong; K and V of one block where both have to be replaced; empty
    where there is nothing to find. `alone`: whether its replacement is enough, with nothing computed again; `mended`:
    whether it is, if what follows is computed again; `also`: the next part that does not follow from those before it
    either, so that there are several causes. `differing`: how many of `compared` parts are not as the other's, of which
    `first` comes first. `steps`: the probes.
    """

    against: str
    what: str
    before: AnswerFigures
    after: AnswerFigures
    wanted: AnswerFigures
    parts: tuple[RunPart, ...] = ()
    alone: bool = False
    mended: bool = False
    also: RunPart | None = None
    first: RunPart | None = None
    differing: int
    compared: int
    steps: tuple[BisectStep, ...] = ()
    remarks: tuple[str, ...] = field(default=())

    @property
    def found(self) -> bool:
        """Whether there is a part with which the answer turns wrong."""
        return bool(self.parts)

    @property
    def layer(self) -> int | None:
        """The layer of the found part; None where there is none. So are the next three."""
        return self.parts[0].layer if self.parts else None

    @property
    def chunk(self) -> int | None:
        return self.parts[0].chunk if self.parts else None

    @property
    def rank(self) -> int | None:
        """The rank that holds it."""
        return self.parts[0].rank if self.parts else None

    @property
    def part(self) -> PartName | str | None:
        """ "K", "V", "hidden", or "K and V"."""
        return " and ".join(one.name for one in self.parts) or None

    @property
    def severity(self) -> Severity:
        return Severity.ERROR if self.parts else Severity.NOTE

    def table(self) -> Table:
        """The probes, one a row."""
        rows = [
            [
                n,
                one.kept,
                "yes" if one.agrees else "no",
                one.token,
                f"{one.logits_error:.3g}",
                f"{one.seconds:.2f}",
            ]
            for n, one in enumerate(self.steps, 1)
        ]
        return Table(["probe", "as it was", "agrees", "token", "logits error", "s"], rows)

    def _tabulated(self) -> tuple[Sequence[str], Iterable[TableRow]]:
        return [item.name for item in fields(BisectStep)], map(astuple, self.steps)

    def _parts(self) -> Sequence[str | Displayable]:
        return "\n".join([*self._found(), *self.remarks, self._cost()]), *[self.table()] * bool(self.steps)

    def _found(self) -> list[str]:
        if not self.parts:
            return [self._nothing()]
        place, what = place_text(self.parts), "hidden state" if self.parts[0].name == "hidden" else "block"
        whose = f"with the {'reference' if self.against == REFERENCE else 'other run'}'s {what}"
        if self.what == "tokens":
            head, agree = f"the answer turns wrong at {place}: it is {self.before}", f"it is {self.after}"
        else:
            off = f"off by {self.before.logits_error:.3g}, though the answer is {self.before}"
            head, agree = f"the {self.what_text} turn wrong at {place}: {off}", "they agree"
        again = "" if self.alone else ", and what follows computed again,"
        if self.alone or self.mended:
            lines = [f"{head}; {whose}{again} {agree}."]
        else:
            still = f"{self.after}, off by {self.after.logits_error:.3g}, and should be {self.wanted}"
            lines = [f"{head}. That block is not all of it: {whose}{again} the answer is {still}."]
        return [*lines, *self._other_causes()]

    def _other_causes(self) -> list[str]:
        last, also = self.parts[-1], self.also
        if also is None:
            return []
        if (also.chunk, also.layer, also.rank) == (last.chunk, last.layer + 1, last.rank):
            return [
                f"Layer {last.layer} of chunk {last.chunk} has passed on something else than follows, too: "
                f"{also} is not what comes of that. So it is the layer that computed wrongly."
            ]
        return [f"It is not the only cause: {also} does not follow from what was before it either."]

    def _nothing(self) -> str:
        head = f"the answers agree, with {self.against}: {self.wanted}"
        if not self.differing:
            return f"{head}. Nothing differs: all {self.compared} parts are the same bit for bit."
        return (
            f"{head}. {self.differing} of {self.compared} parts differ, first {self.first}, without changing "
            f"{'a token' if self.what == 'tokens' else f'the {self.what_text} by more than rounding'}."
        )

    @property
    def what_text(self) -> str:
        """What was compared, in words."""
        return "hidden states" if self.what == "hidden" else self.what

    def _cost(self) -> str:
        """How much was looked at."""
        seconds = sum(one.seconds for one in self.steps)
        return f"{self.differing} of {self.compared} parts differ; {len(self.steps)} re-runs, {seconds:.1f} s"


def place_text(parts: Sequence[RunPart]) -> str:
    """For example `K and V of block c1 l3 on rank 2`."""
    if len(parts) == 1:
        return str(parts[0])
    names = " and ".join(one.name for one in parts)
    return str(parts[0]).replace(f"{parts[0].name} of", f"{names} of", 1)
