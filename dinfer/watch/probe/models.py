"""Sees in which decoder layer a model of transformers is; and, for a comparison, what models are fed, and what enters
and leaves their layers."""

import threading
from collections.abc import Callable
from functools import partial, wraps
from types import ModuleType
from typing import Any

from .caches import length_of
from .imports import ImportWatch
from .labels import enter_module
from .tensors import HIDDEN, IDS, OUTPUT, TensorWatch, is_captured


class TransformersModels:
    """Patches calls of layers once transformers is imported, and of models where the watch compares."""

    def __init__(self, watch: TensorWatch, imports: ImportWatch) -> None:
        self._watch, self._within = watch, threading.local()
        imports.add("transformers.modeling_layers", self._found_layers)
        if watch.compares:
            imports.add("transformers.modeling_utils", self._found_models)

    def _found_layers(self, module: ModuleType) -> None:
        try:
            import torch

            kind = getattr(module, "GradientCheckpointingLayer", None)
            if kind is None:  # an older transformers
                return
            by = self._within_layer(kind.__call__, calling(kind), torch.compiler.is_compiling)
            self._watch.replace(kind, "__call__", by)
        except Exception as error:
            self._watch.problem(f"layers of transformers are not told apart: {error}")

    def _within_layer(self, compiled: Any, call: Any, is_compiling: Any) -> Any:
        """Calls a decoder layer, and says meanwhile which one it is. A compiler must not see that."""
        compares = self._watch.compares

        @wraps(compiled)
        def called(layer: Any, *args: Any, **options: Any) -> Any:
            if is_compiling():
                return compiled(layer, *args, **options)
            number = _layer_number(layer)
            if number is None:
                return call(layer, *args, **options)
            before = enter_module(number)
            try:
                if compares:
                    return self._layer_called(number, partial(call, layer, *args, **options), args, options)
                return call(layer, *args, **options)
            finally:
                enter_module(before)

        return called

    def _layer_called(self, layer: int, call: Callable[..., Any], args: tuple[Any, ...], options: Any) -> Any:
        """Call a decoder layer; what enters and leaves it is taken."""
        entered = args[0] if args else options.get("hidden_states")
        cache = options.get("past_key_values", options.get("past_key_value"))
        start = None if cache is None else length_of(cache, layer)
        if cache is None and getattr(self._within, "is_model", False):
            start = 0  # the model is fed all tokens; layers that are called one by one may have a store of their own
        result = call()
        left = result[0] if isinstance(result, tuple) and result else result
        for name, tensor in ((HIDDEN, entered), (OUTPUT, left)):
            self._watch.taken_of_model(name, tensor, cache, layer, start)
        return result

    def _found_models(self, module: ModuleType) -> None:
        try:
            kind: Any = getattr(module, "PreTrainedModel", None)
            if kind is not None:
                self._watch.replace(kind, "__call__", self._calling_model(kind.__call__, calling(kind)))
        except Exception as error:
            self._watch.switch_off("finding models of transformers", error)

    def _calling_model(self, compiled: Callable[..., Any], call: Callable[..., Any]) -> Callable[..., Any]:
        import torch

        within, is_compiling = self._within, torch.compiler.is_compiling

        @wraps(compiled)
        def called(model: Any, *args: Any, **options: Any) -> Any:
            if is_compiling():
                return compiled(model, *args, **options)
            if getattr(within, "is_model", False):
                return call(model, *args, **options)
            ids = args[0] if args else options.get("input_ids")
            within.is_model = True
            try:
                if type(ids) is torch.Tensor and not ids.is_floating_point() and ids.dim() == 2:
                    cache = options.get("past_key_values")
                    start = 0 if cache is None else length_of(cache, 0)
                    placed = self._placed_ids(torch, ids, args, options)
                    self._watch.taken_of_model(f"{IDS}{_checkpoint(model)}", placed, cache, None, start)
                return call(model, *args, **options)
            finally:
                within.is_model = False

        return called

    def _placed_ids(self, torch: Any, ids: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Ids [batch, tokens], with mask and positions [batch, tokens, 2]. Never raises."""
        try:
            if self._watch.is_off or is_captured(torch, ids):  # a capture would keep what is done here
                return ids
            mask: Any = args[1] if len(args) > 1 else options.get("attention_mask")
            positions: Any = args[2] if len(args) > 2 else options.get("position_ids")
            if mask is None and positions is None:
                return ids
            words = torch.ones_like(ids, dtype=torch.int64)
            if type(mask) is torch.Tensor and mask.dim() == 2 and mask.shape[1] >= ids.shape[1]:
                words = (mask[:, mask.shape[1] - ids.shape[1] :] != 0).to(torch.int64)
            elif mask is not None:
                self._watch.problem(
                    'a mask that has not the form [batch, tokens]: compare("reference") ignores it'
                )
            if type(positions) is torch.Tensor and positions.dim() == 2:
                words = words + 2 * (positions.to(torch.int64) + 1)
            elif positions is not None:
                self._watch.problem(
                    'positions that have not the form [batch, tokens]: compare("reference") ignores them'
                )
            return torch.stack([ids.to(torch.int64), words.expand_as(ids)], -1)
        except Exception as error:
            self._watch.problem(f"masks and positions are not followed: {type(error).__name__}: {error}")
            return ids


def calling(kind: Any) -> Callable[..., Any]:
    """What a class's instances do when they are called: where the class has no such method of its own, that of the next
    class in an instance's order, which may be another base."""
    own = vars(kind).get("__call__")
    return own or (lambda found, *args, **options: super(kind, found).__call__(*args, **options))


def _checkpoint(model: Any) -> str:
    """Where a model of transformers was loaded from; "" if it does not say so."""
    found = getattr(vars(model).get("config"), "_name_or_path", "")
    return found if isinstance(found, str) else ""


def _layer_number(layer: Any) -> int | None:
    """`layer_idx` of a decoder layer, or of one of its parts."""
    attributes = vars(layer)
    found = attributes.get("layer_idx")
    if found is None:
        parts = (vars(part) for part in attributes.get("_modules", {}).values() if part is not None)
        found = next((part["layer_idx"] for part in parts if "layer_idx" in part), None)
    return found if type(found) is int else None
