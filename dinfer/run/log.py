"""Log: the calls that were made on a run, in their order, and a cell or a notebook that makes them again.

Where a call stopped depends on when somebody paused it, or on which rank met a condition first; such a call is replaced
by `run.go_to(…)`, with the cut at which the run then stood.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dinfer.display import Displayable, Tidy
from dinfer.errors import NotPossible, excerpt
from dinfer.files import WrittenFiles, WrittenPath, check_folder
from dinfer.plan.cut import Cut
from dinfer.trace.export import write_whole

MOST = 10_000
"""how many calls are kept"""

SHOWN = 40
"""how many a cell shows"""

PAUSE, RECOVERY, AGAIN = "run.pause()", "session.recover()", "run.restart()"

OTHER_RUN = "session.runs["
"""in calls that take another run of the session, which the session of a cell has not"""

OTHER_NEEDED = "the other run is needed for it, and is not made here"

GOING = ("run.resume(", "run.play(")
"""calls that return while the run still moves"""

RAISES = "raises-exception"
"""the tag of a notebook's cell that may raise without ending the notebook"""


@dataclass
class LoggedCall:
    """One call. `before`, `after`: the cut at which the run stood when it began and ended, None if it moved; `start`,
    `target`: where its move began, and where it was to go; `cut_short`: whether a pause, in decode, or an
    interrupt ended it, and `tokens`: how many new tokens it had made then; `undid`: the call that it was to undo;
    `error`: why it was refused; `broke`: whether that was a failure of the run."""

    number: int
    at: str
    text: str
    before: Cut | None = None
    after: Cut | None = None
    start: Cut | None = None
    target: Cut | None = None
    cut_short: bool = False
    tokens: int | None = None
    undid: str = ""
    error: str = ""
    broke: bool = False

    def __str__(self) -> str:
        return f"{self.at}  {self.text}" + f"  # {self.error}" * bool(self.error)


class Replayed(NamedTuple):
    """A cell of the notebook; `may_raise`: the run failed there."""

    text: str
    may_raise: bool = False


class CallLog(Tidy, Displayable, called="run.calls"):
    """The calls made on a run from cells, magics and panels, in their order. Looks that no panel has asked for, such as
    `run.kv()`, are not among them.

    `cell()` is one cell that makes the run and all its calls again, `save("replay.ipynb")` a notebook with a cell for
    each. Both begin with connect, load and prefill with this run's parameters, and hold its prompt.
    """

    INTERNAL = frozenset({"add", "lines", "listeners", "opening", "standing"})

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: list[LoggedCall] = []
        self._count = 0
        self._written = WrittenFiles()
        self.opening: Callable[[], Sequence[str]] = tuple
        """the cells that make the run; set by the session, as the next is by the run"""
        self.standing: Callable[[], Cut | None] = lambda: None
        """the cut at which the run stands now; None if it moves"""

    def add(self, text: str) -> LoggedCall:
        """A call begins."""
        with self._lock:
            self._count += 1
            made = LoggedCall(self._count, time.strftime("%H:%M:%S"), text, before=self.standing())
            self._calls.append(made)
            del self._calls[:-MOST]
        return made

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[str]:
        """The calls as text, those that were refused, too."""
        return iter([one.text for one in self._copy()])

    def __str__(self) -> str:
        calls = self._copy()
        more = [f"… {self._count - SHOWN} earlier calls: .cell() has all"] * (self._count > SHOWN)
        return "\n".join([*more, *map(str, calls[-SHOWN:])]) or "no calls yet"

    def lines(self, last: int) -> list[dict[str, Any]]:
        """The last calls, for views."""
        return [
            {"number": one.number, "at": one.at, "call": one.text, "error": one.error}
            for one in self._copy()[-last:]
        ]

    def cell(self) -> str:
        """One cell that makes the run and all calls again. Raises NotPossible where the first of them are not known any
        more."""
        return "\n".join([*self._opening(), *(one.text for one in self._cells())]) + "\n"

    def save(self, path: str | Path = "replay.ipynb") -> Path:
        """Write a notebook that makes the run and all calls again; the file's path. It holds the prompt. A file that
        this run has not written is kept, and the new one gets a number. Raises OSError, and NotPossible as `cell`."""
        target = Path(path).expanduser()
        if target.suffix != ".ipynb":
            raise NotPossible(f"path is {excerpt(str(path))}; it must end in .ipynb: it is a notebook.")
        check_folder(target)
        about = "# A run of dinfer, again\n\nRun all cells: the run ends where that one stood."
        cells = [{**_cell("markdown", about), "id": "about"}]
        opening = self._opening()
        parts = [
            Replayed("\n".join(opening[:-1])),
            Replayed(opening[-1]),
            *self._cells(),
            Replayed("run.where()"),
        ]
        for number, part in enumerate(parts):
            tags = {"tags": [RAISES]} if part.may_raise else {}
            code: dict[str, Any] = {"execution_count": None, "outputs": [], "metadata": tags}
            cells.append({**_cell("code", part.text), **code, "id": f"call-{number}"})
        kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
        book = {"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": kernel}, "cells": cells}
        made = self._written.place_for(target)
        write_whole(made, [json.dumps(book, ensure_ascii=False, indent=1) + "\n"])
        self._written.add(target, made)
        return WrittenPath(made)

    # -- within

    def _copy(self) -> list[LoggedCall]:
        with self._lock:
            return list(self._calls)

    def _opening(self) -> Sequence[str]:
        opening = self.opening()
        if not opening:
            raise NotPossible("how this run was made is not known: it was not made by session.prefill(…).")
        if self._count > MOST:
            raise NotPossible(f"this run has {self._count:,} calls, and only the last {MOST:,} are known.")
        return opening

    def _cells(self) -> list[Replayed]:
        calls, found = self._copy(), list[Replayed]()
        for number, one in enumerate(calls):
            found += _again(one, self._final(calls[number + 1 :]))
        return found

    def _final(self, later: Sequence[LoggedCall]) -> Cut | None:
        """Where the call before these left the run; None if that is not known."""
        for one in later:
            if one.text in (RECOVERY, AGAIN):
                return one.before  # None: it had failed, and what follows is not where it stopped
            if found := one.start or one.before or (one.after if one.text == PAUSE else None):
                return found
        return self.standing()


def _again(one: LoggedCall, final: Cut | None) -> Iterator[Replayed]:
    """What makes a call again, given where the run was after it."""
    text, is_going = one.text, one.text.startswith(GOING)
    if text == PAUSE:
        return  # the call that it stopped has become run.go_to(…)
    if OTHER_RUN in text or OTHER_RUN in one.undid:
        yield Replayed(f"# {text}  was left out: {f'it undid {one.undid}' if one.undid else OTHER_NEEDED}")
        return
    if one.error and not one.broke and one.after == (one.start or one.after):
        yield Replayed(f"# {text}  was refused: {one.error}")
        return
    if one.tokens:
        verb = "run.decode(max_new_tokens={})" if "decode" in text else 'run.step("token", {})'
        yield Replayed(f"{verb.format(one.tokens)}  # {text}, which was stopped")
        return
    stopped = final if is_going else one.after
    if stopped is not None and (one.tokens == 0 or one.target not in (None, stopped)):
        yield Replayed(f"run.go_to({_written(stopped)})  # {text}, which stopped there")
        return
    failed = one.broke or (is_going and stopped is None)  # it has not been seen to stand since
    yield Replayed(f"{text}\nrun.wait()" if is_going else text, failed)


def _written(cut: Cut) -> str:
    return repr([list(lanes) for lanes in cut])


def _cell(kind: str, text: str) -> dict[str, Any]:
    return {"cell_type": kind, "metadata": {}, "source": text.splitlines(keepends=True)}
