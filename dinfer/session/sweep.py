"""Sweep: several prompts and parameters, one run after another, as a table."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from numbers import Integral
from typing import Any

from tqdm.auto import tqdm

from dinfer.display import Displayable, Table
from dinfer.job import Job
from dinfer.run.report import Reporting
from dinfer.run.run import Run
from dinfer.trace.summary import summary

SWEEP_FIGURES = (
    "tokens", "prefill_s", "compute_s", "exposed_sync_s", "waiting_s", "kv_equal", "text", "error",
)  # fmt: skip
"""columns, behind the prompt and the parameters"""


@dataclass(frozen=True, repr=False)
class Sweep(Displayable):
    """`rows` are one a run, each from column to value; `pandas.DataFrame(sweep.rows)` makes a DataFrame of it, and so
    does `sweep.dataframe()`. `left`: how many runs were not begun, since the kernel was interrupted."""

    rows: tuple[dict[str, Any], ...]
    left: int = 0

    def dataframe(self) -> Any:
        """The rows as a pandas DataFrame. Raises ImportError where there is no pandas."""
        import pandas

        return pandas.DataFrame(list(self.rows))

    def __str__(self) -> str:
        above, table = self._shown()
        return "\n".join(filter(None, [above, str(table), self._left_text()]))

    def _repr_html_(self) -> str:
        above, table = self._shown()
        shown = table._repr_html_() if len(table) else ""
        return f"<div>{escape(above)}</div>{shown}<div>{escape(self._left_text())}</div>"

    def _shown(self) -> tuple[str, Table]:
        """What stands above the table, and the table. A prompt that all runs share would only make it wider, and so
        would errors that there are not."""
        if not self.rows:
            return "no runs", Table((), ())
        is_one, failed = (
            len({row["prompt"] for row in self.rows}) == 1,
            any(row.get("error") for row in self.rows),
        )
        left_out = {name for name, is_out in (("prompt", is_one), ("error", not failed)) if is_out}
        names = [name for name in self.rows[0] if name not in left_out]
        table = Table(names, ([_cell(row[name]) for name in names] for row in self.rows))
        return f"prompt: {_cell(self.rows[0]['prompt'])}" if is_one else "", table

    def _left_text(self) -> str:
        return f"interrupted: {self.left} more runs were not begun" if self.left else ""


def sweep(
    prefill: Callable[..., Run],
    prompts: str | Sequence[str | Sequence[int]] | Sequence[int],
    parameters: Mapping[str, Any],
) -> Sweep:
    """Run every prompt with every combination of parameters, whose values are lists or single values. A run that cannot
    be, or fails, is a row that says why; the others go on as far as the session lets them."""
    names, prompts = list(parameters), _prompts(prompts)
    choices = [value if isinstance(value, list) else [value] for value in parameters.values()]
    combinations = list(itertools.product(prompts, *choices))
    rows = list[dict[str, Any]]()
    try:
        for prompt, *values in tqdm(combinations, desc="runs", unit="run"):
            rows.append(_row(prefill, prompt, dict(zip(names, values, strict=True))))
    except KeyboardInterrupt:  # what has been measured is not lost
        pass
    return Sweep(tuple(rows), len(combinations) - len(rows))


def _prompts(given: str | Sequence[str | Sequence[int]] | Sequence[int]) -> Sequence[str | Sequence[int]]:
    """Text, or the token ids of one prompt, are one prompt."""
    if isinstance(given, str):
        return [given]
    several = list[Any](given)
    return [several] if several and all(isinstance(one, Integral) for one in several) else several


def _row(prefill: Callable[..., Run], prompt: str | Sequence[int], chosen: dict[str, Any]) -> dict[str, Any]:
    name = f"{len(prompt)} token ids" if isinstance(prompt, (list, tuple)) else str(prompt)
    try:
        run = prefill(prompt, **chosen)
        figures = _figures(run, run.decode().text)
    except (RuntimeError, ValueError, TimeoutError) as error:
        figures = dict.fromkeys(SWEEP_FIGURES) | {"error": str(error).partition("\n")[0]}
    return {"prompt": name, **chosen, **figures}


def _figures(run: Run, text: str) -> dict[str, Any]:
    figures = [run.trace.rank_figures(rank) for rank in range(run.world_size)]
    return {
        "tokens": len(run.job.ids),
        "prefill_s": max(figure.prefill_s for figure in figures),
        "compute_s": max(figure.compute_s for figure in figures),
        "exposed_sync_s": max(figure.exposed_sync_s for figure in figures),
        "waiting_s": max(figure.waiting_s for figure in figures),
        "kv_equal": len(set(run.sha256())) == 1,
        "text": text,
        "error": "",
    }


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    text = f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())
    return text if len(text) <= 40 else f"{text[:39]}…"


class Past:
    """Of one session."""

    def __init__(self) -> None:
        self._found: list[tuple[Job, dict[str, Any]]] = []

    def note(self, run: Reporting) -> None:
        """Keep the figures of a run that has ended its prefill with nothing wrong."""
        if run.standing().state == "done" and not run.edited:
            name = f"run {len(self._found) + 1} of this session"
            self._found.append((run.job, {"name": name, **summary(run.trace)}))

    def of(self, job: Job) -> list[dict[str, Any]]:
        """Those of the same prompt and checkpoint, in the order in which they ran."""
        wanted = job.ids, job.config.model_path
        return [figures for past, figures in self._found if (past.ids, past.config.model_path) == wanted]
