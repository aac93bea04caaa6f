"""What users hold: Tab offers what is made for them, and each name that it offers is explained by `?`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

import dinfer
from dinfer.arguments import CallError
from dinfer.errors import DinferError
from dinfer.session.session import Listening
from dinfer.session.sweep import sweep
from tests.support.threads import session_on_threads
from tests.support.traces import PROMPT

HELD = [
    "Session", "Run", "Trace", "Sweep", "KV", "Part", "Hidden", "AttentionWeights", "Diff", "Difference", "Comparison",
    "Verdict", "Replay", "Saved", "Listening", "Decoded", "Moved", "Where", "Breakpoints", "Breakpoint", "Armed",
    "Injected", "Shown", "Table",
]  # fmt: skip


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """One of each, by the name of its type."""
    with session_on_threads(2, Path("demo")) as session:
        run = session.prefill(PROMPT, chunk_size=8, paused=True)
        found: list[Any] = [session, run, Listening(0, "here", 5678), sweep(session.prefill, [], {})]
        found += [run.step("layer"), run.where(), run.verdict(), run.break_at(layer=3), run.breakpoints]
        found += [run.inject("bitflip", rank=1, layer=0, chunk=0), run.faults]
        diff = run.kv().diff()
        found += [
            diff,
            diff.first,
            diff.table(),
            run.kv(layer=0),
            run.kv(layer=0).k,
            run.hidden(0, 0),
            run.attention(0, 0),
        ]
        run.breakpoints.clear()
        found += [run.decode(2), run.compare("reference"), run.trace, run.trace.plot()]
        folder = run.save(tmp_path_factory.mktemp("saved") / "run")
        with run.replay(0) as replay:
            yield {type(one).__name__: one for one in [*found, replay, dinfer.open(folder)]}


def offered(one: object) -> list[str]:
    """What Tab shows at first."""
    return [name for name in dir(one) if not name.startswith("_")]


def is_explained(kind: type, name: str) -> bool:
    """By a docstring, its own or that of what it overrides; of plain values, by the class's."""
    owns = [vars(base)[name] for base in kind.__mro__ if name in vars(base)]
    functions = [getattr(own, "__func__", own) for own in owns]
    if any(inspect.isfunction(one) or isinstance(one, property | cached_property) for one in functions):
        return any(one.__doc__ for one in functions)
    docs = " ".join(base.__doc__ or "" for base in kind.__mro__ if base.__module__.startswith("dinfer"))
    return bool(re.search(rf"`{name}\b", docs))


@pytest.mark.parametrize("name", HELD)
def test_tab_offers_nothing_internal_and_every_name_is_explained(held: dict[str, Any], name: str) -> None:
    one = held[name]
    internal = {*getattr(type(one), "INTERNAL", ()), "INTERNAL"}
    assert internal.isdisjoint(offered(one))
    assert all(hasattr(one, hidden) for hidden in internal - {"INTERNAL"}), "INTERNAL names what there is"
    assert type(one).__doc__
    assert [word for word in offered(one) if not is_explained(type(one), word)] == []


def calls_of(one: object) -> list[Any]:
    """Its methods that Tab offers."""
    names = [
        name for name in offered(one) if inspect.isfunction(inspect.getattr_static(type(one), name, None))
    ]
    return [getattr(one, name) for name in names]


@pytest.mark.parametrize("name", HELD)
def test_calls_that_cannot_be_meant_raise_an_error_for_users(held: dict[str, Any], name: str) -> None:
    """An unknown name, too many values, one left out, and values of a kind that nothing takes."""
    for call in calls_of(held[name]):
        parameters = inspect.signature(call).parameters.values()
        required = [
            one.name for one in parameters if one.default is one.empty and one.kind != one.VAR_KEYWORD
        ]
        named = [one.name for one in parameters if one.kind != one.VAR_KEYWORD]
        needed = {one: object() for one in required}
        with pytest.raises(DinferError, match="no_such"):
            call(**dict.fromkeys(required, "x"), no_such=1)
        with pytest.raises(CallError, match=f"{call.__name__} takes .* value"):
            call(*[object()] * (len(named) + 1))
        if required:
            with pytest.raises(CallError, match=f"{call.__name__} needs {required[0]}"):
                call()
        for wrong in named:
            with pytest.raises(DinferError, match=f"{wrong} is|object"):
                call(**needed | {wrong: object()})


@pytest.mark.parametrize("name", HELD)
def test_its_repr_is_short(held: dict[str, Any], name: str) -> None:
    """Also of what holds thousands of events or values."""
    assert 0 < len(repr(held[name])) < 4000
