"""Shared by all commands: the app, exit statuses, and ending with a message."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer import Exit

from dinfer.version import __version__

app = typer.Typer(
    name="dinfer",
    help="An interactive debugger for distributed LLM inference.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130


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
    print(f"dinfer: {message}", file=sys.stderr)
    raise Exit(status)


def log(text: str) -> None:
    """Print a line of progress to standard error."""
    print(text, file=sys.stderr, flush=True)


def keep_json(result: dict[str, Any], path: str) -> None:
    """Write a result as JSON, or exit with a message."""
    try:
        Path(path).write_text(json.dumps(result, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        stop(
            f"the command succeeded, but its result could not be written to {path}: {error.strerror}.", FAILED
        )
