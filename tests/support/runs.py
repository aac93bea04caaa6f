"""Starts `dinfer run` as users do, breaks a rank on purpose where asked to, and leaves nothing behind.

Not a test.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

DEADLINE_S = 180.0
"""for what takes a few seconds on an idle machine"""
MARK = "DINFER_TEST_RUN"
"""an environment variable that every process of a run inherits, and by which it is found"""


def wait_for(
    condition: Callable[[], object], what: str, meanwhile: Callable[[], object] = lambda: None
) -> None:
    """Wait until `condition()` holds, which is asked after each call of `meanwhile`; fails the test after DEADLINE_S.

    One that takes long to find out, as among all processes, is asked less often: ranks need the cores.
    """
    deadline = time.monotonic() + DEADLINE_S
    while True:
        began = time.monotonic()
        meanwhile()
        if condition():
            return
        now = time.monotonic()
        assert now < deadline, f"not within {DEADLINE_S:g} s: {what}"
        time.sleep(max(0.02, min(10 * (now - began), 0.2)))


def is_alive(process: psutil.Process) -> bool:
    """Whether that very process runs; one that nobody has waited for does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def free_ports(count: int) -> int:
    """The first of so many free ports in a row. Other processes, which look for some at the same time, look elsewhere
    first: also those whose numbers are neighbours, as those of pytest's workers."""
    for number in range(4000):
        first = 20000 + 10 * ((61 * os.getpid() + number) % 4000)
        with ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(closing(socket.create_server(("127.0.0.1", port))))
            except OSError:
                continue
            return first
    raise AssertionError("no ports are free")


@dataclass(frozen=True)
class Fault:
    """What happens on one rank in one op, or, of kind `token`, before new token number `chunk`.

    `action` are Python statements; `folder` in them is the run's.
    """

    action: str
    rank: int = 1
    kind: str = "layer"
    chunk: int = 1
    layer: int = 3

    def environment(self, folder: Path) -> dict[str, str]:
        """Write a sitecustomize.py that breaks the rank; the environment that has ranks import it."""
        home = folder / "fault"
        home.mkdir(exist_ok=True)
        text = _TOKEN_FAULT if self.kind == "token" else _OP_FAULT
        values = {name: repr(getattr(self, name)) for name in ("rank", "kind", "chunk", "layer")}
        for name, value in {**values, "folder": repr(str(folder)), "action": repr(self.action)}.items():
            text = text.replace(f"<{name}>", value)
        (home / "sitecustomize.py").write_text(text, encoding="utf-8")
        return {"PYTHONPATH": f"{home}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".rstrip(os.pathsep)}


_FAULT = """import os, sys
launched = {"RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK"} & os.environ.keys()  # by torchrun, mpirun or a debugger
if {"dinfer.rank.worker", "stepped rank"} & set(sys.orig_argv) or launched and "dinfer" in sys.orig_argv:
    import ctypes, os, pathlib, signal, time
    folder = pathlib.Path(<folder>)
    def strike():
        (folder / "fault.part").write_text(f"{time.monotonic()} {os.getpid()}")
        (folder / "fault.part").rename(folder / "fault.at")
        exec(<action>)
"""
_OP_FAULT = f"""{_FAULT}
    from dinfer.engine import ops
    unbroken = ops.HANDLERS[<kind>]
    def broken(state, op, comm):
        if (state.rank, op.chunk, op.layer) == (<rank>, <chunk>, <layer>):
            strike()
        return unbroken(state, op, comm)
    ops.HANDLERS[<kind>] = broken
"""
_TOKEN_FAULT = f"""{_FAULT}
    from dinfer.engine.decoding import Decoding
    unbroken = Decoding.step
    def broken(self):
        if (self._comm.rank, len(self.tokens)) == (<rank>, <chunk>):
            strike()
        return unbroken(self)
    Decoding.step = broken
"""


def fault_time(folder: Path) -> float:
    """When the fault struck, on the clock of `time.monotonic`, which on one machine is one clock."""
    return float((folder / "fault.at").read_text().split()[0])


def fault_pid(folder: Path) -> int:
    """The process that the fault struck."""
    return int((folder / "fault.at").read_text().split()[1])


class Run:
    """One `dinfer` process and all that it starts."""

    def __init__(
        self,
        folder: Path,
        arguments: Iterable[object],
        environment: Mapping[str, str],
        program: Sequence[str] = (sys.executable, "-m", "dinfer.cli"),
    ) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._mark = uuid.uuid4().hex
        self._stdout, self._stderr = folder / "stdout.txt", folder / "stderr.txt"
        with self._stdout.open("wb") as out, self._stderr.open("wb") as err:
            self.process = subprocess.Popen(
                [*program, *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=folder,
                env={**os.environ, MARK: self._mark, **environment},
            )

    @property
    def out(self) -> str:
        return self._stdout.read_text(encoding="utf-8")

    @property
    def logs(self) -> Path:
        """The folder of the logs of the newest run in `--log-dir logs`."""
        return self.folder / "logs" / "latest"

    @property
    def err(self) -> str:
        return self._stderr.read_text(encoding="utf-8")

    def members(self) -> list[psutil.Process]:
        """The processes of this run that live: itself, ranks, watchers."""
        return [process for process in psutil.process_iter() if self._is_mine(process) and is_alive(process)]

    def started(self, world_size: int) -> list[psutil.Process]:
        """All processes of the run, once every rank and every watcher is there."""
        wait_for(
            lambda: len(self.members()) == 1 + 2 * world_size or self.process.poll() is not None,
            f"{world_size} ranks and their watchers are there",
        )
        return self.members()

    def finish(self, seconds: float = DEADLINE_S) -> int:
        """Wait for the end; the exit status."""
        return self.process.wait(seconds)

    def result(self) -> dict[str, Any]:
        """What `--json` wrote; the run must have gone well."""
        assert self.finish() == 0, self.err
        read: dict[str, Any] = json.loads((self.folder / "result.json").read_text(encoding="utf-8"))
        return read

    def end(self) -> None:
        """Kill what is left of it, process by process."""
        for process in self.members():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait()

    def _is_mine(self, process: psutil.Process) -> bool:
        try:
            return bool(process.environ().get(MARK) == self._mark)
        except psutil.Error:
            return False


def run_arguments(model: Path, **flags: object) -> list[str]:
    """The command line of `dinfer run`: `chunk_size=4` becomes `--chunk-size 4`, True a bare flag."""
    arguments = ["run", "--model", str(model), "--json", "result.json", "--log-dir", "logs", "--threads", "1"]
    for name, value in flags.items():
        flag = "--" + name.replace("_", "-")
        arguments += [flag] if value is True else [flag, as_text(value)]
    return arguments


def as_text(value: object) -> str:
    """A parameter's value as the command line takes it."""
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
