"""Sweep: every prompt with every combination of parameters, one run after another, as a table."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from numbers import Integral
from typing import Any

from dinfer.display import Displayable, Table
from dinfer.run.run import Run
from dinfer.session.progress import progress_bar

SWEEP_FIGURES = (
    "tokens", "prefill_s", "compute_s", "exposed_sync_s", "waiting_s", "kv_equal", "text", "error",
)  # fmt: skip
"""columns, after the prompt and the parameters"""


@dataclass(frozen=True, repr=False)
class Sweep(Displayable):
    """`rows`: one for each run, from column to value. `left`: number of runs that did not begin because the kernel was
    interrupted."""

    rows: tuple[dict[str, Any], ...]
    left: int = 0

    def dataframe(self) -> Any:
        """The rows as a pandas DataFrame. Raises ImportError if pandas is not installed."""
        import pandas

        return pandas.DataFrame(list(self.rows))

    def __str__(self) -> str:
        above, table, below = self._shown()
        return "\n".join(filter(None, [above, str(table), below]))

    def _repr_html_(self) -> str:
        above, table, below = self._shown()
        shown = table._repr_html_() if len(table) else ""
        return f"<div>{escape(above)}</div>{shown}<div>{escape(below)}</div>"

    def _shown(self) -> tuple[str, Table, str]:
        """The table, and what stands above and below it. A prompt that all runs share would only make it wider, and so
        would errors that there are not."""
        below = f"interrupted: {self.left} more runs were not begun" if self.left else ""
        if not self.rows:
            return "no runs", Table((), ()), below
        is_one = len({row["prompt"] for row in self.rows}) == 1
        left_out = ["prompt"] * is_one + ["error"] * (not any(row.get("error") for row in self.rows))
        names = [name for name in self.rows[0] if name not in left_out]
        table = Table(names, ([_cell(row[name]) for name in names] for row in self.rows))
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
        by_rank = [run.trace.rank_figures(rank) for rank in range(run.world_size)]
        times = ("prefill_s", "compute_s", "exposed_sync_s", "waiting_s")
        figures = {
            "tokens": len(run.job.ids),
            **{time: max(getattr(its, time) for its in by_rank) for time in times},
            "kv_equal": len(set(run.sha256())) == 1,
            "text": text,
            "error": "",
        }
    except (RuntimeError, ValueError, TimeoutError) as error:
        figures = dict.fromkeys(SWEEP_FIGURES) | {"error": str(error).partition("\n")[0]}
    return {"prompt": name, **chosen, **figures}


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    text = f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())
    return text if len(text) <= 40 else f"{text[:39]}…"
