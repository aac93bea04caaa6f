"""Calls with arguments that they do not take: one error, before anything is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

import dinfer
from dinfer.arguments import CallError, check_calls, checked, nearest
from dinfer.session.session import Session


@checked
def call(
    n: int,
    seconds: float | None = None,
    *,
    name: str = "",
    names: Sequence[str | Sequence[int]] = (),
    numbers: bool | Sequence[int] = True,
    path: str | Path = "",
    then: Callable[[], None] | None = None,
    unit: Literal["op", "layer"] = "op",
    whatever: Any = None,
) -> int:
    """Takes an argument of every kind; returns how many were given."""
    return len([n, seconds, name, names, numbers, path, then, unit, whatever])


TAKEN: list[dict[str, Any]] = [
    {"n": 3},
    {"n": np.int64(3), "seconds": 2},
    {"n": 3, "seconds": np.float32(2.5)},
    {"n": 3, "numbers": (1, np.int64(2))},
    {"n": 3, "numbers": range(3)},
    {"n": 3, "numbers": np.bool_(True)},
    {"n": 3, "names": ["a", [1, 2]]},
    {"n": 3, "path": Path("here"), "then": print, "unit": 5, "whatever": Ellipsis},
]


@pytest.mark.parametrize("given", TAKEN, ids=str)
def test_values_of_the_right_kind_are_taken(given: dict[str, Any]) -> None:
    assert call(**given) == 9


REFUSED: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
    ((), {}, "call needs n. The call is call(n, seconds=None, *, name="),
    ((3,), {"secnds": 4}, "call takes no 'secnds'. Did you mean seconds? The call is call("),
    ((3,), {"zzz": 4}, "call takes no 'zzz'. The call is call("),
    ((3, 4, 5), {}, "call takes at most 2 values without a name; got 3. The call is call("),
    ((3,), {"n": 4}, "call got n twice, without its name and with it."),
    (("x",), {}, "n is 'x'; it must be a whole number."),
    ((True,), {}, "n is True; it must be a whole number."),
    ((3.0,), {}, "n is 3.0; it must be a whole number."),
    ((3,), {"seconds": "x"}, "seconds is 'x'; it must be a number or None."),
    ((3,), {"name": 5}, "name is 5; it must be text."),
    ((3,), {"names": "ab"}, "names is 'ab'; it must be a list of texts or lists of whole numbers."),
    ((3,), {"numbers": ["x"]}, "numbers is ['x']; it must be True or False or a list of whole numbers."),
    ((3,), {"path": 5}, "path is 5; it must be text or a path."),
    ((3,), {"then": 5}, "then is 5; it must be a function or None."),
]


@pytest.mark.parametrize(("args", "kwargs", "says"), REFUSED, ids=[says for _, _, says in REFUSED])
def test_others_are_refused_and_the_error_says_what_is_taken(
    args: tuple[Any, ...], kwargs: dict[str, Any], says: str
) -> None:
    with pytest.raises(CallError) as raised:
        call(*args, **kwargs)
    assert str(raised.value).startswith(says)
    assert isinstance(raised.value, TypeError)


def test_a_type_error_within_the_call_is_not_taken_for_one_of_its_arguments() -> None:
    def fails(n: int) -> int:
        return n + "x"  # type: ignore[operator]

    with pytest.raises(TypeError, match="unsupported operand") as raised:
        checked(fails)(3)
    assert not isinstance(raised.value, CallError)


def test_public_methods_of_a_class_are_checked_and_no_others() -> None:
    class Held:
        def look(self, n: int) -> int:
            return n

        def _within(self, n: int) -> int:
            return n

        def inner(self, n: int) -> int:
            return n

    check_calls(Held, "run.held", ["inner"])
    held: Any = Held()
    with pytest.raises(CallError, match=r"^n is 'x'; .* The call is run\.held\.look\(n\)\.$"):
        held.look("x")
    assert (held._within("x"), held.inner("x")) == ("x", "x")


def test_the_nearest_name() -> None:
    assert nearest("chunk", ["layer", "chunk_size"]) == " Did you mean chunk_size?"
    assert nearest("zzz", ["layer", "chunk_size"]) == ""


def test_an_argument_of_another_call_is_said_to_be_its() -> None:
    load: Any = Session.load
    for name in ("layer_split", "chunk_size", "paused", "prompt"):
        with pytest.raises(
            CallError,
            match=rf"^session\.load takes no '{name}': it is a parameter of session\.prefill\. The call is session",
        ):
            load(None, "demo", **{name: 1})
    with pytest.raises(CallError, match=r"^session\.load takes no 'thread'\. Did you mean threads\?"):
        load(None, "demo", thread=1)


CONNECT: Any = dinfer.connect
OPEN: Any = dinfer.open
WATCH: Any = dinfer.watch


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (lambda: CONNECT(tmeout=3), "connect takes no 'tmeout'. Did you mean timeout?"),
        (lambda: CONNECT("threads", "3"), "n is '3'; it must be a whole number or None."),
        (lambda: CONNECT("threads", 2, "other"), "connect takes at most 2 values without a name"),
        (lambda: OPEN(), "open needs path. The call is open(path)."),
        (lambda: OPEN(5), "path is 5; it must be text or a path."),
        (lambda: WATCH("true", foldr="x"), "watch takes no 'foldr'. Did you mean folder?"),
        (lambda: WATCH(), "watch needs command. The call is watch(command, folder=None, "),
    ],
)
def test_the_first_calls_of_all(given: Callable[[], Any], says: str) -> None:
    with pytest.raises(CallError) as raised:
        given()
    assert str(raised.value).startswith(says)
