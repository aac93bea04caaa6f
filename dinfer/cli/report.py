"""`dinfer report`: a trace, or several side by side, as one HTML file."""

from pathlib import Path
from typing import Annotated

import typer

from dinfer.cli.root import BAD_INPUT, FAILED, app, stop
from dinfer.trace.embedded import read_traces
from dinfer.trace.export import TraceError


@app.command()
def report(
    traces: Annotated[
        list[str], typer.Argument(help="what `dinfer run --trace` or a report holds; several are compared")
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="the file to write")] = "report.html",
) -> None:
    """Write a report that opens without network or kernel. Status 0: written; 1: not written; 2: not a trace."""
    try:
        found = [(Path(path).stem, read_traces(path)) for path in traces]
    except OSError as error:
        stop(f"the trace {error.filename!r} cannot be read: {error.strerror}.", BAD_INPUT)
    except TraceError as error:
        stop(error, BAD_INPUT)
    from dinfer.views.report.page import write_report

    runs = [trace for _, some in found for trace in some]
    names = [
        name if len(some) == 1 else f"{name}, run {n}"
        for name, some in found
        for n in range(1, len(some) + 1)
    ]
    if len(set(names)) < len(names):
        names = [f"{n}: {name}" for n, name in enumerate(names, 1)]
    try:
        print(f"report: {write_report(runs, output, names if len(names) > 1 else ())}")
    except OSError as error:
        stop(f"the report could not be written to {output}: {error.strerror}.", FAILED)
