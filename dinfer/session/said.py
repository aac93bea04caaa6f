"""What actions return: values with a text for consoles and an HTML form that survives a notebook without its kernel."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from dinfer.engine.hosting.debugger import FIRST_PORT
from dinfer.errors import NoSuch, ipython
from dinfer.plan.breakpoints import Breakpoint
from dinfer.plan.cut import Cut
from dinfer.verdict.words import html_text

SHOWN = 3


def listed(sentences: Sequence[str]) -> str:
    """The first few of them, and how many more there are."""
    more = [f"and {len(sentences) - SHOWN} more"] * (len(sentences) > SHOWN)
    return "; ".join([*sentences[:SHOWN], *more])


class Said:
    """Something with a text, which is its HTML form too."""

    def __str__(self) -> str:
        raise NotImplementedError

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return html_text(str(self))


class SaidText(str, Said):
    """A text that is shown as it is, without quotation marks."""

    __slots__ = ()
    __str__, __repr__ = str.__str__, str.__str__


class Announced(Said):
    """Something that says what it is as soon as it is made, and is not shown a second time under the same cell."""

    _announced: tuple[int | None, str] | None = None

    def announce(self) -> None:
        """Print its text."""
        print(self)
        self._announced = _cell(), str(self)

    def _ipython_display_(self) -> None:
        """Called by IPython to show it; NotImplementedError has it shown as everything else."""
        if self._announced != (_cell(), str(self)):
            raise NotImplementedError


def _cell() -> int | None:
    """The number of the cell that runs, if this is IPython."""
    shell = ipython()
    return shell.execution_count if shell else None


def moved_text(lines: Sequence[str], remark: str, edited: Sequence[str]) -> str:
    """What a call that moves says: what was done, why it ended, and what the user had changed."""
    found = [*lines, *[remark] * bool(remark)]
    return "\n".join([*found, *[f"edited by hand: {', '.join(edited)}"] * bool(edited)])


@dataclass(frozen=True, repr=False)
class Moved(Said):
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
class Decoded(Said):
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
class Where(Said):
    """Where the ranks stand. `state` is the run's, `lines` a line a rank and what else is to be said."""

    state: str
    lines: str

    def __str__(self) -> str:
        return f"{self.state}\n{self.lines}"


@dataclass(frozen=True, repr=False)
class Listening(Said):
    """A rank that a client of debugpy may attach to, at this port of its host's 127.0.0.1."""

    rank: int
    host: str
    port: int

    def __str__(self) -> str:
        return (
            f"rank {self.rank} listens for a debugger at 127.0.0.1:{self.port} on {self.host}: attach from VS Code "
            f'("Attach to rank {self.rank}" of .vscode/launch.json has port {FIRST_PORT + self.rank}) or any client of '
            "debugpy. While it stands at a breakpoint, the other ranks wait at a cut."
        )


class Breakpoints(Said):
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
