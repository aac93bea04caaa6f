"""Progress bars in a notebook: one text that is replaced, and no widget."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tqdm import tqdm

from dinfer.progress import progress_bar


def test_a_bar_is_one_text_that_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = list[tuple[str, str]]()

    class Handle:
        def display(self, text: object) -> None:
            shown.append(("display", str(text)))

        def update(self, text: object) -> None:
            shown.append(("update", str(text)))

    monkeypatch.setattr("IPython.display.DisplayHandle", Handle)
    monkeypatch.setattr("dinfer.progress.ipython", lambda: SimpleNamespace(kernel=True))
    with progress_bar(total=4, desc="rank 1", unit="B") as made:
        made.n = 2
        made.refresh()
        made.n = 4
    assert [how for how, _ in shown] == ["display", *["update"] * (len(shown) - 1)]
    assert [text.partition("|")[0] for _, text in shown if "%" in text] == [
        "rank 1:   0%",
        "rank 1:  50%",
        "rank 1: 100%",
    ]


def test_elsewhere_a_bar_is_tqdm_s() -> None:
    with progress_bar(total=4) as made:
        assert type(made) is tqdm
