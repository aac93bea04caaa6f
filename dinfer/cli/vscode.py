"""VS Code's launch entries: made here, and put among those that a folder's `.vscode/launch.json` already has."""

import json
from pathlib import Path
from typing import Any

from dinfer.config import Config, read_toml
from dinfer.errors import DinferError
from dinfer.rank.debugger import FIRST_PORT
from dinfer.run.measurement import without_auto
from dinfer.trace.export import write_whole

Entry = dict[str, Any]

RANKS = 3

MASTER_PORT = 29571

DAY_S = "86400"
"""time-outs of debugged runs, so that a rank at a breakpoint is not taken for hung"""

PROMPT = "The code of Lima is 471. What is the code of Lima? The code of Lima is"

ALL_RANKS, ATTACH_TO_ALL = "Debug Distributed Inference (3 Ranks)", "Attach to all ranks"


DEBUG_TYPE, DEBUG_RUN, ATTACH_TO_RUN = (
    "dinfer",
    "dinfer: debug a run",
    "dinfer: attach to the run of a cluster",
)
"""the debug type of dinfer's extension for VS Code, and its entries"""


class LaunchFileError(DinferError, ValueError):
    """A launch.json to which entries cannot be added; the message says why, and what to do."""


def launch_file(config: str = "") -> Entry:
    """A whole launch.json. The runs take their parameters from the TOML file `config` or, without one, use the demo
    model and a prompt."""
    given = ["--config", config] if config else ["--model", "demo", "--prompt", PROMPT]
    arguments = ["run", *given, "--timeout", DAY_S, "--start-timeout", DAY_S]
    ranks = [_rank(rank, arguments) for rank in range(RANKS)]
    runs = [
        _launch(f"dinfer run, {strategy} (attach to its ranks)", [*arguments, "--sync-strategy", strategy])
        | {"env": {"DINFER_DEBUGPY": "1"}, "presentation": {"group": "3 run", "order": order}}
        for order, strategy in enumerate(("pairwise", "ring"))
    ]
    attached = [_attach(rank) for rank in range(RANKS)]
    all_ranks = {"name": ALL_RANKS, "configurations": [entry["name"] for entry in ranks], "stopAll": True}
    attach_to_all = {"name": ATTACH_TO_ALL, "configurations": [entry["name"] for entry in attached]}
    compounds = [
        {**all_ranks, "presentation": {"group": "1 all", "order": 0}},
        {**attach_to_all, "presentation": {"group": "4 attach", "order": RANKS}},
    ]
    return {
        "version": "0.2.0",
        "configurations": [*ranks, *runs, *attached, *dinfer_entries(config)],
        "compounds": compounds,
    }


def write_entries(folder: str | Path = ".", config: str = "") -> Path:
    """Add the entries to the folder's launch.json, which is made where there is none; entries of the same names are
    replaced, all others stay. Returns the file. `config`: from that folder. Raises LaunchFileError, ConfigError,
    OSError."""
    path = Path(folder) / ".vscode" / "launch.json"
    if not Path(folder).is_dir():
        raise LaunchFileError(f"there is no folder {str(folder)!r}; name one that exists: --folder PATH.")
    if config and "${" not in config:  # else one of VS Code's variables, which only it knows
        Config.of(without_auto(read_toml(Path(folder) / Path(config).expanduser()))[0])
    merged = _merged(_read(path), launch_file(config), path)
    path.parent.mkdir(exist_ok=True)
    write_whole(path, [json.dumps(merged, ensure_ascii=False, indent=4) + "\n"])
    return path


def _merged(there: Entry, ours: Entry, path: Path) -> Entry:
    """What was there, with our entries in place of those of the same names, and the others of ours behind them."""
    merged = {"version": ours["version"], **there}
    for kind in ("configurations", "compounds"):
        entries = merged.get(kind, [])
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise LaunchFileError(
                f"{kind!r} in {path} is not a list of entries; mend it, or move the file away."
            )
        new = {entry["name"]: entry for entry in ours[kind]}
        merged[kind] = [new.pop(entry.get("name", ""), entry) for entry in entries]
        merged[kind] += new.values()
    return merged


def _read(path: Path) -> Entry:
    """The file as it is; {} where there is none."""
    try:
        text = path.read_text(encoding="utf-8")
        read = json.loads(text) if text.strip() else {}
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise LaunchFileError(
            f"{path} is not plain JSON ({error}). VS Code allows comments and trailing commas there, which would be "
            "lost: remove them and run this again, or write the entries elsewhere (--folder PATH) and copy them."
        ) from None
    if not isinstance(read, dict):
        raise LaunchFileError(f"{path} is not a JSON object; mend it, or move the file away.")
    return read


def _launch(name: str, arguments: list[str]) -> Entry:
    return {
        "name": name,
        "type": "debugpy",
        "request": "launch",
        "module": "dinfer",
        "cwd": "${workspaceFolder}",
        "justMyCode": False,
        "subProcess": False,
        "console": "integratedTerminal",
        "args": arguments,
    }


def _rank(rank: int, arguments: list[str]) -> Entry:
    """One rank under a debugger of its own; it joins as the rank that its environment names."""
    environment = {
        "DINFER_JOIN": "1",
        "RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(MASTER_PORT),
        "OMP_NUM_THREADS": "1",
    }
    shown = {"presentation": {"group": "2 ranks", "order": rank}}
    return _launch(f"Rank {rank}", arguments) | {"env": environment} | shown


def dinfer_entries(config: str = "") -> list[Entry]:
    """The entries of `dinfer dap`, whose debug type dinfer's extension brings: launch and attach."""
    return [_dinfer_launch(config), _dinfer_attach()]


def _dinfer_launch(config: str) -> Entry:
    given = {"config": config} if config else {"model": "demo", "prompt": PROMPT, "chunk_size": 8}
    return {
        "name": DEBUG_RUN,
        "type": DEBUG_TYPE,
        "request": "launch",
        "cwd": "${workspaceFolder}",
        **given,
        "ranks": RANKS,
        "where": "ipyparallel",
        "stopOnEntry": True,
        "presentation": {"group": "0 dinfer", "order": 0},
    }


def _dinfer_attach() -> Entry:
    return {
        "name": ATTACH_TO_RUN,
        "type": DEBUG_TYPE,
        "request": "attach",
        "profile": "default",
        "take": True,
        "presentation": {"group": "0 dinfer", "order": 1},
    }


def _attach(rank: int) -> Entry:
    return {
        "name": f"Attach to rank {rank}",
        "type": "debugpy",
        "request": "attach",
        "connect": {"host": "127.0.0.1", "port": FIRST_PORT + rank},
        "justMyCode": False,
        "subProcess": False,
        "presentation": {"group": "4 attach", "order": rank},
    }
