"""`dinfer bench`: times of prefill, sessions and views on this machine."""

import contextlib
import sys
from typing import Annotated, Any

import typer

from dinfer.cli.root import BAD_INPUT, FAILED, app, keep_json, stop
from dinfer.config import Config, ConfigError, whole_numbers
from dinfer.model.errors import ModelError
from dinfer.plan.ops import PlanError


@app.command()
def bench(
    what: Annotated[
        str,
        typer.Argument(
            help="prefill; digests: with and without; session: steps, recording, a death; views: figures, report"
        ),
    ] = "prefill",
    model: Annotated[
        str, typer.Option(help="checkpoint folder; default: random weights, hidden 1024 × 8 layers")
    ] = "",
    tokens: Annotated[
        str, typer.Option(help="length of the prompt; with --compare also several: 512,2048")
    ] = "2048",
    chunk_size: Annotated[
        str, typer.Option(help="tokens per chunk; with --compare also several: 64,128")
    ] = "128",
    world_size: Annotated[int, typer.Option(help="number of ranks")] = 2,
    threads: Annotated[int, typer.Option(help="CPU threads of each rank")] = 1,
    repeats: Annotated[int, typer.Option(help="timed rounds, after a warm-up round")] = 3,
    json_path: Annotated[str, typer.Option("--json", help="write the figures to this file")] = "",
    compare: Annotated[str, typer.Option(help="compare two sync strategies: pairwise,ring")] = "",
    plot: Annotated[str, typer.Option(help="with --compare: a plot file, .html, .svg or .png")] = "",
    engines: Annotated[
        bool, typer.Option("--engines", help="views: also time the inspector on three engines")
    ] = False,
) -> None:
    """Time pairwise, ring, lockstep, no sync and one process on this machine, or --compare two strategies."""
    if what == "prefill":
        _bench_prefill(model, tokens, chunk_size, world_size, threads, repeats, json_path, compare, plot)
    elif what == "digests":
        values = {"model_path": model, "world_size": world_size, "chunk_size": chunk_size, "threads": threads}
        _bench_digests(values, tokens, repeats, json_path)
    elif what == "views" and repeats >= 1:
        _bench_views(repeats, json_path, engines=engines)
    else:
        _bench_session(what, repeats, json_path)


def _bench_views(repeats: int, json_path: str, *, engines: bool) -> None:
    """`dinfer bench views`, which takes --repeats, --json and --engines."""
    from dinfer.bench.views import bench_views, table

    try:
        result = bench_views(repeats, lambda text: print(text, file=sys.stderr), engines=engines)
    except RuntimeError as error:
        stop(error, FAILED)
    print(table(result))
    if json_path:
        keep_json(result, json_path)


def _bench_prefill(
    model: str,
    tokens: str,
    chunk_size: str,
    world_size: int,
    threads: int,
    repeats: int,
    json_path: str,
    compare: str,
    plot: str,
) -> None:
    from dinfer.bench import prefill as side_by_side
    from dinfer.bench import strategies as compared
    from dinfer.model.checkpoint import check

    strategies = compare.split(",") if compare else []
    with contextlib.ExitStack() as stack:
        try:
            lengths, chunks = whole_numbers("tokens", tokens), whole_numbers("chunk_size", chunk_size)
            compared.check_asked(strategies, lengths, chunks, repeats)
            if plot:
                _check_plot(plot, bool(strategies))
            folder = model or str(
                stack.enter_context(side_by_side.random_checkpoint(side_by_side.BenchModel()))
            )
            config = Config.of(
                {"model_path": folder, "world_size": world_size, "chunk_size": chunks[0], "threads": threads}
            )
            vocabulary = check(folder).vocab_size
            if strategies:
                result = compared.compare(config, vocabulary, strategies, lengths, chunks, repeats)
            else:
                result = side_by_side.bench(config, lengths[0], vocabulary, repeats)
        except (ConfigError, ModelError, PlanError) as error:
            stop(error, BAD_INPUT)
        except RuntimeError as error:
            stop(error, FAILED)
    print((compared if strategies else side_by_side).table(result))
    if json_path:
        keep_json(result, json_path)
    if plot:
        _draw(result, plot)


def _bench_digests(values: dict[str, Any], tokens: str, repeats: int, json_path: str) -> None:
    """`dinfer bench digests`, which takes all options but --compare, --plot and --engines."""
    from dinfer.bench.prefill import DIGESTS_MODEL, bench_digests, digests_table, random_checkpoint
    from dinfer.model.checkpoint import check

    with contextlib.ExitStack() as stack:
        try:
            lengths = whole_numbers("tokens", tokens)
            if repeats < 1:
                raise ConfigError(f"repeats is {repeats}; it must be at least 1.")
            if len(lengths) != 1 or lengths[0] < 1:
                raise ConfigError(f"tokens is {tokens!r}; bench digests takes one number, at least 1.")
            Config.of({**values, "model_path": "demo"})  # before a checkpoint is made
            folder = values["model_path"] or str(stack.enter_context(random_checkpoint(DIGESTS_MODEL)))
            config = Config.of({**values, "model_path": folder})
            result = bench_digests(config, lengths[0], check(folder).vocab_size, repeats)
        except (ConfigError, ModelError, PlanError) as error:
            stop(error, BAD_INPUT)
        except RuntimeError as error:
            stop(error, FAILED)
    print(digests_table(result))
    if json_path:
        keep_json(result, json_path)


def _check_plot(path: str, compared: bool) -> None:
    """Raises ConfigError for a plot file that could not be written."""
    from dinfer.bench.figure import PlotError, check_ending

    if not compared:
        raise ConfigError("plot needs --compare pairwise,ring; without it, --json writes the figures.")
    try:
        check_ending(path)
    except PlotError as error:
        raise ConfigError(str(error)) from None


def _draw(result: dict[str, Any], path: str) -> None:
    from dinfer.bench.figure import PlotError, figure, write

    try:
        print(f"plot: {write(figure(result), path)}")
    except (PlotError, OSError) as error:
        stop(error, FAILED)


def _bench_session(what: str, repeats: int, json_path: str) -> None:
    """`dinfer bench session`, which takes --repeats and --json."""
    from dinfer.bench.session import bench_session, table

    if what != "session" or repeats < 1:
        stop(
            f"`bench {what} --repeats {repeats}`: use prefill, digests, session or views, and at least 1 repeat.",
            BAD_INPUT,
        )
    try:
        result = bench_session(repeats, lambda text: print(text, file=sys.stderr))
    except RuntimeError as error:
        stop(error, FAILED)
    print(table(result))
    if json_path:
        keep_json(result, json_path)
