"""Who holds engines: named to whoever else wants them."""

from __future__ import annotations

import re

import pytest

from dinfer.cluster.holder import ClusterTaken, check_free, own_holder
from dinfer.messages import Holder

MINE = own_holder()
OTHER = Holder("notebook a.ipynb", 17, "box", 1_700_000_000.0, "key of another")


@pytest.mark.parametrize("holders", [{0: None, 1: None}, {0: MINE, 1: MINE}, {0: MINE, 1: None}])
def test_free_engines_and_this_process_own_ones_may_be_joined(holders: dict[int, Holder | None]) -> None:
    check_free(holders, MINE, "profile 'default'")


@pytest.mark.parametrize(
    ("holders", "which"), [({0: OTHER, 1: OTHER}, "its ranks"), ({0: None, 1: OTHER, 2: OTHER}, "ranks 1–2")]
)
def test_others_are_refused_with_who_holds_them_and_what_to_do(
    holders: dict[int, Holder | None], which: str
) -> None:
    with pytest.raises(ClusterTaken) as refused:
        check_free(holders, MINE, "profile 'default'")
    said = str(refused.value)
    assert all(part in said for part in (which, "notebook a.ipynb", "17", "box", "2023-11-1", "take=True"))
    assert len(re.findall("notebook", said)) == 1  # one session is named once


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("JPY_SESSION_NAME", "folder/my notes.ipynb", "notebook my notes.ipynb"),
        ("X", "", ("program ", "a Python p")),
    ],
)
def test_a_notebook_is_called_by_its_name(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str | tuple[str, ...]
) -> None:
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    monkeypatch.setenv(name, value)
    assert own_holder().program.startswith(said)
