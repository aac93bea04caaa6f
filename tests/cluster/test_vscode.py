"""VS Code: the entries of .vscode/launch.json, started as it would start them, and a debugger that attaches."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dinfer.engine import ops
from tests.support.dap import Debugger
from tests.support.parrot import C_LOCALE, FLAGS, check_parroted
from tests.support.runs import Run, free_ports, run_arguments, wait_for
from tests.support.twin import prompt

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
ALL = "Debug Distributed Inference (3 Ranks)"
Entry = dict[str, Any]


def launch_json() -> Entry:
    """The repository's file, which `dinfer vscode` has written."""
    read: Entry = json.loads((ROOT / ".vscode" / "launch.json").read_text(encoding="utf-8"))
    return read


ENTRIES: dict[str, Entry] = {entry["name"]: entry for entry in launch_json()["configurations"]}
COMPOUNDS: dict[str, list[str]] = {
    entry["name"]: entry["configurations"] for entry in launch_json()["compounds"]
}


@pytest.fixture
def runs() -> Iterator[list[Run]]:
    """Runs put here are ended with the test."""
    started: list[Run] = []
    yield started
    for run in started:
        run.end()


def layer_breakpoint() -> dict[str, list[int]]:
    """The first line inside `ops.layer`."""
    return {ops.__file__: [inspect.getsourcelines(ops.layer)[1] + 1]}


def stop_in_layer(debugger: Debugger, layer: int) -> None:
    """Wait for the breakpoint in rank 1's first layer; the stack must say so; go on without breakpoints."""
    stopped = debugger.event("stopped")
    assert stopped["reason"] == "breakpoint"
    frames = debugger.ask("stackTrace", threadId=stopped["threadId"])["stackFrames"]
    assert frames[0]["name"] == "layer"
    assert Path(frames[0]["source"]["path"]) == Path(ops.__file__)
    value = debugger.ask("evaluate", expression="(state.rank, op.layer)", frameId=frames[0]["id"])
    assert value["result"] == f"(1, {layer})"
    debugger.ask("setBreakpoints", source={"path": ops.__file__}, breakpoints=[])
    debugger.ask("continue", threadId=stopped["threadId"])


def test_entries_are_complete() -> None:
    assert COMPOUNDS[ALL] == ["Rank 0", "Rank 1", "Rank 2"]
    assert all(name in ENTRIES for names in COMPOUNDS.values() for name in names)
    ranks = [ENTRIES[name]["env"] for name in COMPOUNDS[ALL]]
    assert [env.pop("RANK") for env in map(dict, ranks)] == ["0", "1", "2"]
    assert len({env["MASTER_PORT"] for env in ranks}) == 1
    assert [ENTRIES[f"Attach to rank {n}"]["connect"]["port"] for n in range(3)] == [5678, 5679, 5680]
    strategies = [entry["args"] for name, entry in ENTRIES.items() if name.startswith("dinfer run, ")]
    assert [args[args.index("--sync-strategy") + 1] for args in strategies] == ["pairwise", "ring"]


def test_f5_runs_three_ranks_and_a_breakpoint_stops_one(
    tmp_path: Path, parrot: Path, runs: list[Run]
) -> None:
    """Rank 1 under a debugger, the others plain: they wait for it. Ports are changed, for tests side by side."""
    flags = run_arguments(parrot, **FLAGS)[1:]
    ports = free_ports(2)
    for rank, name in enumerate(COMPOUNDS[ALL]):
        entry = ENTRIES[name]
        args = [argument.replace("env/", f"{ROOT}/env/") for argument in entry["args"]]
        debugged = ["-m", "debugpy", "--listen", f"127.0.0.1:{ports + 1}", "--wait-for-client"]
        program = [sys.executable, *(debugged if rank == 1 else []), "-m", entry["module"]]
        environment = {**entry["env"], **C_LOCALE, "MASTER_PORT": str(ports)}
        runs.append(Run(tmp_path / str(rank), [*args, *flags], environment, program))
    debugger = Debugger(ports + 1)
    debugger.attach(layer_breakpoint())
    stop_in_layer(debugger, layer=1)
    debugger.close()
    check_parroted(runs[0], parrot)
    assert [run.finish(60) for run in runs] == [0, 0, 0]


@pytest.mark.slow
def test_a_debugger_attaches_to_ranks_of_dinfer_run(tmp_path: Path, model: Path, runs: list[Run]) -> None:
    first = free_ports(3)
    flags = run_arguments(model, prompt_ids=prompt(22), chunk_size=4, max_new_tokens=4)
    runs.append(Run(tmp_path, flags, {"DINFER_DEBUGPY": str(first), "DINFER_DEBUGPY_WAIT": "1"}))
    debuggers = [Debugger(first + rank) for rank in range(3)]
    for rank in (0, 2):
        debuggers[rank].attach()
    debuggers[1].attach(layer_breakpoint())
    stop_in_layer(debuggers[1], layer=3)
    assert len(runs[0].result()["ranks"]) == 3
    for debugger in debuggers:
        debugger.close()
    wait_for(lambda: not runs[0].members(), "no process is left")
