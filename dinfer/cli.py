"""The command line. It parses, calls, and turns errors into one message and an exit status.

Every parameter of Config is a flag of `dinfer run` with the same name.
"""

import contextlib
import inspect
import io
import json
import os
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from dinfer.config import Config, ConfigError, read_toml, whole_numbers
from dinfer.model.errors import ModelError
from dinfer.plan.ops import PlanError
from dinfer.plan.partition import partition
from dinfer.plan.plan import Plan, parse_plan
from dinfer.plan.schedule import build
from dinfer.plan.verify import Counterexample, Proof
from dinfer.plan.verify import verify as verify_plan
from dinfer.session.environment import Launched, launched_as, speaks

app = typer.Typer(
    name="dinfer",
    help="An interactive debugger for distributed LLM inference.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
SILENCE_S = 5.0


def _stop(message: object, status: int) -> NoReturn:
    print(f"dinfer: {message}", file=sys.stderr)
    raise typer.Exit(status)


def run(**given: Any) -> None:
    """Generate from a checkpoint on several ranks: started here, or as the rank that torchrun or mpirun names."""
    values, launched = {name: value for name, value in given.items() if value is not None}, None
    json_path, trace_path, toml = (values.pop(name, None) for name in ("json", "trace", "config"))
    try:
        launched = launched_as(os.environ)
        config = Config.of(_for_launched({**(read_toml(toml) if toml else {}), **values}, launched))
        trace_path = trace_path or Path(config.log_dir) / "trace.jsonl"
        if launched:
            from dinfer.session.join import join

            result = join(config, launched, trace_path)
        else:
            result = _run_here(config, trace_path)
    except (ConfigError, ModelError, PlanError) as error:
        _leave_it_to_others(launched)
        _stop(error, BAD_INPUT)
    except KeyboardInterrupt:
        _stop("interrupted; all ranks were ended.", INTERRUPTED)
    except BrokenPipeError:
        sys.stdout = sys.stderr  # or closing it at exit would complain once more
        _stop("standard output was closed, so the run was ended with all its ranks.", FAILED)
    except (OSError, RuntimeError) as error:  # RankFailed is one
        _leave_it_to_others(launched)
        _stop(error, FAILED)
    if json_path and result:
        _keep_json(result, json_path)


def _keep_json(result: dict[str, Any], path: str) -> None:
    from dinfer.session.result import write_json

    try:
        write_json(result, path)
    except OSError as error:
        _stop(f"all went well, but the result could not be written to {path}: {error.strerror}.", FAILED)


def _leave_it_to_others(launched: Launched | None) -> None:
    """A mistake that all ranks share is told by one. This one ends later: a launcher ends all once one has ended."""
    if not speaks(launched):
        time.sleep(SILENCE_S)
        raise typer.Exit(FAILED)


def _run_here(config: Config, trace_path: str | Path) -> dict[str, Any]:
    from dinfer.session.job import prepare

    job = prepare(config)  # before torch is imported: a mistake is told at once
    from dinfer.session.processes import interrupt_as_error
    from dinfer.session.runner import run as run_job

    interrupt_as_error()
    return run_job(job, trace_path)


def _for_launched(values: dict[str, Any], launched: Launched | None) -> dict[str, Any]:
    """Under a launcher the number of ranks is the launcher's. Raises ConfigError where it was asked for otherwise."""
    if launched is None:
        return values
    asked = values.get("world_size", launched.world_size)
    if str(asked) != str(launched.world_size):
        raise ConfigError(
            f"world_size is {asked}, but {launched.launcher} has started {launched.world_size} processes: "
            "leave world_size out, or start as many."
        )
    return {**values, "world_size": launched.world_size}


def _run_signature() -> inspect.Signature:
    """Options for `run`: one for each parameter of Config, as text, since Config converts and judges it itself."""
    options = [
        _option("config", "a TOML file with any of these parameters; flags win over it", str, "--config"),
        _option("json", "write the result to this file as JSON", str, "--json"),
        _option("trace", "write the trace to this file [default: trace.jsonl in log_dir]", str, "--trace"),
    ]
    for item in fields(Config):
        flag = "--" + item.name.replace("_", "-")
        flags = [flag, "--model"] if item.name == "model_path" else [flag]
        if isinstance(item.default, bool):
            flags = [f"{flag}/--no-{flag[2:]}"]
        shown = ",".join(map(str, item.default)) if isinstance(item.default, tuple) else item.default
        text = item.metadata["help"] + (f" [default: {shown}]" if shown not in ("", False) else "")
        options.append(_option(item.name, text, bool if isinstance(item.default, bool) else str, *flags))
    return inspect.Signature(options)


def _option(name: str, text: str, kind: Any, *flags: str) -> inspect.Parameter:
    annotation: Any = Annotated[kind | None, typer.Option(*flags, help=text, show_default=False)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


run.__signature__ = _run_signature()  # type: ignore[attr-defined]
run.__annotations__ = {p.name: p.annotation for p in _run_signature().parameters.values()}
app.command()(run)


@app.command()
def plan(
    layers: Annotated[int, typer.Option(help="decoder layers of the model")],
    tokens: Annotated[int, typer.Option(help="length of the prompt")],
    world_size: Annotated[int, typer.Option(help="number of ranks")] = 3,
    chunk_size: Annotated[int, typer.Option(help="tokens per chunk")] = 128,
    sync_strategy: Annotated[str, typer.Option(help="pairwise or ring")] = "pairwise",
    schedule: Annotated[str, typer.Option(help="pipelined, lockstep or batched")] = "pipelined",
    layer_split: Annotated[
        str, typer.Option(help="first layer of every stage but the first, such as 14,28")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Print every rank's lanes, one op a line, and the proof. Status 0: proved; 1: refuted; 2: no such plan."""
    try:
        config = Config.of(
            {
                "world_size": world_size,
                "chunk_size": chunk_size,
                "sync_strategy": sync_strategy,
                "schedule": schedule,
                "layer_split": layer_split,
            }
        )
        shape = partition(
            layers=layers,
            tokens=tokens,
            world_size=config.world_size,
            chunk_size=config.chunk_size,
            layer_split=config.layer_split or None,
        )
    except (ConfigError, PlanError) as error:
        _stop(error, BAD_INPUT)
    built = build(shape, config.schedule, config.sync_strategy)
    verdict = verify_plan(built)
    if as_json:
        _print_json(built, verdict)
    else:
        comment = "\n".join(f"# {line}" for line in str(verdict).splitlines())
        print(f"{built.text()}{comment}")
    raise typer.Exit(0 if verdict.proved else 1)


@app.command()
def verify(
    file: Annotated[
        str, typer.Argument(help="a plan's text, as `dinfer plan` prints it; - reads standard input")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Prove a plan, or print the shortest counterexample. Status 0: proved; 1: refuted; 2: not a plan."""
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
        parsed = parse_plan(text)
    except OSError as error:
        _stop(f"the plan {file!r} cannot be read: {error.strerror}.", BAD_INPUT)
    except (UnicodeDecodeError, PlanError) as error:
        _stop(error, BAD_INPUT)
    verdict = verify_plan(parsed)
    if as_json:
        _print_json(parsed, verdict)
    else:
        print(verdict)
    raise typer.Exit(0 if verdict.proved else 1)


@app.command()
def bench(
    model: Annotated[
        str, typer.Option(help="checkpoint folder; default: random weights, hidden 1024 × 8 layers")
    ] = "",
    tokens: Annotated[
        str, typer.Option(help="length of the prompt; several for --compare: 512,2048")
    ] = "2048",
    chunk_size: Annotated[str, typer.Option(help="tokens per chunk; several for --compare: 64,128")] = "128",
    world_size: Annotated[int, typer.Option(help="number of ranks")] = 2,
    threads: Annotated[int, typer.Option(help="CPU threads of each rank")] = 1,
    repeats: Annotated[int, typer.Option(help="timed rounds, after one to warm up")] = 3,
    json_path: Annotated[str, typer.Option("--json", help="write the figures to this file")] = "",
    compare: Annotated[str, typer.Option(help="two sync strategies, pairwise,ring: which to use?")] = "",
    plot: Annotated[str, typer.Option(help="with --compare: a plot file, .html, .svg or .png")] = "",
) -> None:
    """Time pairwise, ring, lockstep, no sync and one process side by side on this machine, or --compare two."""
    from dinfer.model.checkpoint import check
    from dinfer.session import bench as side_by_side
    from dinfer.session import compare as compared

    strategies = compare.split(",") if compare else []
    with contextlib.ExitStack() as stack:
        try:
            lengths, chunks = whole_numbers("tokens", tokens), whole_numbers("chunk_size", chunk_size)
            compared.check_asked(strategies, lengths, chunks, repeats)
            if plot:
                _check_plot(plot, bool(strategies))
            folder = model or str(stack.enter_context(side_by_side.random_checkpoint(side_by_side.Shape())))
            config = Config.of(
                {"model_path": folder, "world_size": world_size, "chunk_size": chunks[0], "threads": threads}
            )
            vocabulary = check(folder).vocab_size
            if strategies:
                result = compared.compare(config, vocabulary, strategies, lengths, chunks, repeats)
            else:
                result = side_by_side.bench(config, lengths[0], vocabulary, repeats)
        except (ConfigError, ModelError, PlanError) as error:
            _stop(error, BAD_INPUT)
        except RuntimeError as error:
            _stop(error, FAILED)
    print((compared if strategies else side_by_side).table(result))
    if json_path:
        _keep_json(result, json_path)
    if plot:
        _draw(result, plot)


def _check_plot(path: str, compared: bool) -> None:
    """Raises ConfigError for a file that could not be written once all is measured."""
    from dinfer.views.bench import PlotError, check_ending

    if not compared:
        raise ConfigError("plot is for --compare pairwise,ring; without it, --json keeps the figures.")
    try:
        check_ending(path)
    except PlotError as error:
        raise ConfigError(str(error)) from None


def _draw(result: dict[str, Any], path: str) -> None:
    from dinfer.views.bench import PlotError, figure, write

    try:
        print(f"plot: {write(figure(result), path)}")
    except (PlotError, OSError) as error:
        _stop(error, FAILED)


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
        _stop(error, BAD_INPUT)
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


def _print_json(given: Plan, verdict: Proof | Counterexample) -> None:
    lanes = [
        [{"lane": lane.name, "ops": [str(op) for op in lane.ops]} for lane in rank] for rank in given.lanes
    ]
    found = {"proved": verdict.proved, "verdict": str(verdict)}
    if isinstance(verdict, Counterexample):
        found |= {"flaw": verdict.flaw, "sends": verdict.sends, "steps": list(verdict.steps)}
        found["places"] = [
            {"rank": p.rank, "lane": given.lanes[p.rank][p.lane].name, "index": p.index}
            for p in verdict.places
        ]
    print(json.dumps({**found, "id": f"{given.id:016x}", "ranks": lanes}, ensure_ascii=False, indent=1))


def main() -> None:
    """The `dinfer` script. A flag that does not exist is answered with the nearest one that does."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(
            stream, io.TextIOWrapper
        ):  # a character that a GBK or ASCII terminal lacks must not end a run
            stream.reconfigure(errors="backslashreplace")
    app()


if __name__ == "__main__":
    main()
