"""What the debug console takes: calls of a run and its session, with plain values; and conditions of breakpoints.

An expression is parsed, never run by Python: names, attributes and calls that are listed here, and literals.
"""

import ast
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dinfer.arguments import nearest
from dinfer.errors import DinferError, excerpt
from dinfer.kv.difference import Diff
from dinfer.kv.view import KV, AttentionWeights, Hidden, Part
from dinfer.plan.breakpoints import CONDITION_FORMS, parse_when
from dinfer.results import Breakpoints
from dinfer.run.faults import Armed
from dinfer.run.run import Run
from dinfer.session.session import Session
from dinfer.trace.trace import Trace

LOOKS = (
    "where", "verdict", "kv", "hidden", "attention", "compare", "trace", "breakpoints", "faults", "text", "tokens",
    "message", "standing", "sha256", "prediction", "config", "plan",
)  # fmt: skip
"""of a run: what only looks"""

MOVES = ("step", "step_back", "run_to", "resume_back", "undo", "decode", "restart")
"""what moves it; the console does it as the buttons do"""

CHANGES = ("inject", "break_at", "save", "report")
"""what changes the run without a move, or writes files"""

REMOVALS = ("remove", "clear")
"""attributes of results that do so, too"""

OF_SESSION = ("recover", "log")

BEYOND: Mapping[type, tuple[str, ...]] = {
    KV: ("diff", "k", "v", "summary"),
    Part: ("shape",),
    Hidden: ("shape",),
    AttentionWeights: ("top", "heads"),
    Diff: ("equal", "verdict"),
    Trace: ("summary",),
    Breakpoints: REMOVALS,
    Armed: REMOVALS,
}
"""by type, the attributes of results"""

HELP = """\
where                    the position of each rank
verdict                  why the run does not move
kv(layer=5)              who holds what; kv().diff() finds where ranks differ, kv(layer=5).k[0, :3] fetches values
hidden(chunk=1, layer=5) a hidden state in figures
compare                  K, V and hidden states beside transformers' own
run_to(chunk=1, layer=5) to just after that block, forward or back
step("op"), step_back("chunk"), resume_back(), undo(), decode(5)
break_at(layer=5, when="nan"), breakpoints, breakpoints.remove(1), inject("nan", rank=1, layer=2), faults.clear()
absmax > 10, nan, inf    whether that holds of the selected frame's block: its K, V and the hidden state after it
recover                  after a failure: lost ranks are started again, stuck ones freed, and the run begins anew
save("folder"), report("report.html")
Also: attention, trace, faults, text, tokens, message, sha256, prediction, config, plan, log. All are calls of `run`."""


class ConsoleError(DinferError, ValueError):
    """The console does not take this; the message says what it takes."""


class ConsoleCall(NamedTuple):
    """A parsed expression. `moves`: it moves the run, so the client hears of it as of a step; `mends`: it ends a
    failure; `changes`: it changes the run in another way, or writes files; `do()`: the value."""

    moves: bool
    do: Callable[[], Any]
    mends: bool = False
    changes: bool = False


def parsed(text: str, run: Run, session: Session) -> ConsoleCall:
    """The call that an expression stands for. Raises ConsoleError."""
    plain = text.strip().removesuffix(";")
    for prefix in ("run.", "session."):
        plain = plain.removeprefix(prefix)
    if plain in ("", "help", "?", "help()"):
        return ConsoleCall(False, lambda: HELP)
    try:
        tree = ast.parse(plain, mode="eval").body
    except (SyntaxError, ValueError):
        raise ConsoleError(f"{excerpt(plain)} is not understood. {_takes()}") from None
    name = _root(tree)
    known = (*LOOKS, *MOVES, *CHANGES, *OF_SESSION)
    if name not in known:
        raise ConsoleError(f"{excerpt(name or plain)} is not known here.{nearest(name, known)} {_takes()}")
    if name == "recover":
        return ConsoleCall(True, run.mend, mends=True)
    root: Any = session if name in OF_SESSION else run
    changes = name in CHANGES or any(
        isinstance(one, ast.Attribute) and one.attr in REMOVALS for one in ast.walk(tree)
    )
    return ConsoleCall(
        name in MOVES, lambda: _called(_value(tree, root)), mends=name == "restart", changes=changes
    )


def is_condition(text: str) -> bool:
    """Whether it is what a breakpoint takes after `if`. Raises PlanError for one that begins so and is none."""
    if not text.strip().lower().startswith(("nan", "inf", "absmax", "digest", "slower")):
        return False
    parse_when(text)
    return True


def completions(text: str) -> list[str]:
    """Names that begin as the last word of the text does."""
    word = text.replace("run.", "").replace("session.", "").strip()
    return sorted(name for name in ("help", *LOOKS, *MOVES, *CHANGES, *OF_SESSION) if name.startswith(word))


def _root(tree: ast.expr) -> str:
    while isinstance(tree, ast.Attribute | ast.Call | ast.Subscript):
        tree = tree.func if isinstance(tree, ast.Call) else tree.value
    return tree.id if isinstance(tree, ast.Name) else ""


def _called(value: Any) -> Any:
    """A method that was named without brackets is called: `where` is `where()`."""
    return value() if callable(value) and not isinstance(value, type) else value


def _value(tree: ast.expr, root: Any) -> Any:
    match tree:
        case ast.Name():
            return getattr(root, tree.id)
        case ast.Attribute():
            of = _called(_value(tree.value, root))
            allowed = next((names for kind, names in BEYOND.items() if isinstance(of, kind)), ())
            if tree.attr not in allowed:
                what = type(of).__name__
                listed = f"it has {', '.join(allowed)}" if allowed else "it has nothing more here"
                raise ConsoleError(f"{excerpt(tree.attr)} of {what} is not known here: {listed}. {_takes()}")
            return getattr(of, tree.attr)
        case ast.Call():
            if any(keyword.arg is None for keyword in tree.keywords):
                raise ConsoleError(f"** is not understood. {_takes()}")
            named = {str(keyword.arg): _literal(keyword.value) for keyword in tree.keywords}
            return _value(tree.func, root)(*map(_literal, tree.args), **named)
        case ast.Subscript():
            of = _called(_value(tree.value, root))
            if not isinstance(of, Part | Hidden | Breakpoints | AttentionWeights | list):
                raise ConsoleError(f"{type(of).__name__} has no [ ] here. {_takes()}")
            return of[_index(tree.slice)]
        case _:
            raise ConsoleError(f"{excerpt(ast.unparse(tree))} is not understood. {_takes()}")


def _literal(tree: ast.expr) -> Any:
    try:
        return ast.literal_eval(tree)
    except ValueError:
        raise ConsoleError(
            f"{excerpt(ast.unparse(tree))} is no plain value: the console takes numbers, text in quotes, lists, True, "
            "False and None."
        ) from None


def _index(tree: ast.expr) -> Any:
    if isinstance(tree, ast.Tuple):
        return tuple(map(_index, tree.elts))
    if isinstance(tree, ast.Slice):
        return slice(*(one and _literal(one) for one in (tree.lower, tree.upper, tree.step)))
    return _literal(tree)


def _takes() -> str:
    return (
        "The debug console takes calls of the run with plain values, such as where, kv(layer=5), kv().diff(), "
        f"run_to(chunk=1, layer=5), or a condition: {CONDITION_FORMS}; `help` lists them."
    )
