"""What a program may tell the probe itself: `dinfer.tap`. Unwatched it does nothing."""

from typing import Any

from .labels import Label

watching: list[Any] = []
"""The tensor watch of this process, if it is watched."""


def tap(
    name: str,
    tensor: Any = None,
    *,
    k: Any = None,
    v: Any = None,
    layer: int | None = None,
    chunk: int | None = None,
    start: int | None = None,
) -> None:
    """Take digests of a tensor, row by row, so that ranks can be compared, and runs with a reference.

    `tap("kv", layer=3, k=k, v=v)`: rows of a KV cache as they are added, both [batch, heads, tokens, width] or
    [heads, tokens, width]. `tap("logits", logits)`: any tensor [..., rows, width]. `layer`, `chunk`: if not given, as
    `label` and the caller's variables say. `start`: the place of the first row; if not given, behind those of the same
    name and layer before. Only digests are kept. Never raises; what cannot be taken is said once, as a problem.
    """
    for watch in watching:
        watch.tap(name, tensor, k, v, (layer, chunk), start)


def label_of(given: Label, found: Label) -> Label:
    """What is given, else what is found."""
    return (found[0] if given[0] is None else given[0], found[1] if given[1] is None else given[1])
