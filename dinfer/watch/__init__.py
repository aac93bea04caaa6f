"""Watches distributed code that is not dinfer's own: what it sent and received, and why it does not move.

`probe` is what runs inside the watched processes, and reads what they wrote; it imports nothing of dinfer. `zipped`
packs it, so that environments without dinfer can be watched. Start with `probe.records`: what is recorded of an op.

The module can be called, since `dinfer.watch("torchrun …")` is what people write in a notebook: see `dinfer.watching`,
which reads and judges what is recorded here. `dinfer/__init__.py` hands in what is called, as this package stands below
all others.
"""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

_started: list[Callable[..., Any]] = []


def use_starter(starter: Callable[..., Any]) -> None:
    """Have `dinfer.watch(…)` call that."""
    _started[:] = [starter]


class _CallableModule(ModuleType):
    def __call__(self, *given: Any, **options: Any) -> Any:
        return _started[0](*given, **options)


sys.modules[__name__].__class__ = _CallableModule
