"""What a session goes on with of an earlier one, and what it names as lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import pytest
from msgspec.structs import replace

import dinfer
from dinfer.cluster.threads import LocalRanks
from dinfer.config import Config
from dinfer.errors import DinferError
from dinfer.messages import GetHeld, Holdings
from dinfer.session import session as session_module
from dinfer.session.reattach import Loaded, Lost, are_in_one_group, loaded_of, run_of
from dinfer.session.session import Session

RANKS = 2
MODEL = {"layers": 3}


@pytest.fixture
def held(session: Session) -> list[Holdings]:
    """What the ranks of a session with a run in the middle hold."""
    run = session.prefill(list(range(1, 12)), chunk_size=4, paused=True)
    run.step("layer", n=2)
    run.break_at(layer=1)
    found = session.ranks.ask({0: GetHeld(), 1: GetHeld()}, 30)
    return [found[0], found[1]]


def blank() -> Config:
    return Config(world_size=2, log_dir="", prompt_ids=(0,), backend="gloo")


def test_ranks_remember_what_they_were_told(session: Session, held: list[Holdings]) -> None:
    loaded = loaded_of(held, blank())
    assert loaded
    assert loaded.spec == session.spec
    assert loaded.devices == ["cpu", "cpu"]
    found = run_of(held, loaded.spec)
    assert found
    job, left = found
    assert job.plan == session.run.plan
    assert asdict(job.config) == asdict(session.run.job.config)
    assert left.breakpoints == tuple(one.as_dict() for one in session.run.breakpoints)
    assert left.plan_ids == {0: job.plan.id, 1: job.plan.id}


def test_fresh_ranks_hold_nothing() -> None:
    with dinfer.connect("threads", n=2) as session:
        assert session.reattached == ""
        found = session.ranks.ask({0: GetHeld(), 1: GetHeld()}, 30)
    held = [replace(one, group=None) for one in found.values()]
    assert not are_in_one_group(held)
    assert loaded_of(held, blank()) is None


Change = Callable[[Holdings], Holdings]


def test_another_checkpoint_on_one_rank_is_named(held: list[Holdings]) -> None:
    assert held[1].load
    for change, said in [
        (replace(held[1], load=None), "rank 1"),
        (replace(held[1], load=replace(held[1].load, fingerprint="f" * 64)), "different"),
    ]:
        with pytest.raises(Lost, match=said):
            loaded_of([held[0], change], blank())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda one: replace(one, prompt=None), "prompt"),
        (lambda one: replace(one, plan_id=1), "plan"),
        (lambda one: replace(one, group=replace(one.group, port=1)), "group"),
    ],
)
def test_a_run_that_not_all_ranks_are_in_is_lost_with_the_reason(
    session: Session, held: list[Holdings], change: Change, said: str
) -> None:
    assert session.spec
    with pytest.raises(DinferError, match=said):
        run_of([held[0], change(held[1])], session.spec)


def test_ranks_that_are_in_no_group_any_more_meet_by_the_backend_of_what_they_hold(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert session.spec
    loaded = Loaded(blank().with_(backend="nccl", gpu_ids=(0, 1)), session.spec, ["cuda:0", "cuda:1"])
    monkeypatch.setattr(session_module, "loaded_of", lambda *_: loaded)
    met = []
    monkeypatch.setattr(session_module, "meet", lambda _, backend="gloo": met.append(backend))
    with Session(LocalRanks(2)):
        assert met == ["nccl"]
