"""dinfer: an interactive debugger for distributed LLM inference.

config → plan → events → trace → views. Importing this package has no side effects and does not import torch.
"""

from typing import TYPE_CHECKING, Any

from dinfer.version import __version__

if TYPE_CHECKING:
    from pathlib import Path

    from dinfer.run.run import Run
    from dinfer.saved.saved import Saved
    from dinfer.session.session import Session
    from dinfer.trace.trace import Trace

__all__ = ["__version__", "connect", "load_ipython_extension", "open"]


def connect(where: str = "ipyparallel", n: int = 3, **options: Any) -> "Session":
    """A session with `n` ranks: engines of an ipyparallel cluster, which is joined or started; or, with "threads", all
    in this process. `options`: profile, cluster_id, start, timeout, patience (see `dinfer.session.connect`)."""
    from dinfer.session.connect import connect as connected

    def show(run: "Run") -> Any:
        from dinfer.views.panel import Panel

        return Panel(run)

    return connected(where, n, show=show, write=_write, **options)


def open(path: "str | Path") -> "Saved":
    """A run that `run.save` has written to a folder, or `run.report` to a file, without a cluster: its trace, plan,
    verdict, KV; `.diff(…)` compares it with another, saved or live. Raises SavedError."""
    from dinfer.saved.saved import open_saved

    return open_saved(path, _write)


def load_ipython_extension(shell: Any) -> None:
    """`%load_ext dinfer`: the `%dinfer` magics, and the name `dinfer`."""
    from dinfer.magics import load_into

    load_into(shell)


def _write(trace: "Trace", path: "Path") -> "Path":
    from dinfer.views.report.page import write_report

    return write_report([trace], path)
