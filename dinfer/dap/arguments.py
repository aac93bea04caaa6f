"""The arguments of `launch` and `attach`, as a launch.json has them: checked before anything is started."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from dinfer.arguments import nearest
from dinfer.config import Config, ConfigError, read_toml
from dinfer.errors import excerpt

OF_LOAD = ("dtype", "gpu_ids", "threads", "kernels", "backend")
"""parameters that `session.load` takes"""

OF_PROCESSES = ("device_mode", "master_addr", "master_port", "start_timeout", "log_dir", "log_level")
"""parameters in a TOML file that are of `dinfer run` alone"""

PROMPTS = ("prompt", "prompt_file", "prompt_ids")

OF_EDITORS = frozenset({
    "name", "type", "request", "order", "presentation", "preLaunchTask", "postDebugTask", "internalConsoleOptions",
    "debugServer", "restart", "windows", "osx", "linux", "serverReadyAction", "suppressMultipleSessionWarning",
})  # fmt: skip
"""of a launch entry, but for the editor"""

AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class TargetArguments:
    """What to start or join. `where`: "ipyparallel", "threads", or a profile of ipyparallel by its name;
    `parameters`: those of the run's config."""

    model: str = "demo"
    prompt: str = ""
    prompt_file: str = ""
    ranks: int | None = None
    where: str = "ipyparallel"
    profile: str = "default"
    cluster_id: str | None = None
    take: bool = False
    cwd: str = ""
    stop_on_entry: bool = True
    no_debug: bool = False
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def of_load(self) -> dict[str, Any]:
        """The parameters of `session.load`."""
        return {name: value for name, value in self.parameters.items() if name in OF_LOAD}

    @property
    def of_prefill(self) -> dict[str, Any]:
        """Those of `session.prefill`, but for the prompt."""
        return {name: value for name, value in self.parameters.items() if name not in OF_LOAD}

    def prompt_of_run(self) -> str | list[int]:
        """The prompt: text, that of a file, or token ids. Raises ConfigError."""
        ids = self.parameters.get("prompt_ids")
        given = [bool(self.prompt), bool(self.prompt_file), bool(ids)]
        if sum(given) != 1:
            found = "none of them is" if not any(given) else "more than one is"
            raise ConfigError(
                f"a launch has one prompt, but {found} given: prompt (text), promptFile or promptIds (a list)."
            )
        if ids:
            return list(ids)
        if not self.prompt_file:
            return self.prompt
        return Config.of({"prompt_file": str(Path(self.cwd) / self.prompt_file)}).prompt_text()


OWN = tuple(one.name for one in fields(TargetArguments) if one.name not in ("parameters", "no_debug"))

KINDS: dict[str, tuple[type, str]] = {
    **dict.fromkeys(
        ("model", "prompt", "prompt_file", "where", "profile", "cluster_id", "cwd"), (str, "text")
    ),
    **dict.fromkeys(("take", "stop_on_entry", "no_debug"), (bool, "true or false")),
    "ranks": (int, "a whole number"),
}


def launch_arguments(given: Mapping[str, Any]) -> TargetArguments:
    """Those of a launch. Raises ConfigError."""
    found = _in_its_folder(_read(_with_file(given), "launch"))
    if found.where == "ipyparallel" or found.where == "threads":
        place = found.where
    else:  # a profile by its name
        place = "ipyparallel"
        if found.profile not in ("default", found.where):
            raise ConfigError(
                f"where is {excerpt(found.where)} and profile is {excerpt(found.profile)}: give where as "
                '"ipyparallel", "threads", or one profile.'
            )
    if found.take:
        raise ConfigError('take is of "request": "attach"; a launch begins a run of its own.')
    prompt = found.prompt_of_run()
    _check_parameters(found, prompt)
    profile = found.profile if found.where in ("ipyparallel", "threads") else found.where
    values = {one.name: getattr(found, one.name) for one in fields(found)}
    return TargetArguments(**{**values, "where": place, "profile": profile})


def _in_its_folder(found: TargetArguments) -> TargetArguments:
    """With `cwd` as an absolute path, and the model's, if it is a folder there; else it is "demo", or another name."""
    if not found.cwd:
        return found
    cwd = os.path.abspath(found.cwd)
    folder = os.path.join(cwd, os.path.expanduser(found.model))
    is_there = found.model != "demo" and os.path.isdir(folder)
    return replace(found, cwd=cwd, model=folder if is_there else found.model)


def _with_file(given: Mapping[str, Any]) -> dict[str, Any]:
    """With the parameters of the TOML file that `config` names; what is given beside it counts more."""
    if (path := given.get("config")) is None:
        return dict(given)
    if not isinstance(path, str):
        raise ConfigError(f"config is {excerpt(path)}; it must be text: the path of a TOML file.")
    file = read_toml(Path(str(given.get("cwd", ""))) / path)
    names = {_name_of(key) for key in given}
    if names & {*PROMPTS}:
        file = {name: value for name, value in file.items() if name not in PROMPTS}
    file = {
        name: value
        for name, value in file.items()
        if name not in OF_PROCESSES and _name_of(name) not in names
    }
    return {**file, **{key: value for key, value in given.items() if key != "config"}}


def attach_arguments(given: Mapping[str, Any]) -> TargetArguments:
    """Those of an attach. Raises ConfigError."""
    found = _read(given, "attach")
    if found.where == "threads":
        raise ConfigError(
            'where is "threads", but ranks in threads are in the process that has made them, where nobody can attach: '
            'use "request": "launch", or engines of ipyparallel.'
        )
    of_launch = [key for key in given if _name_of(key) in ("model", "prompt", "prompt_file")]
    if extra := [*of_launch, *found.parameters]:
        raise ConfigError(
            f'{extra[0]} is of "request": "launch": attach goes on with the run that the ranks hold.'
        )
    if found.where != "ipyparallel":
        values = {one.name: getattr(found, one.name) for one in fields(found)}
        return TargetArguments(**{**values, "where": "ipyparallel", "profile": found.where})
    return found


def _read(given: Mapping[str, Any], request: str) -> TargetArguments:
    known = [*OWN, *(one.name for one in fields(Config) if one.name not in OWN)]
    own, parameters = dict[str, Any](), dict[str, Any]()
    for key, value in given.items():
        name = _name_of(key)
        if key.startswith("__") or key in OF_EDITORS:
            continue
        if name in KINDS:
            own[name] = _checked(key, name, value)
        elif name in known:
            parameters[name] = value
        else:
            raise ConfigError(
                f"unknown argument {excerpt(key)} of {request}.{nearest(name, known)} The arguments are "
                f"{', '.join(map(_camel, OWN))}, config (a TOML file), and the parameters of `dinfer run`, such as "
                "chunk_size, sync_strategy, schedule, max_new_tokens."
            )
    return TargetArguments(**own, parameters=parameters)


def _checked(key: str, name: str, value: Any) -> Any:
    kind, words = KINDS[name]
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        if isinstance(value, int) and kind is int and value < 1:
            raise ConfigError(f"{key} is {value}; it must be at least 1.")
        return value
    raise ConfigError(f"{key} is {excerpt(value)}; it must be {words}.")


def _check_parameters(found: TargetArguments, prompt: str | list[int]) -> None:
    """Raises ConfigError for a value that no run takes. What is "auto" is chosen once the ranks are there."""
    values = {name: value for name, value in found.parameters.items() if value != AUTO or name in OF_LOAD}
    values.pop("prompt_ids", None)
    text = {"prompt": prompt} if isinstance(prompt, str) else {"prompt_ids": prompt}
    ranks = {"world_size": found.ranks} if found.ranks else {}
    Config.of({"model_path": found.model, "log_dir": "", **text, **values, **ranks})


def _name_of(key: str) -> str:
    """The field, or parameter, that a key means: `chunkSize` is `chunk_size`; those of `dinfer run` are known too."""
    name = re.sub(r"(?<=[a-z0-9])([A-Z])", r"_\1", key).lower()
    return {"model_path": "model", "world_size": "ranks"}.get(name, name)


def _camel(name: str) -> str:
    """As launch.json has it; parameters of runs keep their names."""
    first, *rest = name.split("_")
    return first + "".join(map(str.capitalize, rest)) if name in OWN else name
