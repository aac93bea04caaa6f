"""`dinfer doctor` and `dinfer clean`: is this machine fit, and what has been left on it?"""

from typing import Annotated

import typer

from dinfer.cli.root import BAD_INPUT, app, stop
from dinfer.config import ConfigError


@app.command()
def doctor(
    model: Annotated[
        str, typer.Option(help="a checkpoint folder, to compare its memory with what is free")
    ] = "",
    world_size: Annotated[int, typer.Option(help="number of ranks to try out together")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Check this machine: versions, devices, network, memory, leftovers. Status 0: fit; 1: something to mend."""
    from dinfer.session.doctor.doctor import doctor as examine

    try:
        status = examine(model or None, world_size, as_json)
    except ConfigError as error:
        stop(error, BAD_INPUT)
    raise typer.Exit(status)


@app.command()
def clean(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would be ended")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """End clusters that dinfer started and whose client is gone, and nothing else. Status 1: one could not be ended."""
    from dinfer.session.clusters.clean import clean as find_and_end
    from dinfer.session.clusters.clean import report

    text, status = report(find_and_end(dry_run=dry_run), as_json)
    print(text)
    raise typer.Exit(status)
