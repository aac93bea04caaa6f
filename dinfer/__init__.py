"""dinfer: an interactive debugger for distributed LLM inference.

A run's config makes a plan; ranks carry out its ops and record events; the merged events are a trace, which views show.
A call goes session → run → cluster → rank → engine → transport; what happened comes back as events.

The packages are floors of a house, bottom to top. A package imports only from floors below its own (pyproject.toml has
the contract for import-linter; imports in functions and for types count too):

- `watch`: what runs inside other people's processes, and what it writes; standard library and torch only.
- `severity`, `version`; `errors`, `messages`: how grave a message is, the base of all errors, the messages between
  session and rank; standard library only.
- `files`, `temporary`, `arguments`, `codec`; `tabular`; `config`, `display`: files that are read within bounds and
  written beside others; folders that go with whoever uses them; what a call takes; how K and V are written on the
  wire; tables as DataFrames and CSV; a run's parameters, validated; how values are shown as text and HTML. `progress`:
  bars.
- `plan`, `model`: what will be done: ops, lanes, schedules, proofs, simulated time; and transformers' layers one by
  one, without ranks. `planner`: what layers and links cost, and which plan to run.
- `results`, `trace`, `kv`, `history`: what happened: results of calls, events and figures; whose KV differs, where and
  since when; what can be undone.
- `verdict`: why a run does not move: which rank waits for which, and for what.
- `transport`: bytes from rank to rank: gloo, NCCL, shared GPU memory, or queues within one process.
- `job`, `engine`: a run checked before it starts; one rank's part of a plan.
- `rank`: an engine as a process: commands from the session, the watcher beside it, stacks, memory, faults.
- `cluster`: the ranks as a session reaches them: engines of ipyparallel or threads; leases and recovery.
- `monitor`: watches for hangs and gathers the evidence.
- `saved`: runs as folders, replay of one rank, and the search for the block that makes an answer wrong.
- `run`: what a user holds: step, break, decode, inspect, inject, report; `watching`: the same of other people's code,
  judged from what `watch` has recorded.
- `session`, `launch`, `views`: notebooks; ranks of the command line; panels, figures and reports.
- `lab`: the fault lab, and hosts on one machine; `doctor`, `bench`: checks of an installation, measurements.
- `dap`: the Debug Adapter Protocol, for editors.
- `magics`, `cli`: `%dinfer` and the command `dinfer`.

To read the code, start with `plan.ops` and `plan.plan`, then `engine.engine` and `engine.lanes`, then `run.run`. Each
package's docstring says where it starts. Importing `dinfer` has no side effects and does not import torch.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinfer.arguments import checked
from dinfer.display import use_plotter
from dinfer.errors import NotPossible
from dinfer.version import __version__
from dinfer.watch import use_starter
from dinfer.watch.marks import label, tap

if TYPE_CHECKING:
    from dinfer.cluster.ipyparallel.attach import ClusterPlace
    from dinfer.display import Plot
    from dinfer.run.run import Run
    from dinfer.saved.saved import Saved
    from dinfer.session.session import Session
    from dinfer.trace.trace import Trace
    from dinfer.watching.live import CommandWatch, Watch

__all__ = ["__version__", "connect", "label", "load_ipython_extension", "open", "tap", "watch"]


@checked
def connect(
    where: str | int = "ipyparallel",
    n: int | None = None,
    *,
    profile: str = "default",
    cluster_id: str | None = None,
    start: bool | None = None,
    take: bool = False,
    timeout: float = 60.0,
    patience: float = 60.0,
    place: "ClusterPlace | None" = None,
) -> "Session":
    """Open a session with `n` ranks; `connect(n)` for short. By default 3, or all of a profile of `dinfer profile`.

    `where`: "ipyparallel" joins a running cluster or starts one; "threads" runs all ranks in this process. The others
    are explained at `dinfer.session.connect`. After a kernel restart it goes on with the checkpoint and the run that
    the ranks still hold; engines that another session holds are refused unless `take=True`.
    """
    _announce_import("" if where == "threads" else "finding or starting engines, and ")
    from dinfer.session.connect import connect as connected

    return connected(
        where, n, profile=profile, cluster_id=cluster_id, start=start, take=take, timeout=timeout,
        patience=patience, place=place, show=_show, write=_write,
    )  # fmt: skip


@checked
def open(path: str | Path) -> "Saved":
    """Open a run that `run.save` wrote to a folder or `run.report` to a file, without a cluster: its trace, plan,
    verdict and KV. `.debugger()` shows it, `.diff(…)` compares it with another run, saved or live. Raises
    SavedError."""
    _announce_import()
    from dinfer.saved.saved import open_saved

    return open_saved(path, _write, _show)


@checked
def _watch(
    command: str | Sequence[str],
    folder: str | Path | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    compare: bool = False,
) -> "CommandWatch":
    """Start a command under watch, such as `dinfer.watch("torchrun --nproc-per-node 2 infer.py")`, and return at once.

    Every Python process that it starts records what it calls of torch.distributed; nothing of it has to be changed. A
    hang or crash is said once it is found. `folder`: for its output and records, by default a new temporary one;
    `environment`: variables besides this process's own; `compare`: take what `compare("reference")` needs of models of
    transformers: token ids, and sketches of KV and hidden states. Raises OSError, NotPossible.
    """
    from dinfer.watching.live import CommandWatch

    return CommandWatch(command, folder, environment, _write, _show, compare)


def load_ipython_extension(shell: Any) -> None:
    """Called by `%load_ext dinfer`: defines the `%dinfer` magics and the name `dinfer`."""
    from dinfer.magics import load_into

    load_into(shell)


def _announce_import(meanwhile: str = "") -> None:
    """Say why the first call of a kernel takes long; later ones do not."""
    if "torch" not in sys.modules:
        print(f"dinfer: {meanwhile}importing PyTorch, which takes some seconds in a new kernel", flush=True)


def _write(trace: "Trace", path: Path) -> Path:
    from dinfer.views.report.page import write_report

    return write_report([trace], path)


def _show(shown: "Run | Watch | Saved", *, detached: bool = False) -> Any:
    """The panel of a run, a watch or a saved run; `detached`: that of a run in a tab of its own."""
    from dinfer.saved.saved import Saved
    from dinfer.watching.live import Watch

    if isinstance(shown, Watch):
        from dinfer.views.panel.watched import WatchPanel

        return WatchPanel(shown)
    from dinfer.views.panel.panel import Panel

    if isinstance(shown, Saved):
        from dinfer.views.read_only import ReadOnlyRun

        return Panel(ReadOnlyRun(shown))
    if detached:
        from dinfer.views.served.detached import DetachedDesk

        return DetachedDesk(shown, "run")
    return Panel(shown)


def _plot(name: str, result: Any) -> "Plot":
    """Draws the figures of results, wherever these come from; plotly is imported at the first one."""
    try:
        from dinfer.views.figures.plots import plot
    except ModuleNotFoundError as error:
        raise NotPossible(
            f"figures need the package {error.name}, which is missing here: pip install {error.name}"
        ) from error
    return plot(name, result)


if TYPE_CHECKING:
    watch = _watch  # at run time the package of that name, which can be called

use_plotter(_plot)
use_starter(_watch)
