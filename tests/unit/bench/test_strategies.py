"""Which of two strategies to use: said only where the rounds tell them apart."""

from __future__ import annotations

from typing import Any

import pytest

from dinfer.bench import strategies as room
from dinfer.bench.rank import TimedPrefill
from dinfer.bench.strategies import check_compared, compare, table
from dinfer.config import Config, ConfigError

NAMES = ["pairwise", "ring"]


def compared(monkeypatch: pytest.MonkeyPatch, *seconds: list[float]) -> dict[str, Any]:
    """The result for these seconds by case, pairwise and ring in turn; rank 1 is a little slower than rank 0."""

    def on_ranks(_: Config, __: int, cases: list[Any], repeats: int) -> list[list[list[TimedPrefill]]]:
        assert [len(took) for took in seconds] == [repeats] * len(cases)
        assert [case.variant.sync_strategy for case in cases] == NAMES * (len(cases) // 2)
        return [
            [[TimedPrefill(s + late, s / 10 + late) for s in took] for took in seconds] for late in (-0.01, 0)
        ]

    monkeypatch.setattr(room, "on_ranks", on_ranks)
    chunks = [16, 32, 64][: len(seconds) // 2]
    return compare(Config(world_size=2, threads=1), 100, NAMES, [2048], chunks, len(seconds[0]))


def test_rounds_that_overlap_are_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    found = compared(monkeypatch, [1.0, 1.2, 1.1], [1.0, 0.9, 1.3])
    assert found["cases"][0]["faster"] is None
    facts = ("No difference", "ring took 0.91 × the time of pairwise", "2,048 tokens by 16", "Keep pairwise")
    assert all(fact in found["verdict"] for fact in facts)


def test_the_faster_one_is_named_with_its_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    found = compared(monkeypatch, [2.0, 2.1, 2.2], [1.0, 1.05, 1.1], [1.0, 1.2, 1.1], [1.0, 0.9, 1.3])
    row = found["cases"][0]
    assert (row["tokens"], row["chunk_size"], row["faster"]) == (2048, 16, "ring")
    assert row["medians"] == {"pairwise": 2.1, "ring": 1.05}
    assert row["ratio"] == 0.5
    facts = (
        "Use ring",
        "2,048 tokens by 16",
        "0.50 × the time of pairwise",
        "0.105 s",
        "0.210 s",
        "otherwise",
    )
    assert all(fact in found["verdict"] for fact in facts)
    shown = table(found).splitlines()
    assert shown[2].split()[:4] == ["2048", "16", "2.100", "(2.000–2.200)"]
    assert shown[2].endswith("0.50  ring")
    assert shown[3].endswith("0.91  -")
    assert shown[-1] == found["verdict"]


def test_it_may_depend(monkeypatch: pytest.MonkeyPatch) -> None:
    found = compared(monkeypatch, [2.0, 2.1], [1.0, 1.1], [1.0, 1.1], [2.0, 2.1])
    facts = ("It depends", "pairwise for 2,048 tokens by 32", "ring for 2,048 tokens by 16")
    assert all(fact in found["verdict"] for fact in facts)


@pytest.mark.parametrize(
    ("names", "repeats", "words"),
    [
        (["pairwise"], 3, "compare is 'pairwise'; it must be two of pairwise, ring"),
        (["ring", "ring"], 3, "two of pairwise, ring"),
        (["pairwise", "rng"], 3, "two of pairwise, ring"),
        (NAMES, 1, "repeats is 1; --compare needs at least 2"),
    ],
)
def test_what_cannot_be_compared_is_refused(names: list[str], repeats: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_compared(names, repeats)
