"""Reproduce: the commands that give a run again, from its parameters. The prompt is there only where asked for."""

import shlex
from dataclasses import fields
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


def commands(config: Config, *, prompt: bool) -> dict[str, str]:
    """What to type, by place."""
    return {"In a terminal": _shell(config, prompt), "In a notebook": _notebook(config, prompt)}


def parameters(config: Config) -> dict[str, Any]:
    """All that a run was given, but for its prompt and what changes nothing in it."""
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


def _notebook(config: Config, prompt: bool) -> str:
    chosen = _chosen(config)
    world_size = chosen.pop("world_size")
    load = {name: value for name, value in chosen.items() if name in LOADED and name != "model_path"}
    run = {name: value for name, value in chosen.items() if name not in LOADED and name != "backend"}
    given = _prompt(config, prompt)[1]
    prefill = ", ".join([repr(given), *(f"{name}={value!r}" for name, value in run.items())])
    loaded = ", ".join([repr(config.model_path), *(f"{name}={value!r}" for name, value in load.items())])
    return "\n".join(
        [
            "import dinfer",
            f"session = dinfer.connect(n={world_size})",
            f"session.load({loaded})",
            f"run = session.prefill({prefill})",
            f"run.wait(); run.decode({config.max_new_tokens})",
        ]
    )


def _chosen(config: Config) -> dict[str, Any]:
    """What differs from the default, and what a reader wants to see in any case."""
    always = {"model_path", "world_size", "chunk_size", "sync_strategy", "schedule"}
    return {
        item.name: getattr(config, item.name)
        for item in fields(config)
        if item.name not in NOT_OF_THE_RUN
        and (item.name in always or getattr(config, item.name) != item.default)
    }


def _prompt(config: Config, shown: bool) -> tuple[str, Any]:
    """The parameter that held the prompt, and the prompt, or a sign that it was left out."""
    name = next((name for name in PROMPTS if getattr(config, name)), "prompt")
    return name, getattr(config, name) if shown else HIDDEN
