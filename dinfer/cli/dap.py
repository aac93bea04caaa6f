"""`dinfer dap`: the Debug Adapter Protocol, on standard input and output or at a port."""

from typing import Annotated

from typer import Option

from dinfer.cli.root import BAD_INPUT, INTERRUPTED, app, log, stop
from dinfer.config import ConfigError


@app.command()
def dap(
    port: Annotated[
        int | None,
        Option(
            help="listen at this port of 127.0.0.1 for clients, one after another; 0: any free one; "
            "default: speak on standard input and output",
            min=0,
            max=65535,
        ),
    ] = None,
) -> None:
    """Speak the Debug Adapter Protocol, with which VS Code and other editors debug a run: ranks are threads."""
    from dinfer.dap.serve import serve_port, serve_stdio

    try:
        if port is None:
            serve_stdio()
        else:
            serve_port(port, log)
    except ConfigError as error:
        stop(error, BAD_INPUT)
    except KeyboardInterrupt:
        stop("interrupted; runs that were launched here have ended.", INTERRUPTED)
