"""`dinfer lab`: ranks misbehave on purpose; is the right one named, and for the right reason?"""

import sys
from typing import Annotated

import typer

from dinfer.cli.root import BAD_INPUT, FAILED, INTERRUPTED, app, keep_json, stop


@app.command()
def lab(
    sample: Annotated[
        int | None, typer.Option(help="so many cells, spread over the faults; default: the whole matrix")
    ] = None,
    seed: Annotated[int, typer.Option(help="which cells, and in which order")] = 0,
    slow_runs: Annotated[
        int, typer.Option(help="so many runs more that are slow, and move: is an alarm raised?")
    ] = 0,
    json_path: Annotated[str, typer.Option("--json", help="write what was found to this file")] = "",
    join: Annotated[
        bool, typer.Option("--join", help="use the cluster of 3 that runs; its engines are killed on purpose")
    ] = False,
    links: Annotated[
        str,
        typer.Option(
            help="where links are cut and slowed: namespaces (of the network, needs root), transport, or auto: "
            "namespaces where this machine allows"
        ),
    ] = "auto",
) -> None:
    """Run communication faults on a real cluster and judge what is said of them. Status 0: all right; 1: something not;
    2: no such lab."""
    from dinfer.config import ConfigError
    from dinfer.session.lab.cells import cells_of
    from dinfer.session.lab.lab import run_lab
    from dinfer.session.lab.score import Score

    for name, count in (("sample", sample or 0), ("slow_runs", slow_runs)):
        if count < 0:
            stop(f"{name} is {count}; it must be 0 or more.", BAD_INPUT)
    cells = cells_of(seed, sample)
    score, status = Score(seed, len(cells)), FAILED
    try:
        run_lab(cells, score, _say, slow_runs=slow_runs, join=join, links=links)
        status = 0 if score.all_right else FAILED
    except ConfigError as error:
        stop(str(error), BAD_INPUT)
    except KeyboardInterrupt:
        status = INTERRUPTED
        _say("dinfer: interrupted; what was found so far:")
    except (RuntimeError, TimeoutError) as error:
        _say(f"dinfer: the lab cannot go on: {error}")
    _tell(score.table(), score.as_dict(), json_path)
    raise typer.Exit(status)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _tell(table: str, found: dict[str, object], json_path: str) -> None:
    from dinfer.session.machine import machine, versions

    print(table)
    if json_path:
        keep_json({**found, "machine": machine(), "versions": versions()}, json_path)
