"""`dinfer watch` and `dinfer explain`: verdicts on other people's distributed code."""

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Exit, Option

from dinfer.cli.root import BAD_INPUT, FAILED, app, check_outputs, keep_json, stop
from dinfer.config import Config, ConfigError
from dinfer.display import takes_colour
from dinfer.errors import DinferError
from dinfer.severity import Severity


@app.command(context_settings={"allow_interspersed_args": False, "ignore_unknown_options": False})
def watch(
    command: Annotated[
        list[str], Argument(help="the command, after --: torchrun, mpirun, python, a shell script …")
    ],
    report: Annotated[str, Option(help="write a report to this HTML file")] = "",
    json_path: Annotated[str, Option("--json", help="write verdict, findings and links to this file")] = "",
    trace: Annotated[str, Option(help="write the trace to this file [default: beside the records]")] = "",
    folder: Annotated[
        str, Option(help="where the processes write their records [default: a new one in dinfer-logs]")
    ] = "",
    kv: Annotated[
        str, Option(help="a method that adds to a KV cache of your own: package.module:Class.method")
    ] = "",
    k: Annotated[
        str, Option("--k", help="with --kv: the new K, an expression of its arguments and result")
    ] = "",
    v: Annotated[str, Option("--v", help="with --kv: the new V")] = "",
    layer: Annotated[str, Option(help="with --kv: the layer")] = "",
    quiet: Annotated[bool, Option("--quiet", help="no lines about ranks while all goes well")] = False,
    overwrite: Annotated[
        bool, Option("--overwrite", help="replace the files of --report, --json and --trace if they exist")
    ] = False,
) -> None:
    """Run a command and say why it hangs or crashes. Status: the command's own."""
    from dinfer.rank.logs import new_run_folder
    from dinfer.watching.command import NOT_STARTED, CommandLines, PassedOn, WatchedCommand

    try:
        if (k or v or layer or kv) and not (k and v and layer and ":" in kv):
            raise ConfigError(
                "--kv package.module:Class.method takes --k, --v and --layer: all four, or none."
            )
        check_outputs({"--report": report, "--json": json_path, "--trace": trace}, overwrite=overwrite)
        place = Path(folder) if folder else new_run_folder(Path(Config.log_dir))
        if folder and place.is_dir() and any(place.iterdir()):
            raise ConfigError(f"--folder is {folder!r}, which is not empty: give another.")
    except (ConfigError, OSError) as error:
        stop(error, BAD_INPUT)
    lines = CommandLines(sys.stderr)
    tapped = [{"method": kv, "k": k, "v": v, "layer": layer}]
    environment = {"DINFER_WATCH_KV": json.dumps(tapped)} if kv else {}
    try:
        running = WatchedCommand(command, place, tell=lines.verdict, environment=environment)
    except FileNotFoundError:
        stop(f"the command {command[0]!r} was not found.", NOT_STARTED)
    except OSError as error:
        stop(f"the command {command[0]!r} cannot be started: {error.strerror}.", NOT_STARTED - 1)

    def on_interrupt() -> None:
        if running.alarm.standing is None:
            for rank in running.evidence.ranks:
                lines.say(f"dinfer: interrupted; rank {rank} {running.evidence.where(rank)}")

    with PassedOn(running, on_interrupt):
        status = running.wait(None if quiet else lines.ranks)
        lines.conclusion(running)
        kept = running.evidence.kept(running.verdict, state="" if running.verdict or not status else "failed")
        with suppress(Exit):  # it has said so; the status is the command's own
            _write(kept, trace or str(place / "trace.jsonl"), report, lines.say)
        if json_path:
            keep_json(running.evidence.as_dict(status, running.verdict), json_path)
    raise Exit(status)


@app.command()
def explain(
    paths: Annotated[
        list[str],
        Argument(
            help="folders of `dinfer watch`, one for each host; traces; flight-recorder dumps of PyTorch"
        ),
    ],
    report: Annotated[str, Option(help="write a report to this HTML file")] = "",
    json_path: Annotated[str, Option("--json", help="write verdict, findings and links to this file")] = "",
    overwrite: Annotated[
        bool, Option("--overwrite", help="replace the files of --report and --json if they exist")
    ] = False,
) -> None:
    """Say why recorded ranks hung or failed. Status 0: nothing is wrong; 1: something is; 2: nothing to explain."""
    from dinfer.watching.figures import table_of
    from dinfer.watching.given import read

    try:
        inputs = {f"the input {path!r}": path for path in paths if Path(path).is_file()}
        check_outputs({"--report": report, "--json": json_path}, inputs, overwrite=overwrite)
        found = read(paths)
        verdict = found.problem
    except OSError as error:
        stop(f"{error.filename!r} cannot be read: {error.strerror}.", BAD_INPUT)
    except DinferError as error:
        stop(error, BAD_INPUT)
    colour = takes_colour(sys.stdout)
    if verdict:
        print(Severity.ERROR.marked(str(verdict), colour=colour))
    else:
        print(found.verdict)
    for one in found.findings:
        print(Severity.WARNING.marked(one.text, colour=colour))
    table = table_of(found.trace)
    if len(table):
        print(table)
    _write(found.kept(verdict), "", report, print)
    if json_path:
        keep_json(found.as_dict(None, verdict), json_path)
    raise Exit(FAILED if verdict else 0)


def _write(kept: Any, trace: str, report: str, say: Any) -> None:
    """Write trace and report, where asked, and say where they are."""
    try:
        if trace:
            say(f"trace: {kept.export('jsonl', trace)}")
        if report:
            from dinfer.views.report.page import write_report

            say(f"report: {write_report([kept], report)}")
    except OSError as error:
        stop(f"{error.filename} could not be written: {error.strerror}.", FAILED)
