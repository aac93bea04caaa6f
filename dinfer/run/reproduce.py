"""The commands that reproduce a run, from its parameters and what was done to it."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from dinfer.config import Config

PROMPTS = ("prompt", "prompt_ids", "prompt_file")

LOADED = {"model_path": "model_path", "dtype": "dtype", "gpu_ids": "gpu_ids", "threads": "threads"}

NOT_OF_THE_RUN = {
    *PROMPTS,
    "log_dir",
    "log_level",
    "master_addr",
    "master_port",
    "start_timeout",
    "device_mode",
}

HIDDEN = "…"


@dataclass(frozen=True)
class Done:
    """What was done to a run besides giving it its parameters: `faults` and `breakpoints` as calls; `new_tokens`: their
    number; `own_plan`: the user has written the plan; `edited`: something was changed by hand, which no call
    repeats."""

    faults: Sequence[str] = ()
    breakpoints: Sequence[str] = ()
    new_tokens: int = 0
    own_plan: bool = False
    edited: bool = False


def commands(config: Config, done: Done, *, prompt: bool) -> dict[str, str]:
    """What to type, by where; with the prompt only if `prompt`."""
    notebook = {"In a notebook": _notebook(config, done, prompt)}
    if done.own_plan:  # only a session accepts it
        return notebook
    less = ", without what was broken or edited" * bool(done.faults or done.edited)
    return {f"In a terminal{less}": _shell(config, prompt), **notebook}


def parameters(config: Config) -> dict[str, Any]:
    """The parameters of a run, without its prompt and those that do not change the run."""
    return {
        item.name: getattr(config, item.name) for item in fields(config) if item.name not in NOT_OF_THE_RUN
    }


def _shell(config: Config, prompt: bool) -> str:
    words = ["dinfer", "run"]
    for name, value in _chosen(config).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    name, value = _prompt(config, prompt)
    said = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return shlex.join([*words, f"--{name.replace('_', '-')}", said])


def _notebook(config: Config, done: Done, prompt: bool) -> str:
    chosen = _chosen(config)
    world_size = chosen.pop("world_size")
    load = {name: value for name, value in chosen.items() if name in LOADED and name != "model_path"}
    left_out = {*LOADED, "backend"} | ({"schedule", "sync_strategy"} if done.own_plan else set())
    run = [f"{name}={value!r}" for name, value in chosen.items() if name not in left_out]
    calls = [*done.faults, *done.breakpoints]
    run += ["plan=Path('plan.txt').read_text()"] * done.own_plan + ["paused=True"] * bool(calls)
    given = _prompt(config, prompt)[1]
    prefill = ", ".join([repr(given), *run])
    moves = ["run.resume()"] * bool(calls) + ["run.wait()"]
    moves += [f"run.decode({done.new_tokens})"] * bool(done.new_tokens and not done.breakpoints)
    loaded = ", ".join([repr(config.model_path), *(f"{name}={value!r}" for name, value in load.items())])
    return "\n".join(
        [
            *["from pathlib import Path"] * done.own_plan,
            "import dinfer",
            f"session = dinfer.connect(n={world_size})",
            f"session.load({loaded})",
            *["# plan.txt: the text of the plan, which is in this report"] * done.own_plan,
            f"run = session.prefill({prefill})",
            *calls,
            "; ".join(moves),
            *["# what was edited by hand is not repeated by this"] * done.edited,
        ]
    )


def _chosen(config: Config) -> dict[str, Any]:
    """The parameters that differ from their defaults, and those that a reader always wants to see."""
    always = {"model_path", "world_size", "chunk_size", "sync_strategy", "schedule"}
    return {
        item.name: getattr(config, item.name)
        for item in fields(config)
        if item.name not in NOT_OF_THE_RUN
        and (item.name in always or getattr(config, item.name) != item.default)
    }


def _prompt(config: Config, shown: bool) -> tuple[str, Any]:
    """The parameter that held the prompt, and the prompt, or … if it is not shown."""
    name = next((name for name in PROMPTS if getattr(config, name)), "prompt")
    return name, getattr(config, name) if shown else HIDDEN
