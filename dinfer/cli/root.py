"""Shared by all commands: the app, exit statuses, and ending with a message."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer import Exit

from dinfer.config import ConfigError
from dinfer.display import takes_colour
from dinfer.files import FolderError, check_folder, make_folder, not_html
from dinfer.severity import Severity
from dinfer.version import __version__

app = typer.Typer(
    name="dinfer",
    help="An interactive debugger for distributed LLM inference.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130

OUTPUT_CLOSED = 141
"""what a shell says of a program that the closing of a pipe has ended: 128 + SIGPIPE"""


def _show_version(asked: bool) -> None:
    if asked:
        print(f"dinfer {__version__}")
        raise Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="show the version")
    ] = False,
) -> None:
    """What every command takes."""


def stop(message: object, status: int) -> NoReturn:
    """Print a message to standard error and exit."""
    severity = Severity.NOTE if status == INTERRUPTED else Severity.ERROR
    print(f"dinfer: {severity.marked(str(message), colour=takes_colour(sys.stderr))}", file=sys.stderr)
    raise Exit(status)


def log(text: str) -> None:
    """Print a line of progress to standard error."""
    print(text, file=sys.stderr, flush=True)


def check_outputs(
    outputs: Mapping[str, str],
    inputs: Mapping[str, str] | None = None,
    *,
    overwrite: bool = False,
    report: str = "--report",
) -> None:
    """Called before any work starts. Raises ConfigError if a file that is to be written could not be, or would replace
    an input, another output or, unless `overwrite`, a file that exists; or if that of `report` is no name for a
    report. Both: paths by flag, "" for none. `report`: a flag."""
    taken = {Path(path).expanduser().resolve(): flag for flag, path in (inputs or {}).items() if path}
    for flag, path in outputs.items():
        if not path:
            continue
        target = Path(path).expanduser().resolve()
        if other := taken.get(target):
            raise ConfigError(
                f"{flag} and {other} are one file, {path}: it would be overwritten. Give another."
            )
        if flag == report and (why := not_html(path)):
            raise ConfigError(f"{flag} is {path!r}, but {why}.")
        if target.is_dir():
            raise ConfigError(f"{flag} is {path!r}, which is a folder; give a file.")
        try:
            check_folder(target)
        except FolderError as error:
            raise ConfigError(f"{flag} is {path!r}, but {error}.") from None
        if target.is_file() and target.stat().st_size and not overwrite:
            raise ConfigError(
                f"{flag} is {path!r}, which exists: give another name, or --overwrite to replace it."
            )
        taken[target] = flag


def keep_json(result: dict[str, Any], path: str) -> None:
    """Write a result as JSON, or exit with a message."""
    try:
        make_folder(path).write_text(
            json.dumps(result, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
        )
    except OSError as error:
        stop(
            f"the command succeeded, but its result could not be written to {path}: {error.strerror}.", FAILED
        )
