"""What the user says by `label`: in which layer and chunk his code is. Works, and does nothing else, unwatched too."""

from collections.abc import Callable
from contextvars import ContextVar, Token
from typing import Any

Label = tuple[int | None, int | None]

_label: ContextVar[Label] = ContextVar("dinfer_label", default=(None, None))
_module_layer: ContextVar[int | None] = ContextVar("dinfer_module_layer", default=None)

changed: list[Callable[[int | None, int | None], None]] = []
"""Called with layer and chunk whenever these change; the probe adds itself."""


class label:  # noqa: N801 - used like a function
    """`with dinfer.label(layer=3, chunk=0): …`: ops, KV and tensors within are of that layer and chunk.

    It counts for the current thread or task, and before all that dinfer finds out by itself. Labels nest; what is not
    given stays as it is outside. Raises TypeError where a layer or chunk is no integer.
    """

    def __init__(self, layer: int | None = None, chunk: int | None = None) -> None:
        self._given = (_integer("layer", layer), _integer("chunk", chunk))
        self._tokens: list[Token[Label]] = []

    def __enter__(self) -> None:
        outer, (layer, chunk) = _label.get(), self._given
        now = (outer[0] if layer is None else layer, outer[1] if chunk is None else chunk)
        self._tokens.append(_label.set(now))
        _tell(now)

    def __exit__(self, *_: object) -> None:
        _label.reset(self._tokens.pop())
        _tell(_label.get())


def _integer(name: str, value: Any) -> int | None:
    if value is None:
        return None
    try:
        return int(value.__index__())
    except AttributeError:
        raise TypeError(f"{name} is {value!r}: it takes an integer") from None


def _tell(now: Label) -> None:
    for tell in changed:
        tell(*now)


labelled, module_layer = _label.get, _module_layer.get
"""Layer and chunk that the user has said, None where he has not; and the layer whose module is being called."""


def enter_module(layer: int | None) -> int | None:
    """A layer's module is called, or has returned to the layer that this returned before."""
    before = _module_layer.get()
    _module_layer.set(layer)
    _tell((layer, _label.get()[1]))
    return before
