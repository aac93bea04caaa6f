"""What cannot be looked at, compared or broken is refused in one clear message, on real runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from dinfer.cluster.threads import LocalRanks
from dinfer.plan.ops import PlanError
from dinfer.run.run import Run
from dinfer.session.session import Session
from tests.support.tiny import tiny_checkpoint
from tests.support.twin import prompt

LAYERS = 6
IDS = prompt(20)
Other = Callable[..., Run]
"""other(ids, load={}, **checkpoint): a finished run of another session, on a checkpoint that differs in that"""


MODEL = {"layers": LAYERS}


@pytest.fixture
def run(session: Session) -> Run:
    """Twenty tokens in five chunks, of which the first two are through layer 3."""
    run = session.prefill(IDS, chunk_size=4, paused=True)
    run.run_to(chunk=1, layer=3)
    return run


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Other]:
    """Of two ranks."""
    made = list[Session]()

    def finished(ids: Sequence[int], load: dict[str, Any] | None = None, **given: Any) -> Run:
        model = tiny_checkpoint(tmp_path / str(len(made)), layers=LAYERS, **given)
        made.append(Session(LocalRanks(2)).load(str(model), threads=1, **(load or {})))
        run = made[-1].prefill(ids, chunk_size=4)
        run.wait(60)
        return run

    yield finished
    for session in made:
        session.close()


def said(call: Callable[[], object]) -> str:
    with pytest.raises(PlanError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"layer": 6}, "there is no layer 6: the layers are 0 to 5."),
        ({"layer": -1}, "there is no layer -1: the layers are 0 to 5."),
        ({"rank": 3}, "there is no rank 3: the ranks are 0 to 2."),
        ({"rank": -1}, "there is no rank -1: the ranks are 0 to 2."),
        ({"chunk": 5}, "there is no chunk 5: the chunks are 0 to 4."),
        ({"layer": "5"}, "layer is '5'; it must be a whole number from 0 to 5."),
        ({"layer": 1.0}, "layer is 1.0; it must be a whole number from 0 to 5."),
        ({"rank": True}, "rank is True; it must be a whole number from 0 to 2."),
    ],
)
def test_what_is_out_of_range(run: Run, asked: dict[str, Any], text: str) -> None:
    assert said(lambda: run.kv(**asked)) == text


def test_what_is_not_computed_yet(run: Run) -> None:
    stands = "the run stands at c2 l0 on rank 0, at c1 l3 on rank 1, at c0 l5 on rank 2."
    assert said(lambda: run.kv(layer=4, chunk=2)) == f"chunk 2 of layer 4 is not computed yet; {stands}"
    assert said(lambda: run.kv(layer=2, chunk=2, rank=1)) == (
        f"chunk 2 of layer 2 is not there yet on rank 1; {stands}"
    )
    assert said(lambda: run.hidden(chunk=2, layer=4)) == (
        f"the hidden state of chunk 2 before layer 4 is not computed yet; {stands}"
    )
    assert said(lambda: run.attention(chunk=2, layer=4)) == (
        f"chunk 2 of layer 4 is not there yet on rank 2; {stands}"
    )


def test_ranks_to_compare(run: Run) -> None:
    assert said(lambda: run.kv().diff(ranks=(0, 3))) == "there is no rank 3: the ranks are 0 to 2."
    assert said(lambda: run.kv().diff(ranks=())).startswith("ranks is empty: name at least two")


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ({"layer": 6, "chunk": 0}, "layer is 6; the layers of this run go from 0 to 5."),
        ({"layer": 0, "chunk": 5}, "chunk is 5; the chunks of this run go from 0 to 4."),
        ({"layer": 0, "chunk": 0, "rank": 3}, "rank is 3; the ranks of this run go from 0 to 2."),
    ],
)
def test_what_is_out_of_range_is_not_broken(run: Run, place: dict[str, Any], text: str) -> None:
    assert said(lambda: run.inject("nan", **place)) == text


def test_runs_of_other_models_and_prompts_are_not_compared(session: Session, other: Other) -> None:
    run = session.prefill(IDS, chunk_size=4)
    run.wait(60)
    names = "this run and the other run"
    for theirs, text in (
        (other([*IDS[:7], 3, *IDS[8:]]), f"{names} are of different prompts (first at token 7)"),
        (other(IDS[:-1]), f"{names} are of different prompts (20 and 19 tokens)"),
        (other(IDS, seed=1), f"{names} are of different checkpoints: compare runs of one model."),
        (other(IDS, num_key_value_heads=1), f"{names} are of different checkpoints"),
    ):
        assert said(lambda theirs=theirs: run.kv().diff(theirs)).startswith(text)  # type: ignore[misc]
    assert str(run.kv().diff(other(IDS))) == f"{names} hold the same 6 × 5 blocks, bit for bit"


def test_runs_of_other_dtypes_are_not_compared(session: Session, other: Other) -> None:
    run = session.prefill(IDS, chunk_size=4)
    run.wait(60)
    theirs = other(IDS, load={"dtype": "bfloat16"})
    assert said(lambda: run.kv().diff(theirs)).startswith(
        "this run and the other run hold float32 and bfloat16: every value differs in its bits."
    )
