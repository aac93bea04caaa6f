"""`dinfer run`: each parameter of Config is a flag of the same name."""

import inspect
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

from typer import Exit, Option

from dinfer.cli.root import BAD_INPUT, FAILED, INTERRUPTED, app, check_outputs, keep_json, stop
from dinfer.config import Config, ConfigError, read_toml
from dinfer.errors import DinferError
from dinfer.launch.environment import Launched, launched_as, speaks
from dinfer.run.measurement import AUTOS, LOSSLESS, without_auto

SILENCE_S = 5.0

_METAVARS = {int: "<int>", float: "<float>", tuple: "<int,int,…>"}
"""what `--help` calls the value of a parameter whose default is of this type; text is typer's `<str>`"""

FASTEST = "the fastest by what the ranks measure first"

_BY_AUTO = {"codec": f"of {' and '.join(LOSSLESS)}, {FASTEST}"}
"""what auto takes, where that is not the fastest of all values"""


def run(**given: Any) -> None:
    """Generate from a checkpoint on several ranks, started here or by torchrun or mpirun."""
    values, launched = {name: value for name, value in given.items() if value is not None}, None
    json_path, trace_path, toml, overwrite = (
        values.pop(name, None) for name in ("json", "trace", "config", "overwrite")
    )
    try:
        launched = launched_as(os.environ)
        values, auto = without_auto(_for_launched({**(read_toml(toml) if toml else {}), **values}, launched))
        config = Config.of(values)
        if launched is None or launched.rank == 0:
            outputs = {"--json": json_path or "", "--trace": trace_path or ""}
            inputs = {"--prompt-file": config.prompt_file, "--config": toml or ""}
            check_outputs(outputs, inputs, overwrite=bool(overwrite))
        if launched:
            from dinfer.launch.join import join

            result = join(config, launched, trace_path, auto)
        else:
            result = _run_here(config, trace_path, auto)
    except KeyboardInterrupt:
        stop("interrupted; all ranks were ended.", INTERRUPTED)
    except BrokenPipeError:
        sys.stdout = sys.stderr  # closing standard output at exit would fail again
        stop("standard output was closed, so the run and all its ranks were ended.", FAILED)
    except (DinferError, OSError, RuntimeError) as error:
        if not speaks(launched):
            # Only one rank reports an error that all ranks have. The others end later, since a launcher ends all ranks
            # when one ends.
            time.sleep(SILENCE_S)
            raise Exit(FAILED) from None
        stop(error, BAD_INPUT if isinstance(error, ValueError) else FAILED)
    if json_path and result:
        keep_json(result, json_path)


def _run_here(config: Config, trace_path: str | None, auto: Sequence[str]) -> dict[str, Any]:
    from dinfer.job import prepare

    job = prepare(config)  # before torch is imported, so that mistakes are reported at once
    from dinfer.launch.processes import interrupt_as_error
    from dinfer.launch.runner import run as run_job
    from dinfer.rank.logs import new_run_folder

    interrupt_as_error()
    folder = new_run_folder(Path(config.log_dir))
    return run_job(replace(job, config=job.config.with_(log_dir=str(folder))), trace_path, auto=auto)


def _for_launched(values: dict[str, Any], launched: Launched | None) -> dict[str, Any]:
    """Take the number of ranks from the launcher. Raises ConfigError if another one was given."""
    if launched is None:
        return values
    asked = values.get("world_size", launched.world_size)
    if str(asked) != str(launched.world_size):
        raise ConfigError(
            f"world_size is {asked}, but {launched.launcher} has started {launched.world_size} processes: "
            f"leave world_size out, or start {asked} processes."
        )
    return {**values, "world_size": launched.world_size}


def _options() -> list[inspect.Parameter]:
    """Those of `run`: one for each parameter of Config, as text, since Config converts and checks values."""

    def option(name: str, text: str, kind: Any, *flags: str, metavar: str | None = None) -> inspect.Parameter:
        annotation: Any = Annotated[
            kind | None, Option(*flags, help=text, metavar=metavar, show_default=False)
        ]
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)

    options = [
        option("config", "a TOML file with any of these parameters; flags override it", str, "--config"),
        option("json", "write the result to this file as JSON", str, "--json"),
        option("trace", "write the trace to this file; default: beside the run's logs", str, "--trace"),
        option("overwrite", "replace the files of --json and --trace if they exist", bool, "--overwrite"),
    ]
    for item in fields(Config):
        flag = "--" + item.name.replace("_", "-")
        is_switch = isinstance(item.default, bool)
        flags = [f"{flag}/--no-{flag[2:]}" if is_switch else flag] + ["--model"] * (item.name == "model_path")
        shown = ",".join(map(str, item.default)) if isinstance(item.default, tuple) else item.default
        chosen = f"; auto: {_BY_AUTO.get(item.name, FASTEST)}" * (item.name in AUTOS)
        # In brackets, the default would be taken for markup, and not be shown.
        text = item.metadata["help"] + chosen + (f"; default: {shown}" if shown not in ("", False) else "")
        kind, metavar = (bool, None) if is_switch else (str, _METAVARS.get(type(item.default)))
        options.append(option(item.name, text, kind, *flags, metavar=metavar))
    return options


run.__signature__ = inspect.Signature(_options())  # type: ignore[attr-defined]
run.__annotations__ = {option.name: option.annotation for option in _options()}

app.command()(run)
