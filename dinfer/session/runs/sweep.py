"""Sweep: several prompts and parameters, one run after another, as a table."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from tqdm.auto import tqdm

from dinfer.session.runs.run import Run
from dinfer.session.said import Said


@dataclass(frozen=True, repr=False)
class Sweep(Said):
    """`rows` are one a run, each from column to value; `pandas.DataFrame(sweep.rows)` makes a DataFrame of it, and so
    does `sweep.dataframe()`."""

    rows: tuple[dict[str, Any], ...]

    def dataframe(self) -> Any:
        """The rows as a pandas DataFrame. Raises ImportError where there is no pandas."""
        import pandas

        return pandas.DataFrame(list(self.rows))

    def __str__(self) -> str:
        if not self.rows:
            return "no runs"
        above, cells = self._shown()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
        return "\n".join([above, *lines] if above else lines)

    def _repr_html_(self) -> str:
        def line(tag: str, values: Sequence[str]) -> str:
            return f"<tr>{''.join(f'<{tag}>{escape(value)}</{tag}>' for value in values)}</tr>"

        if not self.rows:
            return "no runs"
        above, (head, *body) = self._shown()
        table = "".join(line("td", row) for row in body)
        return f"<div>{escape(above)}</div><table>{line('th', head)}{table}</table>"

    def _shown(self) -> tuple[str, list[list[str]]]:
        """What stands above the table, and its lines: a prompt that all runs share would only make it wider."""
        is_one = len({row["prompt"] for row in self.rows}) == 1
        names = [name for name in self.rows[0] if name != "prompt" or not is_one]
        cells = [names, *([_cell(row[name]) for name in names] for row in self.rows)]
        return f"prompt: {_cell(self.rows[0]['prompt'])}" if is_one else "", cells


def sweep(
    prefill: Callable[..., Run], prompts: Sequence[str | Sequence[int]], parameters: Mapping[str, Any]
) -> Sweep:
    """Run every prompt with every combination of parameters, whose values are lists or single values."""
    names = list(parameters)
    choices = [value if isinstance(value, list) else [value] for value in parameters.values()]
    combinations = list(itertools.product(prompts, *choices))
    rows = []
    for prompt, *values in tqdm(combinations, desc="runs", unit="run"):
        chosen = dict(zip(names, values, strict=True))
        run = prefill(prompt, **chosen)
        decoded = run.decode()
        rows.append(_row(prompt, chosen, run, decoded.text))
    return Sweep(tuple(rows))


def _row(prompt: str | Sequence[int], chosen: Mapping[str, Any], run: Run, text: str) -> dict[str, Any]:
    figures = [run.trace.rank_figures(rank) for rank in range(run.world_size)]
    return {
        "prompt": prompt if isinstance(prompt, str) else f"{len(prompt)} token ids",
        **chosen,
        "tokens": len(run.job.ids),
        "prefill_s": max(figure.prefill_s for figure in figures),
        "compute_s": max(figure.compute_s for figure in figures),
        "exposed_sync_s": max(figure.exposed_sync_s for figure in figures),
        "waiting_s": max(figure.waiting_s for figure in figures),
        "kv_equal": len(set(run.sha256())) == 1,
        "text": text,
    }


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())
    return text if len(text) <= 40 else f"{text[:39]}…"
