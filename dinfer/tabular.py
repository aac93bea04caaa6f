"""Tabular: what users hold that is a table or a figure, as a DataFrame or as CSV."""

import csv
import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dinfer.arguments import check_calls
from dinfer.errors import NotPossible
from dinfer.files import WrittenPath, make_folder

TableRow = Sequence[Any]
"""of one row: numbers, texts, None where there is nothing"""


class Tabular(ABC):
    """An object with columns and rows. Numbers keep all their digits, also where a cell shows fewer."""

    @abstractmethod
    def _tabulated(self) -> tuple[Sequence[str], Iterable[TableRow]]:
        """The names of the columns, and the rows."""

    def to_frame(self) -> Any:
        """All of it as a pandas DataFrame. Raises NotPossible where pandas is missing."""
        try:
            import pandas
        except ModuleNotFoundError:
            raise NotPossible(
                "a DataFrame needs the package pandas, which is missing here: pip install pandas. `.to_csv()` does not."
            ) from None
        columns, rows = self._tabulated()
        return pandas.DataFrame([list(row) for row in rows], columns=list(columns))

    def to_csv(self, path: str | Path | None = None) -> "str | Path":
        """All of it as CSV (RFC 4180, UTF-8): the text or, given a path, the path of the file, which is replaced. What
        there is not is an empty field. Raises OSError."""
        columns, rows = self._tabulated()
        if path is None:
            text = io.StringIO(newline="")
            _write(text, columns, rows)
            return text.getvalue()
        target = make_folder(path)
        with target.open("w", encoding="utf-8", newline="") as file:
            _write(file, columns, rows)
        return WrittenPath(target)


check_calls(Tabular, "table")


def _write(file: Any, columns: Sequence[str], rows: Iterable[TableRow]) -> None:
    writer = csv.writer(file)
    writer.writerow(columns)
    writer.writerows(rows)
