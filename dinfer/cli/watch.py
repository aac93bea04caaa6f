"""`dinfer watch` and `dinfer explain`: verdicts on other people's distributed code."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Exit, Option

from dinfer.cli.root import BAD_INPUT, FAILED, app, check_outputs, keep_json, stop
from dinfer.config import Config, ConfigError
from dinfer.display import takes_colour
from dinfer.errors import DinferError
from dinfer.severity import Severity

if TYPE_CHECKING:
    from dinfer.trace.trace import Trace
    from dinfer.watching.passing import PassedOn


@app.command(context_settings={"allow_interspersed_args": False, "ignore_unknown_options": False})
def watch(
    command: Annotated[
        list[str], Argument(help="the command, after --: torchrun, mpirun, python, a shell script …")
    ],
    report: Annotated[str, Option(help="write a report to this HTML file")] = "",
    json_path: Annotated[str, Option("--json", help="write verdict, findings and links to this file")] = "",
    trace: Annotated[str, Option(help="write the trace to this file; default: beside the records")] = "",
    folder: Annotated[
        str, Option(help="where the processes write their records; default: a new one in dinfer-logs")
    ] = "",
    kv: Annotated[
        str, Option(help="a method that adds to a KV cache of your own: package.module:Class.method")
    ] = "",
    k: Annotated[
        str, Option("--k", help="with --kv: the new K, an expression of its arguments and result")
    ] = "",
    v: Annotated[str, Option("--v", help="with --kv: the new V")] = "",
    layer: Annotated[str, Option(help="with --kv: the layer")] = "",
    compare: Annotated[
        bool,
        Option(
            "--compare",
            help="at the end, run transformers' own forward beside a model of transformers, or a tapped one, and say "
            "the first layer, chunk and token that differ",
        ),
    ] = False,
    checkpoint: Annotated[
        str, Option(help="with --compare: the folder of the model; default: the one that was seen")
    ] = "",
    listen: Annotated[
        str,
        Option(
            help="the job runs on other hosts, too, which join at this port, or ADDRESS:PORT; 0: any free port"
        ),
    ] = "",
    join: Annotated[
        str,
        Option(help="the job is watched on another host: the ADDRESS:PORT/KEY that its --listen has printed"),
    ] = "",
    quiet: Annotated[bool, Option("--quiet", help="no lines about ranks while all goes well")] = False,
    overwrite: Annotated[
        bool, Option("--overwrite", help="replace the files of --report, --json and --trace if they exist")
    ] = False,
) -> None:
    """Run a command and say why it hangs or crashes. Status: the command's own."""
    from dinfer.watching.command import found
    from dinfer.watching.passing import PassedOn

    environment = _tap(kv, k, v, layer)
    if checkpoint and not compare:
        stop("--checkpoint is of --compare: give both, or none.", BAD_INPUT)
    if checkpoint not in ("", "demo") and not Path(checkpoint).is_dir():
        stop(
            f'--checkpoint is {checkpoint!r}, which is no folder; give that of the model, or "demo".',
            BAD_INPUT,
        )
    if join and (listen or report or json_path or trace or compare):
        stop(
            "--join is for a part of a job: --listen, --report, --json, --trace and --compare are of the host that "
            "is joined.",
            BAD_INPUT,
        )
    command = found(command)
    with PassedOn() as passed:  # before what is imported starts threads
        if join:
            status = _joined(passed, command, folder, environment, join)
        else:
            status = _watched(
                passed, command, report, json_path, trace, folder, environment,
                checkpoint if compare else None, quiet, overwrite, listen,
            )  # fmt: skip
    raise Exit(status)


def _tap(kv: str, k: str, v: str, layer: str) -> dict[str, str]:
    """The environment with which the probe taps that method; raises Exit where words are missing."""
    if (k or v or layer or kv) and not (k and v and layer and ":" in kv):
        stop("--kv package.module:Class.method takes --k, --v and --layer: all four, or none.", BAD_INPUT)
    tapped = [{"method": kv, "k": k, "v": v, "layer": layer}]
    return {"DINFER_WATCH_KV": json.dumps(tapped)} if kv else {}


def _joined(
    passed: "PassedOn", command: list[str], folder: str, environment: dict[str, str], address: str
) -> int:
    """Run it as a part of the job that is watched at `address`, and return its status."""
    from dinfer.watching.joining import JoinedCommand
    from dinfer.watching.lines import CommandLines

    lines = CommandLines(sys.stderr)
    place = _place(folder)
    with _starting(command):
        running = JoinedCommand(
            command, place, address, on_verdict=lines.told_elsewhere, environment=environment,
            starting=passed.starting(),
        )  # fmt: skip
    lines.say("dinfer: this host has joined; verdicts, links and report are told where it was joined.")
    passed.follow(running.process, lambda: None)
    status, has_arrived = running.wait()
    if not has_arrived:
        lines.say(
            f"dinfer: the end has not arrived there; the records are in {place}: `dinfer explain` reads them."
        )
    return status


def _place(folder: str) -> Path:
    """Where the records go: that folder, or a new one. Raises Exit for one that is not empty."""
    from dinfer.rank.logs import new_run_folder

    try:
        place = Path(folder) if folder else new_run_folder(Path(Config.log_dir))
        if folder and place.exists():
            if not place.is_dir():
                raise ConfigError(f"--folder is {folder!r}, which is a file: give another.")
            if any(place.iterdir()):
                raise ConfigError(f"--folder is {folder!r}, which is not empty: give another.")
    except (ConfigError, OSError) as error:
        stop(error, BAD_INPUT)
    return place


@contextmanager
def _starting(command: list[str]) -> Iterator[None]:
    """Raises Exit, with a shell's status, where the command cannot be started, and where hosts cannot be joined."""
    from dinfer.watching.command import NOT_STARTED, not_found

    try:
        yield
    except FileNotFoundError:
        stop(not_found(command[0]), NOT_STARTED)
    except OSError as error:
        stop(f"the command {command[0]!r} cannot be started: {error.strerror}.", NOT_STARTED - 1)
    except DinferError as error:
        stop(error, BAD_INPUT)


def _watched(
    passed: "PassedOn",
    command: list[str],
    report: str,
    json_path: str,
    trace: str,
    folder: str,
    environment: dict[str, str],
    compared: str | None,
    quiet: bool,
    overwrite: bool,
    listen: str,
) -> int:
    """Run it, say what there is to say, and return its status. `compared`: with which checkpoint, "" for the one that
    was seen; None: with none. `listen`: where other hosts join; "": none do."""
    from dinfer.watch.probe.tensors import COMPARE_VARIABLE
    from dinfer.watching.command import WatchedCommand
    from dinfer.watching.lines import CommandLines
    from dinfer.watching.listening import Listener
    from dinfer.watching.written import as_dict

    try:
        check_outputs({"--report": report, "--json": json_path, "--trace": trace}, overwrite=overwrite)
    except (ConfigError, OSError) as error:
        stop(error, BAD_INPUT)
    place, lines = _place(folder), CommandLines(sys.stderr)
    if compared is not None:
        environment = {**environment, COMPARE_VARIABLE: "1"}
    with _starting(command):
        listener = Listener(place, listen, lines.joined) if listen else None
        if listener:
            lines.say(f"dinfer: the other hosts join by: dinfer watch --join {listener.address} -- COMMAND")
        running = WatchedCommand(
            command, place, tell=lines.verdict, environment=environment, starting=passed.starting(),
            listener=listener,
        )  # fmt: skip

    def on_end() -> None:
        running.told_to_end()
        lines.interrupted(running)

    passed.follow(running.process, on_end)
    status = running.wait(lines.notes if quiet else lines.ranks)
    try:
        lines.conclusion(running, status)
        if compared is not None:
            lines.compared(running, compared or None)
        state = "" if running.verdict or not status else "failed"
        kept = [found.kept(running.standing(found), state=state) for found in running.jobs]
        with suppress(Exit):  # it has said so; the status is the command's own
            _write(kept, trace or str(place / "trace.jsonl"), report, lines.say)
        if json_path:
            verdicts = [running.standing(found) for found in running.jobs]
            with suppress(Exit):
                keep_json(as_dict(running.jobs, verdicts, running.verdict, status), json_path)
    except Exception as error:  # a fault of dinfer's must not decide the status
        lines.say(f"dinfer: what was seen cannot be told: {type(error).__name__}: {error}")
    if listener:
        listener.close()
    return status


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
    from dinfer.watching.written import as_dict

    try:
        inputs = {f"the input {path!r}": path for path in paths if Path(path).is_file()}
        check_outputs({"--report": report, "--json": json_path}, inputs, overwrite=overwrite)
        jobs = read(paths)
        verdicts = [found.problem for found in jobs]
    except OSError as error:
        stop(f"{error.filename!r} cannot be read: {error.strerror}.", BAD_INPUT)
    except DinferError as error:
        stop(error, BAD_INPUT)
    colour = takes_colour(sys.stdout)
    for note in dict.fromkeys(note for found in jobs for note in found.notes):
        print(Severity.WARNING.marked(note, colour=colour))
    for found, verdict in zip(jobs, verdicts, strict=True):
        print(Severity.ERROR.marked(str(verdict), colour=colour) if verdict else found.verdict)
        for one in found.findings:
            print(Severity.WARNING.marked(one.text, colour=colour))
        table = table_of(found.trace)
        if len(table):
            print(table)
    worst = next((verdict for verdict in verdicts if verdict), None)
    kept = [found.kept(verdict) for found, verdict in zip(jobs, verdicts, strict=True)]
    _write(kept, "", report, print)
    if json_path:
        keep_json(as_dict(jobs, verdicts, worst, None), json_path)
    raise Exit(FAILED if worst else 0)


def _write(kept: "Sequence[Trace]", trace: str, report: str, say: Callable[[str], None]) -> None:
    """Write the traces and the report, where asked, and say where they are."""
    try:
        for number, one in enumerate(kept if trace else (), 1):
            path = Path(trace)
            target = path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
            say(f"trace: {one.export('jsonl', target)}")
        if report:
            from dinfer.views.report.page import write_report

            names = [str(one.about.get("job", "")) for one in kept] if len(kept) > 1 else []
            say(f"report: {write_report(kept, report, names)}")
    except OSError as error:
        stop(f"{error.filename} could not be written: {error.strerror}.", FAILED)
