"""`dinfer doctor`, `clean`, `vscode`, `report` and `lab`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from typer import Argument, Exit, Option

from dinfer.cli.root import BAD_INPUT, FAILED, INTERRUPTED, app, check_outputs, keep_json, log, stop
from dinfer.config import ConfigError
from dinfer.files import free_path
from dinfer.saved.format import TRACE, SavedError
from dinfer.severity import Severity
from dinfer.trace.export import TraceError
from dinfer.trace.read import read_traces


@app.command()
def doctor(
    model: Annotated[str, Option(help="a checkpoint folder, whose memory is compared with free memory")] = "",
    world_size: Annotated[int, Option(help="number of ranks to try together")] = 3,
    as_json: Annotated[bool, Option("--json", help="print JSON")] = False,
) -> None:
    """Check this machine: versions, devices, network, memory, leftovers. Status 0: all fine; 1: a check failed."""
    from dinfer.doctor.doctor import doctor as examine

    try:
        status = examine(model or None, world_size, as_json)
    except ConfigError as error:
        stop(error, BAD_INPUT)
    raise Exit(status)


@app.command()
def clean(
    dry_run: Annotated[bool, Option("--dry-run", help="only print what would be ended")] = False,
    as_json: Annotated[bool, Option("--json", help="print JSON")] = False,
) -> None:
    """End clusters that dinfer started and whose client has ended. Status 1: a cluster could not be ended."""
    from dinfer.cluster.ipyparallel.clean import clean as find_and_end
    from dinfer.cluster.ipyparallel.clean import report

    text, status = report(find_and_end(dry_run=dry_run), as_json)
    print(text)
    raise Exit(status)


@app.command()
def vscode(
    folder: Annotated[str, Option(help="the folder that is open in VS Code")] = ".",
    config: Annotated[
        str, Option(help="a TOML file with the parameters of the debugged runs; default: the demo model")
    ] = "",
    extension: Annotated[
        str,
        Option(
            help='also write dinfer\'s extension, which brings the debug type "dinfer", to this file (.vsix)'
        ),
    ] = "",
    install: Annotated[bool, Option("--install", help="also install that extension in VS Code")] = False,
) -> None:
    """Write VS Code's launch entries into the folder's .vscode/launch.json; entries of other names there stay."""
    from dinfer.cli.vscode import ALL_RANKS, DEBUG_RUN, LaunchFileError, write_entries
    from dinfer.cli.vscode_extension import NotInstalled, install_extension, write_extension

    try:
        path = write_entries(folder, config)
        print(f"{path}: F5 on {ALL_RANKS!r} starts the ranks, each under a debugger.")
        if extension:
            print(f"{write_extension(extension)}: in VS Code, Extensions → … → Install from VSIX.")
        if install:
            print(install_extension())
        if not (extension or install):
            print(
                f"{DEBUG_RUN!r} has ranks as threads, and steps by op, layer and chunk; it needs dinfer's extension: "
                "`dinfer vscode --install`."
            )
    except (LaunchFileError, ConfigError) as error:
        stop(error, BAD_INPUT)
    except NotInstalled as error:
        stop(error, FAILED)
    except OSError as error:
        stop(f"{error.filename} could not be written: {error.strerror}.", FAILED)


@app.command()
def report(
    traces: Annotated[
        list[str],
        Argument(help="traces of `dinfer run --trace`, saved runs, or reports; several are compared"),
    ],
    output: Annotated[
        str,
        Option("--output", "-o", help="the file to write; default: report.html, or a free report-2.html"),
    ] = "",
    overwrite: Annotated[
        bool, Option("--overwrite", help="replace the file of --output if it exists")
    ] = False,
) -> None:
    """Write a self-contained HTML report. Status 0: written; 1: not written; 2: not a trace, or no
    place to write to."""
    try:
        output = output or str(free_path(Path("report.html")))
        check_outputs(
            {"--output": output},
            {f"the trace {path!r}": path for path in traces},
            overwrite=overwrite,
            report="--output",
        )
        found = [(Path(path).stem, read_traces(_trace_of(path))) for path in traces]
    except OSError as error:
        stop(f"the trace {error.filename!r} cannot be read: {error.strerror}.", BAD_INPUT)
    except (ConfigError, TraceError) as error:
        stop(error, BAD_INPUT)
    from dinfer.views.report.page import Told, write_report

    runs = [trace for _, some in found for trace in some]
    names = [
        name if len(some) == 1 else f"{name}, run {n}" for name, some in found for n, _ in enumerate(some, 1)
    ]
    if len(set(names)) < len(names):
        names = [f"{n}: {name}" for n, name in enumerate(names, 1)]
    between = [Told(severity.word, text) for severity, text in _between(traces)]
    try:
        print(f"report: {write_report(runs, output, names if len(names) > 1 else (), between)}")
    except OSError as error:
        stop(f"the report could not be written to {output}: {error.strerror}.", FAILED)


def _between(paths: Sequence[str]) -> list[tuple[Severity, str]]:
    """Of two saved runs, how KV and new tokens of the first differ from the second's; of others, which hold no KV,
    nothing."""
    if len(paths) != 2 or not all((Path(path) / TRACE).is_file() for path in paths):
        return []
    from dinfer.run.comparison import compare_runs
    from dinfer.saved.saved import open_saved

    try:
        found = compare_runs(open_saved(paths[0]), open_saved(paths[1]))
    except SavedError as error:  # for example, no rank answered when it was saved
        return [(Severity.NOTE, f"KV was not compared: {error}")]
    return found.said()


def _trace_of(path: str) -> Path:
    """The file of that name; in the folder of a saved run, its trace."""
    inside = Path(path) / TRACE
    return inside if inside.is_file() else Path(path)


@app.command()
def lab(
    sample: Annotated[
        int | None, Option(help="number of cells, spread over the faults; default: the whole matrix")
    ] = None,
    seed: Annotated[int, Option(help="selects the cells and their order")] = 0,
    slow_runs: Annotated[int, Option(help="number of additional slow runs, which must raise no alarm")] = 0,
    json_path: Annotated[str, Option("--json", help="write the results to this file")] = "",
    overwrite: Annotated[bool, Option("--overwrite", help="replace the file of --json if it exists")] = False,
    join: Annotated[
        bool, Option("--join", help="use the running cluster of 3 engines, which are killed on purpose")
    ] = False,
    links: Annotated[
        str,
        Option(
            help="where links are cut and slowed: namespaces (network namespaces, needs root), transport, or auto: "
            "namespaces if possible"
        ),
    ] = "auto",
) -> None:
    """Run communication faults on a real cluster and check the verdicts. Status 0: all right; 1: some are wrong; 2:
    invalid options."""
    from dinfer.lab.cells import cells_of
    from dinfer.lab.lab import run_lab
    from dinfer.lab.score import Score
    from dinfer.run.report import machine, versions

    try:
        check_outputs({"--json": json_path}, overwrite=overwrite)
    except ConfigError as error:
        stop(error, BAD_INPUT)
    for name, count in (("sample", sample or 0), ("slow_runs", slow_runs)):
        if count < 0:
            stop(f"{name} is {count}; it must be 0 or more.", BAD_INPUT)
    if sample == 0 and not slow_runs:
        stop(
            "sample is 0, so there is nothing to run: give a number of cells, leave it out for the whole matrix, or "
            "ask for slow runs alone with --slow-runs.",
            BAD_INPUT,
        )
    cells = cells_of(seed, sample)
    score, status = Score(seed, len(cells)), FAILED
    try:
        run_lab(cells, score, log, slow_runs=slow_runs, join=join, links=links)
        status = 0 if score.all_right else FAILED
    except ConfigError as error:
        stop(str(error), BAD_INPUT)
    except KeyboardInterrupt:
        status = INTERRUPTED
        log("dinfer: interrupted; results so far:")
    except (RuntimeError, TimeoutError) as error:
        log(f"dinfer: {Severity.ERROR.marked(f'the lab cannot continue: {error}')}")
    print(score.table())
    if json_path:
        keep_json({**score.as_dict(), "machine": machine(), "versions": versions()}, json_path)
    raise Exit(status)
