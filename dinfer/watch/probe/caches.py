"""Sees the rows that transformers' caches are given, of whatever class, without being asked.

The outermost `update` of a cache counts: a subclass may call its parent's, and a cache calls its layer's.
"""

import inspect
import sys
import threading
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

from .imports import ImportWatch
from .tensors import TensorWatch


class TransformersCaches:
    """Patches the `update` of caches once transformers is imported."""

    def __init__(self, watch: TensorWatch, imports: ImportWatch) -> None:
        self._watch, self._within = watch, threading.local()
        imports.add("transformers.cache_utils", self._found_caches)

    def _found_caches(self, module: ModuleType) -> None:
        try:
            for kind in (getattr(module, "Cache", None), getattr(module, "CacheLayerMixin", None)):
                if kind is not None:
                    self._watch_class(kind)
        except Exception as error:
            self._watch.switch_off("finding caches of transformers", error)

    def _watch_class(self, kind: type[Any]) -> None:
        """It and all its subclasses, also those to come."""
        own, watch = vars(kind).get("__init_subclass__"), self._wrap_update

        def init_subclass(cls: type[Any], /, **options: Any) -> None:
            if own is None:  # that of the next class in its order, which may be another base
                super(kind, cls).__init_subclass__(**options)
            else:
                own.__get__(None, cls)(**options)
            watch(cls)

        self._watch.replace(kind, "__init_subclass__", classmethod(init_subclass))
        for one in (kind, *_descendants(kind)):
            watch(one)

    def _wrap_update(self, kind: type[Any]) -> None:
        update = vars(kind).get("update")
        if inspect.isfunction(update) and not getattr(update, "__isabstractmethod__", False):
            self._watch.replace(kind, "update", self._updating(update))

    def _updating(self, update: Callable[..., Any]) -> Callable[..., Any]:
        within = self._within

        import torch

        is_compiling = torch.compiler.is_compiling  # a compiler takes this for a constant

        @wraps(update)
        def updated(cache: Any, *args: Any, **options: Any) -> Any:
            # Whatever the parameters are called: K and V are the first two.
            given = [*args, *options.values()]
            if is_compiling() or self._watch.is_off or getattr(within, "is_on", False) or len(given) < 2:
                return update(cache, *args, **options)
            within.is_on = True
            try:
                layer = options.get("layer_idx", given[2] if len(given) > 2 else None)
                layer = layer if type(layer) is int else None
                start = length_of(cache, layer)
                result = update(cache, *args, **options)
                if start == 0 and not length_of(cache, layer):
                    start = None  # it keeps rows elsewhere: counted by ourselves
            finally:
                within.is_on = False
            self._watch.taken(cache, given[0], given[1], layer, start, sys._getframe(1))
            return result

        return updated


def length_of(cache: Any, layer: int | None) -> int | None:
    """How many rows the cache holds, where that is known without asking a device; counted by ourselves if not."""
    try:
        if layer is not None:
            layers = getattr(cache, "layers", None)
            if layers is None or layer >= len(layers):
                return 0 if layers is not None else None
            cache = layers[layer]
        attributes = vars(cache)
        for name in ("cumulative_length_int", "cumulative_length"):
            if type(attributes.get(name)) is int:
                return int(attributes[name])
        counted = attributes.get("cumulative_length")
        if counted is not None:
            return int(counted) if counted.device.type == "cpu" else None
        keys = attributes.get("keys")
        if keys is None or not getattr(cache, "is_initialized", True):
            return 0
        return int(keys.shape[-2]) if keys.numel() else 0
    except Exception:  # a cache of the user's own may do anything when it is looked at
        return None


def _descendants(kind: type[Any]) -> list[type[Any]]:
    found: list[type[Any]] = []
    for one in kind.__subclasses__():
        found += [one, *_descendants(one)]
    return found
