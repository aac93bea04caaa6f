"""Actions: what a panel's forms ask of a run, each as the Python call that it is; and the log of calls. The browser's
side is actions.js."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dinfer.history import call_text
from dinfer.plan.faults import KINDS
from dinfer.views.panel.desk import Action
from dinfer.views.protocol import Json

LOGGED = 200
"""how many calls a panel lists, the last"""


class FormVerb(NamedTuple):
    """A call that a form makes. `placed`, `named`: the fields that come without a name and with it, and the type of
    each."""

    placed: Mapping[str, type] = {}
    named: Mapping[str, type] = {}


VERBS = {
    "decode": FormVerb(named={"max_new_tokens": int}),
    "step": FormVerb(placed={"unit": str}, named={"n": int}),
    "step_back": FormVerb(placed={"unit": str}, named={"n": int}),
    "inject": FormVerb(
        placed={"kind": str},
        named={
            "rank": int, "layer": int, "chunk": int, "tensor": str, "head": int, "token": int, "dim": int, "bit": int,
            "where": str, "dtype": str, "seed": int,
        },
    ),
    "compare": FormVerb(placed={"what": str}, named={"chunked": bool, "dtype": str}),
    "save": FormVerb(placed={"folder": str}, named={"kv": bool, "hidden": bool, "prompt": bool}),
    "report": FormVerb(placed={"path": str}, named={"prompt": bool}),
    "faults.remove": FormVerb(placed={"number": int}),
    "breakpoints.enable": FormVerb(placed={"number": int}),
    "breakpoints.disable": FormVerb(placed={"number": int}),
    "calls.save": FormVerb(placed={"path": str}),
}  # fmt: skip
"""by name below `run`"""

EDITS = ("faults.remove", "breakpoints.enable", "breakpoints.disable")
"""verbs that do not wait for a step under way"""


def board_of(run: object) -> Json:
    """What the browser needs to build the forms; nothing for a run that has no verbs, such as a saved one."""
    if not has_verbs(run):
        return {}
    kinds = {kind: {"details": list(rule.details)} for kind, rule in KINDS.items()}
    return {"verbs": {"kinds": kinds}, "runs": getattr(run, "runs", None) is not None}


def has_verbs(run: object) -> bool:
    """Whether it is a run of a session."""
    return hasattr(run, "calls") and hasattr(run, "undoable")


def log_of(run: Any) -> Json:
    """The last calls of a run, and what undo would undo."""
    if not has_verbs(run):
        return {"count": 0, "calls": [], "undo": ""}
    return {"count": len(run.calls), "calls": run.calls.lines(LOGGED), "undo": run.undoable}


def verb_of(run: Any, message: Json) -> Action | None:
    """The action for the message of a form; None for another message."""
    match message:
        case {"do": "verb", "verb": str(name), "given": dict(given)} if name in VERBS:
            return _action(run, name, given)
        case {"do": "recover"}:
            return Action("session.recover()", lambda: _recover(run), asks=True)
    return None


def is_edit(message: Json) -> bool:
    """Whether the action for a message does not wait for a step under way."""
    return message.get("do") == "verb" and message.get("verb") in EDITS


def _action(run: Any, name: str, given: Mapping[str, object]) -> Action:
    verb = VERBS[name]
    fields = {**verb.placed, **verb.named}
    placed: Sequence[object] = [given[field] for field in verb.placed if field in given]
    named = {field: given[field] for field in verb.named if field in given}

    def call() -> object:
        for field, value in given.items():
            if field not in fields or type(value) is not fields[field]:
                raise ValueError(f"run.{name} takes no {field}={value!r} from a form: reload the page.")
        found = run
        for part in name.split("."):
            found = getattr(found, part)
        return found(*placed, **named)

    return Action(call_text(name, tuple(placed), named), call, asks=True)


def _recover(run: Any) -> object:
    if run.recover is None:
        raise ValueError("this run has no session to recover.")
    return run.recover()
