"""`dinfer.label` and `dinfer.tap`: those of the probe that watches this process, which may have come from its zip."""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dinfer.watch.probe.labels import label
    from dinfer.watch.probe.taps import tap

__all__ = ["label", "tap"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if "dinfer_probe.start" in sys.modules:
        from dinfer_probe import labels, taps  # type: ignore[import-not-found]
    else:
        from dinfer.watch.probe import labels, taps
    return getattr(labels if name == "label" else taps, name)
