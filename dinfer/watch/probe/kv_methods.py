"""Takes the rows of a KV cache of the user's own: after calls of the method that `--kv` names."""

import inspect
import json
import os
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

from .imports import ImportWatch
from .tensors import TensorWatch, is_compiling

KV_VARIABLE = "DINFER_WATCH_KV"
"""JSON: a list of objects `method` (`package.module:Class.method`), `k`, `v`, `layer`, and `start` if need be: Python
expressions of the method's arguments, `self` and `result`, which are evaluated once it has returned."""


def watch_methods(watch: TensorWatch, imports: ImportWatch) -> None:
    """Have the methods that DINFER_WATCH_KV names tell of their rows, once their modules are imported."""
    for asked in _asked(watch):
        _Method(watch, asked, imports)


class _Method:
    """A method of the user's, after each call of which rows are taken as his expressions say."""

    def __init__(self, watch: TensorWatch, asked: dict[str, Any], imports: ImportWatch) -> None:
        self._watch, self._is_off = watch, False
        self._module, _, self._path = str(asked["method"]).partition(":")
        self._codes = {
            name: compile(str(asked[name]), f"--{name}", "eval")
            for name in ("k", "v", "layer", "start")
            if asked.get(name)
        }
        imports.add(self._module, self._found)

    def _found(self, module: ModuleType) -> None:
        try:
            *owners, name = self._path.split(".")
            owner: Any = module
            for one in owners:
                owner = getattr(owner, one)
            before = inspect.getattr_static(owner, name)
            if isinstance(before, (classmethod, staticmethod)):
                self._watch.replace(owner, name, type(before)(self._calling(before.__func__)))
            else:
                self._watch.replace(owner, name, self._calling(getattr(owner, name)))
        except Exception as error:
            self._say(error)

    def _calling(self, before: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(before)

        @wraps(before)
        def called(*args: Any, **options: Any) -> Any:
            result = before(*args, **options)
            if not self._is_off and not self._watch.is_off and not is_compiling():
                try:
                    bound = signature.bind(*args, **options)
                    bound.apply_defaults()
                    names = {**before.__globals__, **bound.arguments, "result": result}
                    found = {name: eval(code, names) for name, code in self._codes.items()}
                    layer, start = found.get("layer"), found.get("start")
                    label = (None if layer is None else int(layer), None)
                    self._watch.tap("kv", None, found.get("k"), found.get("v"), label, start)
                except Exception as error:
                    self._say(error)
            return result

        return called

    def _say(self, error: Exception) -> None:
        self._is_off = True
        text = f"--kv {self._module}:{self._path} takes nothing: {type(error).__name__}: {error}"
        self._watch.problem(text)


def _asked(watch: TensorWatch) -> list[dict[str, Any]]:
    text = os.environ.get(KV_VARIABLE)
    if not text:
        return []
    try:
        found = json.loads(text)
        if not all(isinstance(one["method"], str) and ":" in one["method"] for one in found):
            raise ValueError("a method is written package.module:Class.method")
        return list(found)
    except (ValueError, TypeError, KeyError) as error:
        watch.problem(f"{KV_VARIABLE} cannot be read: {type(error).__name__}: {error}")
        return []
