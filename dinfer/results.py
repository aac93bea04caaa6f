"""What actions return: values with a text for consoles and an HTML form that survives a notebook without its kernel."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from dinfer.display import Displayable
from dinfer.errors import NoSuch
from dinfer.plan.breakpoints import Breakpoint
from dinfer.plan.cut import Cut


def moved_text(lines: Sequence[str], remark: str, edited: Sequence[str]) -> str:
    """What a call that moves says: what was done, why it ended, and what the user had changed."""
    found = [*lines, *[remark] * bool(remark)]
    return "\n".join([*found, *[f"edited by hand: {', '.join(edited)}"] * bool(edited)])


@dataclass(frozen=True, repr=False)
class Moved(Displayable):
    """What a step did: the cuts before and after, and a line a rank. `stopped`: a breakpoint or a pause ended it."""

    before: Cut
    after: Cut
    stopped: bool
    lines: tuple[str, ...]
    remark: str = ""
    edited: tuple[str, ...] = ()

    @property
    def moved(self) -> bool:
        return self.before != self.after

    def __str__(self) -> str:
        return moved_text(self.lines if self.moved else (), self.remark, self.edited)


@dataclass(frozen=True, repr=False)
class Decoded(Displayable):
    """New tokens of one call and their text; `count`: all new tokens so far; `ended`: the text ends here; `remark`: why
    there are none."""

    tokens: tuple[int, ...]
    text: str
    ended: bool
    count: int
    remark: str = ""

    def __str__(self) -> str:
        if self.remark:
            return self.remark
        end = ", and the text ends here" if self.ended else ""
        return f"{self.text}\n({len(self.tokens)} new tokens, {self.count} in all{end})"


@dataclass(frozen=True, repr=False)
class Where(Displayable):
    """Where the ranks stand. `state` is the run's, `lines` a line a rank and what else is to be said."""

    state: str
    lines: str

    def __str__(self) -> str:
        return f"{self.state}\n{self.lines}"


class Breakpoints(Displayable):
    """The breakpoints of a run, by number; a view: what changes here changes there."""

    def __init__(self, found: dict[int, Breakpoint], changed: Callable[[], None]) -> None:
        self._found, self._changed = found, changed

    def __iter__(self) -> Iterator[Breakpoint]:
        return iter(list(self._found.values()))

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, number: int) -> Breakpoint:
        if number not in self._found:
            raise NoSuch(f"there is no breakpoint #{number}; there are: {self}")
        return self._found[number]

    def remove(self, number: int) -> None:
        """End one. Raises KeyError."""
        del self._found[self[number].number]
        self._changed()

    def clear(self) -> None:
        """End all."""
        self._found.clear()
        self._changed()

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "no breakpoints: run.break_at(layer=7) sets one"
