"""One rank's part of a plan: it runs its lanes of ops, over any transport.

The same under ipyparallel, torchrun, mpirun, or threads in one process. Imports `plan`, `model`, `kv`, `trace` and
`transport`; it knows nothing of sessions. Start at `engine`, then `lanes` and `ops`.
"""

from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    """`dinfer.engine.handlers`, as cells written for older versions call `dinfer.engine.ops`."""
    if name != "handlers":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import warnings

    from dinfer.engine import ops

    warnings.warn("dinfer.engine.handlers is dinfer.engine.ops now", DeprecationWarning, stacklevel=2)
    return ops
