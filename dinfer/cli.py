"""The command line. It parses, calls, and turns errors into one message and an exit status.

Every parameter of Config is a flag of `dinfer run` with the same name.
"""

import contextlib
import inspect
import json
import os
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from dinfer.config import Config, ConfigError, read_toml
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
        if json_path and result:
            from dinfer.session.result import write_json

            write_json(result, json_path)
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
    what: Annotated[
        str, typer.Argument(help="prefill; or session: what stepping, recording and a death take on 3 engines")
    ] = "prefill",
    model: Annotated[
        str, typer.Option(help="checkpoint folder; default: random weights, hidden 1024 × 8 layers")
    ] = "",
    tokens: Annotated[int, typer.Option(help="length of the prompt")] = 2048,
    chunk_size: Annotated[int, typer.Option(help="tokens per chunk")] = 128,
    world_size: Annotated[int, typer.Option(help="number of ranks")] = 2,
    threads: Annotated[int, typer.Option(help="CPU threads of each rank")] = 1,
    repeats: Annotated[int, typer.Option(help="timed rounds, after one to warm up")] = 3,
    json_path: Annotated[str, typer.Option("--json", help="write the figures to this file")] = "",
) -> None:
    """Time pairwise, ring, lockstep, no sync and one process side by side on this machine."""
    if what != "prefill":
        return _bench_session(what, repeats, json_path)
    from dinfer.model.checkpoint import check
    from dinfer.session.bench import Shape, random_checkpoint, table
    from dinfer.session.bench import bench as time_variants
    from dinfer.session.result import write_json

    with contextlib.ExitStack() as stack:
        try:
            folder = model or str(stack.enter_context(random_checkpoint(Shape())))
            config = Config.of(
                {"model_path": folder, "world_size": world_size, "chunk_size": chunk_size, "threads": threads}
            )
            result = time_variants(config, tokens, check(folder).vocab_size, repeats)
        except (ConfigError, ModelError, PlanError) as error:
            _stop(error, BAD_INPUT)
        except RuntimeError as error:
            _stop(error, FAILED)
    print(table(result))
    if json_path:
        write_json(result, json_path)


def _bench_session(what: str, repeats: int, json_path: str) -> None:
    """`dinfer bench session`; of the options, --repeats and --json are its own too."""
    from dinfer.session.bench_session import bench_session, table
    from dinfer.session.result import write_json

    if what != "session" or repeats < 1:
        _stop(f"`bench {what} --repeats {repeats}`: bench what? prefill or session, at least once.", BAD_INPUT)
    try:
        result = bench_session(repeats, lambda text: print(text, file=sys.stderr))
    except RuntimeError as error:
        _stop(error, FAILED)
    print(table(result))
    if json_path:
        write_json(result, json_path)


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
    app()


if __name__ == "__main__":
    main()
