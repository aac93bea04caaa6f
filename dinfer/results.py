"""Results of a run's actions: values with a text for consoles, and HTML that stays in a saved notebook."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from dinfer.display import Displayable, Tidy
from dinfer.errors import NoSuch
from dinfer.plan.breakpoints import Breakpoint
from dinfer.plan.cut import Cut
from dinfer.severity import Severity


@dataclass(frozen=True, repr=False)
class Moved(Tidy, Displayable):
    """The result of a step: the cuts `before` and `after`, and `lines`, one per rank, or one for all ranks if it only
    went back. `stopped`: a breakpoint or a pause ended it; `remark`: why it did not move, or stopped; `edited`: what
    the user has changed by hand."""

    before: Cut
    after: Cut
    stopped: bool
    lines: tuple[str, ...]
    remark: str = ""
    edited: tuple[str, ...] = ()

    @property
    def moved(self) -> bool:
        """Whether any rank moved."""
        return self.before != self.after

    def __str__(self) -> str:
        lines = [*self.lines] * self.moved + [self.remark] * bool(self.remark)
        return "\n".join([*lines, *[f"edited by hand: {', '.join(self.edited)}"] * bool(self.edited)])


STOPPED = {
    "end of text": ", and the text ends here",
    "positions": "; all positions of the model are used, so there can be no more",
    "user": "; paused before there were as many as asked for",
}
"""what is said of `Decoded.stopped`"""


@dataclass(frozen=True, repr=False)
class Decoded(Tidy, Displayable):
    """The new `tokens` of a call and their `text`. `stopped`: why there are no more: "end of text", "positions"
    (those of the model are used up), "max_new_tokens" (as many as were asked for) or "user" (paused); "" where no token
    was asked for. `count`: all new tokens so far; `remark`: why there are no tokens, or what was undone."""

    tokens: tuple[int, ...]
    text: str
    stopped: str
    count: int
    remark: str = ""

    @property
    def ended(self) -> bool:
        """Whether generation has ended: more tokens cannot be made."""
        return self.stopped in ("end of text", "positions")

    def __str__(self) -> str:
        if self.remark:
            return self.remark
        new = len(self.tokens)
        return f"{self.text}\n({new} new token{'s' * (new != 1)}, {self.count} in all{STOPPED.get(self.stopped, '')})"


def took_back(gone: int, left: int) -> Decoded:
    """The result of taking back that many new tokens."""
    if not gone:
        return Decoded((), "", "", left, "nothing to do: there are no new tokens")
    rest = f"; {left} {'is' if left == 1 else 'are'} left" * bool(left)
    return Decoded((), "", "", left, f"undid {gone} new token{'s' * (gone != 1)}{rest}")


@dataclass(frozen=True, repr=False)
class Where(Tidy, Displayable):
    """Where the ranks stand. `state`: the run's; `lines`: a line per rank, and further facts; `severity`: how grave
    these are."""

    state: str
    lines: str
    severity: Severity = Severity.NOTE

    def __str__(self) -> str:
        return f"{self.state}\n{self.lines}"


class Breakpoints(Tidy, Displayable, called="run.breakpoints"):
    """The breakpoints of a run, by number: `run.breakpoints[1]`. Changes take effect in the run.

    `changed(call, before)` is called after each, with the call that made it and the breakpoints before it; `hits`: how
    often each has stopped the run, by number."""

    def __init__(
        self,
        found: dict[int, Breakpoint],
        changed: Callable[[str, dict[int, Breakpoint]], None],
        hits: Mapping[int, int] | None = None,
    ) -> None:
        self._found, self._changed = found, changed
        self._hits = {} if hits is None else hits

    def __iter__(self) -> Iterator[Breakpoint]:
        return iter(list(self._found.values()))

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, number: int) -> Breakpoint:
        if number not in self._found:
            raise NoSuch(f"there is no breakpoint #{number}; there are{':' * bool(self)} {self}")
        return self._found[number]

    def remove(self, number: int) -> None:
        """Remove a breakpoint. Raises NoSuch, a KeyError."""
        one, before = self[number], dict(self._found)
        del self._found[one.number]
        self._changed(f"run.breakpoints.remove({number})", before)

    def disable(self, number: int) -> None:
        """Let a breakpoint stop nothing until it is enabled again. Raises NoSuch."""
        self._enable(number, enabled=False)

    def enable(self, number: int) -> None:
        """Let a breakpoint that was disabled stop the run again. Raises NoSuch."""
        self._enable(number, enabled=True)

    def hits(self, number: int) -> int:
        """How often a breakpoint has stopped the run. Raises NoSuch."""
        return self._hits.get(self[number].number, 0)

    def _enable(self, number: int, *, enabled: bool) -> None:
        one, before = self[number], dict(self._found)
        self._found[number] = replace(one, enabled=enabled)
        self._changed(f"run.breakpoints.{'enable' if enabled else 'disable'}({number})", before)

    def clear(self) -> None:
        """Remove all breakpoints."""
        before = dict(self._found)
        self._found.clear()
        self._changed("run.breakpoints.clear()", before)

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "no breakpoints: run.break_at(layer=7) sets one"
