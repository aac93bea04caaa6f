"""What all commands share: the app they register with, and how one ends: one message and an exit status."""

import sys
from typing import Any, NoReturn

import typer

app = typer.Typer(
    name="dinfer",
    help="An interactive debugger for distributed LLM inference.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130


def stop(message: object, status: int) -> NoReturn:
    print(f"dinfer: {message}", file=sys.stderr)
    raise typer.Exit(status)


def keep_json(result: dict[str, Any], path: str) -> None:
    from dinfer.run.result import write_json

    try:
        write_json(result, path)
    except OSError as error:
        stop(f"all went well, but the result could not be written to {path}: {error.strerror}.", FAILED)
