"""Sweep: every prompt with every combination of parameters, one run after another, as a table."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from dinfer.display import Composed, Displayable, Plot, Table, Tidy, plotted
from dinfer.errors import NotPossible
from dinfer.progress import progress_bar
from dinfer.run.run import Run
from dinfer.tabular import TableRow, Tabular
from dinfer.trace.shares import ABOUT_PARTS, percentages, shares

ABOUT = {
    "tokens": "tokens of the prompt",
    "prefill_s": "seconds of prefill, from the first op on any rank to the last",
    **ABOUT_PARTS,
    "kv_equal": "whether all ranks hold the same KV of the prompt",
    "text": "the new text",
    "error": "why this run was refused or failed",
}
"""columns, after the prompt and the parameters, and what they mean"""

SWEEP_FIGURES = tuple(ABOUT)

LARGEST = ("compute_s", "exposed_sync_s", "waiting_s")
"""of rows, but not shown: the largest of any rank, as `RankFigures` defines them; they overlap and do not add up"""


ADD_UP = (
    "compute + exposed_wire + exposed_wait + bubble = 100 % of the time that all ranks spent in prefill. Exposed: a "
    "rank computed nothing while data was on the wire, or lay ready for a peer; bubble: it had nothing to do yet."
)


@dataclass(frozen=True, repr=False)
class Sweep(Tidy, Tabular, Composed):
    """What `session.sweep` returns: a table of runs. `rows`: one for each run, from column to value; `left`: number of
    runs that did not begin because the kernel was interrupted.

    `prefill_s` is the time of prefill. `compute`, `exposed_wire`, `exposed_wait` and `bubble` are what the time of all
    ranks went into, as shares that add up to 1; a notebook says what each is when the mouse
    is over its name. Rows also have `compute_s`, `exposed_sync_s` and `waiting_s`: the largest of any rank, as
    `run.trace.rank_figures(rank)` has them; these overlap.
    """

    rows: tuple[dict[str, Any], ...]
    left: int = 0

    def dataframe(self) -> Any:
        """See `to_frame`, which every table has."""
        return self.to_frame()

    def _tabulated(self) -> tuple[Sequence[str], Iterable[TableRow]]:
        columns = list(self.rows[0]) if self.rows else ["prompt", *SWEEP_FIGURES, *LARGEST]
        return columns, ([row[name] for name in columns] for row in self.rows)

    def plot(self) -> Plot:
        """A bar for each run, as long as its prefill took, divided by what that time went into. Raises NotPossible
        where no run has ended."""
        ended = [row for row in self.rows if row["prefill_s"] is not None]
        if not ended:
            raise NotPossible("no run of this sweep has ended, so there is nothing to draw; .rows say why.")
        names = list(self.rows[0])
        given = [
            name for name in names[: names.index("tokens")] if len({str(row[name]) for row in ended}) > 1
        ]
        labels = [", ".join(_cell(row[name]) for name in given) for row in ended]
        if len(set(labels)) < len(labels):
            labels = [f"{number}: {label or 'run'}" for number, label in enumerate(labels, 1)]
        parts = [{part: row[part] for part in ABOUT_PARTS} for row in ended]
        seconds = [row["prefill_s"] for row in ended]
        return plotted("sweep", list(zip(labels, seconds, parts, strict=True)))

    def _parts(self) -> Iterable[str | Displayable]:
        above, table, below = self._shown()
        yield above
        if len(table):
            yield table
        yield below

    def _shown(self) -> tuple[str, Table, str]:
        """The table, and what stands above and below it. A prompt that all runs share would only make it wider, and so
        would errors that there are not."""
        below = f"interrupted: {self.left} more runs were not begun" if self.left else ""
        if not self.rows:
            return "no runs", Table((), ()), below
        is_one = len({row["prompt"] for row in self.rows}) == 1
        left_out = ["prompt"] * is_one + ["error"] * (not any(row.get("error") for row in self.rows))
        names = [name for name in self.rows[0] if name not in (*left_out, *LARGEST)]
        lines = ({**row, **_percentages(row)} for row in self.rows)
        table = Table(names, ([_cell(row[name]) for name in names] for row in lines), about=ABOUT)
        if "compute" in names:
            below = "\n".join(filter(None, (ADD_UP, below)))
        return f"prompt: {_cell(self.rows[0]['prompt'])}" if is_one else "", table, below


def sweep(
    prefill: Callable[..., Run],
    prompts: str | Sequence[str | Sequence[int]] | Sequence[int],
    parameters: Mapping[str, Any],
) -> Sweep:
    """Run every prompt with every combination of parameters, whose values are lists or single values. A run that is
    refused, or fails, is a row with the reason; the other runs go on if the session can."""
    asked = [prompts] if isinstance(prompts, str) else list[Any](prompts)
    if asked and all(isinstance(one, Integral) for one in asked):
        asked = [asked]  # the token ids of one prompt
    choices = [value if isinstance(value, list) else [value] for value in parameters.values()]
    combinations = list(itertools.product(asked, *choices))
    rows = list[dict[str, Any]]()
    with suppress(KeyboardInterrupt):  # keep what was measured
        for prompt, *values in progress_bar(combinations, desc="runs", unit="run"):
            rows.append(_row(prefill, prompt, dict(zip(parameters, values, strict=True))))
    return Sweep(tuple(rows), len(combinations) - len(rows))


def _row(prefill: Callable[..., Run], prompt: str | Sequence[int], chosen: dict[str, Any]) -> dict[str, Any]:
    name = f"{len(prompt)} token ids" if isinstance(prompt, (list, tuple)) else str(prompt)
    try:
        run = prefill(prompt, **chosen)
        text = run.decode().text
        trace = run.trace
        by_rank = [trace.rank_figures(rank) for rank in range(run.world_size)]
        figures = {
            "tokens": len(run.job.ids),
            "prefill_s": max(its.prefill_s for its in by_rank),
            **shares(trace).parts,
            "kv_equal": len(set(run.sha256())) == 1,
            "text": text,
            "error": "",
            **{time: max(getattr(its, time) for its in by_rank) for time in LARGEST},
        }
    except (RuntimeError, ValueError, TimeoutError) as error:
        figures = dict.fromkeys((*SWEEP_FIGURES, *LARGEST)) | {"error": str(error).partition("\n")[0]}
    return {"prompt": name, **chosen, **figures}


def _percentages(row: Mapping[str, Any]) -> dict[str, str]:
    """The shares of a run as text."""
    if row.get("compute") is None:
        return {}
    return dict(zip(ABOUT_PARTS, percentages([row[part] for part in ABOUT_PARTS]), strict=True))


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    text = f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())
    return text if len(text) <= 40 else f"{text[:39]}…"
