"""A joined cluster: calls functions on its ranks, kills and restarts them. Made by `attach`."""

import atexit
import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ipyparallel.client.magics import ParallelMagics
from IPython.core.error import UsageError
from IPython.core.getipython import get_ipython

from dinfer.cluster.ipyparallel.calls import Calls, EngineCondition, call_expression, evaluate, wait_until
from dinfer.cluster.ipyparallel.clean import stop_cluster
from dinfer.cluster.ipyparallel.errors import ClusterError, RankSilent
from dinfer.cluster.ipyparallel.facts import EngineFacts, differences, introduce
from dinfer.cluster.ipyparallel.identity import Identity
from dinfer.cluster.ipyparallel.known import Known, describe
from dinfer.cluster.ipyparallel.launcher import STARTED_BY, command_before
from dinfer.cluster.ipyparallel.profiles import Profile
from dinfer.cluster.ipyparallel.reach import start_again
from dinfer.rank.process import age, exists, is_stopped

RESPAWN_S = 60.0

DEATH_S = 5.0
"""how long a killed process may take to end: freeing much memory takes a while"""

EARLY_S = 35.0
"""A stock ipcluster ends its controller if all engines that it has started end within 30 s of that."""

_OF_MPI = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "MPI_", "HYDRA_", "HYDI_")
"""variables set by mpiexec, which are wrong for a new engine: it is not a child of mpiexec"""


def target_ids(text: str, ids: Sequence[int]) -> int | list[int]:
    """The engine ids of the ranks `1`, `0,2`, `[0, 2]`, `1:`, `::2` or `all`. Raises UsageError."""
    ranks = list(range(len(ids)))
    try:
        if text.strip() == "all":
            return list(ids)
        if ":" in text:
            part = slice(*(int(word) if word.strip() else None for word in text.split(":")))
            return [ids[rank] for rank in ranks[part]]
        wanted = [ranks[int(word)] for word in text.strip("[]() ").split(",") if word.strip()]
    except (ValueError, IndexError, TypeError):
        raise UsageError(
            f"--targets is {text!r}; the ranks are 0 to {len(ids) - 1}: one (1), some (0,2), a slice (1:) or all."
        ) from None
    return ids[wanted[0]] if len(wanted) == 1 and "[" not in text else [ids[rank] for rank in wanted]


class RankMagics(ParallelMagics):  # type: ignore[misc]
    """ipyparallel's magics, with ranks as targets."""

    ids: Sequence[int] = ()
    progress_after_seconds = -1  # its bar is a widget: an error in a notebook that is opened again
    stream_output = (
        False  # streamed, the lines of ranks are mixed, and broken inside words; `%%px --stream` streams
    )

    def _eval_target_str(self, ts: str) -> int | list[int]:
        return target_ids(ts, self.ids)


class Cluster:
    """`engine_ids` and `facts` are by rank. `view` and %%px cover the ranks and no other engines."""

    def __init__(
        self, known: Known, client: Any, engine_ids: Sequence[int], *, started: bool, timeout: float
    ) -> None:
        self.known = known
        self.client = client
        self.engine_ids = list(engine_ids)
        self.started_by_us = started
        self.controller = known.controller()
        """the controller's process; None if it is on another machine"""
        self._location = str(known.connection().get("location") or "127.0.0.1")
        try:
            self.facts = introduce(client, dict(enumerate(engine_ids)), self._location, timeout)
        except RankSilent as error:
            raise RankSilent(error.rank, f"{error} {self._why_silent()}") from None
        self.view = client[self.engine_ids]
        self.view.block = True
        if shell := get_ipython():  # makes %px, %%px, %pxresult and %pxconfig run on this view
            magics = RankMagics(shell, self.view)
            magics.ids = self.engine_ids
            shell.magics_manager.register(magics)
        self._uuids = [client._engines[engine_id] for engine_id in self.engine_ids]
        self._respawned = set[int]()
        self._closed = False
        if started:
            atexit.register(self._close_at_exit, os.getpid())

    @property
    def n(self) -> int:
        """The number of ranks."""
        return len(self.engine_ids)

    @property
    def controller_pid(self) -> int | None:
        """The controller's process id; None if it is on another machine."""
        return self.controller.pid if self.controller else None

    def __repr__(self) -> str:
        return f"<Cluster: {self.describe()}>"

    def describe(self) -> str:
        """One line: which cluster, its ranks and their hosts."""
        engines = [(facts.engine_id, facts.host) for facts in self.facts]
        unused = sorted(set(self.client.ids) - set(self.engine_ids))
        text = describe(self.known, started=self.started_by_us, engines=engines, unused=unused)
        return text + differences(self.facts)

    def name(self, rank: int) -> str:
        """The rank as messages name it."""
        engine_id, facts = self.engine_ids[rank], self.facts[rank]
        as_engine = "" if engine_id == rank else f"engine {engine_id}, "
        return f"rank {rank} ({as_engine}pid {facts.pid} on {facts.host})"

    def call(
        self, rank: int | None, function: str, *args: Any, timeout: float | None = None, check: bool = True
    ) -> list[Any]:
        """Call `module:function` on one rank or (None) on all; returns the results in the order of ranks.

        Arguments must survive JSON. With `check`, the first rank that fails, ends or is late raises a RankError at
        once; otherwise its RankError is its result.
        """
        return self.call_async(rank, function, *args).result(timeout, check)

    def call_async(self, rank: int | None, function: str, *args: Any) -> Calls:
        """As `call`, without waiting."""
        ranks = range(self.n) if rank is None else [rank]
        engines = {r: self.engine_ids[r] if self._is_registered(r) else None for r in ranks}
        names = {r: self.name(r) for r in ranks}
        return evaluate(self.client, call_expression(function, args), engines, names, self._condition)

    def _condition(self, rank: int) -> EngineCondition:
        process = self.facts[rank].process
        state = process.state()
        if state != "alive":
            return "gone" if state == "gone" else "unknown"
        return "stopped" if is_stopped(process.pid) else "runs"

    def _why_silent(self) -> str:
        """Why an engine of which no more than its id is known does not answer, and what to do."""
        if stopped := [pid for pid in self.known.engine_pids() if is_stopped(pid)]:
            named = ", ".join(f"process {pid}" for pid in stopped)
            return f"Of its cluster, {named} is stopped: `kill -CONT {stopped[0]}` lets it go on."
        return (
            "It is busy, most likely with a %%px cell of another notebook, or its process is stopped: wait for that "
            "cell or interrupt it, then connect again; connect(…, start=True) starts a cluster of its own."
        )

    def alive(self, rank: int) -> bool:
        """Whether its engine is registered and its process exists, as far as is known here; it may be stopped."""
        return self._is_registered(rank) and self.facts[rank].process.state() != "gone"

    def _is_registered(self, rank: int) -> bool:
        """Another engine with the same id is not this rank unless `respawn` started it."""
        return bool(self.client._engines.get(self.engine_ids[rank]) == self._uuids[rank])

    def interrupt(self, rank: int) -> None:
        """SIGINT to the engine, which ends the cell that it runs as the stop button does."""
        if self._is_registered(rank):
            self.client.send_signal("SIGINT", targets=self.engine_ids[rank], block=False)

    def kill(self, rank: int) -> None:
        """SIGKILL the engine's process and no other, also if it is stopped. No error if it has ended. The last of those
        that were there from the start lives for EARLY_S seconds at least."""
        process = self.facts[rank].process
        if self._is_last(rank):
            wait_until(lambda: age(process.pid) > EARLY_S, EARLY_S)
        if process.state() == "alive":
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
                wait_until(lambda: process.state() == "gone", DEATH_S)
        elif process.state() == "elsewhere" and self._is_registered(rank):
            # Its nanny process sends the signal.
            self.client.send_signal("SIGKILL", targets=self.engine_ids[rank], block=False)

    def _is_last(self, rank: int) -> bool:
        """Whether this is the only engine left of those that somebody else's ipcluster has started."""
        if self.started_by_us:
            return False
        others = (other for other in range(self.n) if other != rank and other not in self._respawned)
        return rank not in self._respawned and not any(
            self.facts[other].process.state() != "gone" for other in others
        )

    def respawn(self, rank: int, timeout: float = RESPAWN_S) -> None:
        """Start an engine in place of one that has ended, on its machine: same id, network, interpreter, folder and
        environment. The others are not touched. It ends by itself when the controller ends.

        ipyparallel's `Cluster.restart_engine` is not implemented (as of 9.2), and `restart_engines` ends all engines.
        Raises ClusterError if the engine still runs, was on another machine on which no profile of dinfer's has started
        it, its controller has ended, or the new one does not register within `timeout` seconds.
        """
        engine_id, client, controller = self.engine_ids[rank], self.client, self.controller
        if self.alive(rank):
            raise ClusterError(f"{self.name(rank)} still runs; kill it first.")
        started_by = self.facts[rank].environment.get(STARTED_BY, "")
        if controller is None or not (self.facts[rank].process.is_here or started_by):
            flags = f"{self.known.flags} --IPEngine.id={engine_id}".lstrip()
            raise ClusterError(
                f"{self.name(rank)} was not on this machine: start it there with `ipengine {flags}`."
            )
        # A stock ipcluster ends its controller if all engines end soon after their start, and then nothing unregisters
        # them.
        wait_until(lambda: controller.state() == "gone" or engine_id not in client.ids, timeout)
        if controller.state() == "gone":
            raise ClusterError(f"the controller of {self.known.name} has ended: start the cluster again.")
        if engine_id in client.ids:
            raise ClusterError(f"the controller still lists engine {engine_id} as alive after {timeout:g} s.")
        if started_by:
            self._start_again_there(rank, started_by, timeout)
        else:
            self._start_again_here(rank, controller, timeout)
        self._respawned.add(rank)
        self._uuids[rank] = client._engines[engine_id]
        self.facts[rank] = introduce(client, {rank: engine_id}, self._location, timeout)[0]

    def _start_again_there(self, rank: int, started_by: str, timeout: float) -> None:
        """By ssh or Slurm, whichever has started the one before. Raises ClusterError."""
        engine_id, client = self.engine_ids[rank], self.client
        profile = Profile.read(self.known.profile_dir)
        step = start_again(self.facts[rank], started_by, profile.ssh_args if profile else ())
        wait_until(lambda: engine_id in client.ids or step.ended() is not None, timeout)
        if engine_id not in client.ids:
            why = step.ended()
            step.end()
            late = f"did not register within {timeout:g} s" if why is None else f"ended at once: {why}"
            raise ClusterError(f"the new engine {engine_id}, started by {started_by}, {late}.")

    def _start_again_here(self, rank: int, controller: Identity, timeout: float) -> None:
        engine_id, client = self.engine_ids[rank], self.client
        log = self.known.profile_dir / "log" / f"ipengine-{self.known.cluster_id}-again-{engine_id}.log"
        pid = self._start_engine(self.facts[rank], log, json.dumps(asdict(controller)))
        try:
            wait_until(lambda: engine_id in client.ids or not exists(pid), timeout)
            if not exists(pid):
                raise ClusterError(f"the new engine {engine_id} ended at once.{_end_of(log)}")
            if engine_id not in client.ids:
                late = f"the new engine {engine_id} did not register within {timeout:g} s."
                raise ClusterError(late + _end_of(log))
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            raise

    def _start_engine(self, facts: EngineFacts, log: Path, controller: str) -> int:
        """Start an engine that is like another; returns its process id."""
        environment = {
            name: value for name, value in facts.environment.items() if not name.startswith(_OF_MPI)
        }
        command = [
            *command_before(facts.engine_id, facts.environment),
            *(facts.executable, "-m", "dinfer.cluster.ipyparallel.replacement", str(log), controller),
            f"--profile-dir={self.known.profile_dir}",
            f"--cluster-id={self.known.cluster_id}",
            f"--IPEngine.id={facts.engine_id}",
        ]
        folder = facts.folder if Path(facts.folder).is_dir() else None
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment, cwd=folder
        )
        if done.returncode:
            raise ClusterError(
                f"engine {facts.engine_id} could not be started again: {done.stderr.strip()[-400:]}"
            )
        return int(done.stdout)

    def leave(self) -> None:
        """Leave the cluster to others who use it. One that this process started still ends with this process."""
        self.client.close()

    def close(self, stop: bool | None = None) -> None:
        """Leave the cluster. `stop`: whether it ends; by default, it ends if this process started it. Engines that were
        respawned belong to their cluster and end with it. Raises ClusterError if processes could not be ended."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self._close_at_exit)
        self.client.close()
        if self.started_by_us if stop is None else stop:
            stop_cluster(self.known)

    def _close_at_exit(self, pid: int) -> None:
        """Not in a forked child, nor in a kernel that is restarted: its successor finds the engines for as long as they
        wait for a session."""
        if os.getpid() == pid and not _is_restarting():
            self.close()


def _is_restarting() -> bool:
    """Whether Jupyter ends this kernel to start it again."""
    said = getattr(getattr(get_ipython(), "kernel", None), "_shutdown_message", None) or {}
    return bool(said.get("content", {}).get("restart"))


def _end_of(log: Path) -> str:
    """The end of a log, as the end of a message; "" for none."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return " Its log ends: " + " / ".join(lines[-3:]) if lines else ""
