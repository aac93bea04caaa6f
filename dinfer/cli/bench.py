"""`dinfer bench`: times of prefill, sessions and views on this machine."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dinfer.cli.root import FAILED, app, keep_json, log, reported, stop
from dinfer.config import Config, ConfigError, whole_numbers

if TYPE_CHECKING:
    from dinfer.bench.prefill import BenchModel


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
    sizes = {"world_size": world_size, "threads": threads}
    with reported():
        if repeats < 1:
            raise ConfigError(f"repeats is {repeats}; it must be at least 1.")
        match what:
            case "prefill":
                _check_plot(plot, bool(compare))
                result, text = _bench_prefill(model, tokens, chunk_size, sizes, repeats, compare)
            case "digests":
                result, text = _bench_digests(model, tokens, {**sizes, "chunk_size": chunk_size}, repeats)
            case "session":
                from dinfer.bench import session

                result = session.bench_session(repeats, log)
                text = session.table(result)
            case "views":
                from dinfer.bench import views

                result = views.bench_views(repeats, log, engines=engines)
                text = views.table(result)
            case _:
                raise ConfigError(f"bench {what!r} is unknown; use prefill, digests, session or views.")
    print(text)
    if json_path:
        keep_json(result, json_path)
    if plot and what == "prefill":
        _draw(result, plot)


def _bench_prefill(
    model: str, tokens: str, chunk_size: str, sizes: dict[str, Any], repeats: int, compare: str
) -> tuple[dict[str, Any], str]:
    """The result of `dinfer bench`, and its text."""
    from dinfer.bench import prefill, strategies
    from dinfer.model.checkpoint import check

    names = compare.split(",") if compare else []
    lengths, chunks = whole_numbers("tokens", tokens), whole_numbers("chunk_size", chunk_size)
    strategies.check_asked(names, lengths, chunks, repeats)
    with _checkpoint(model, prefill.BenchModel()) as folder:
        config = Config.of({**sizes, "model_path": folder, "chunk_size": chunks[0]})
        vocabulary = check(folder).vocab_size
        if names:
            result = strategies.compare(config, vocabulary, names, lengths, chunks, repeats)
            return result, strategies.table(result)
        result = prefill.bench(config, lengths[0], vocabulary, repeats)
        return result, prefill.table(result)


def _bench_digests(
    model: str, tokens: str, values: dict[str, Any], repeats: int
) -> tuple[dict[str, Any], str]:
    """The result of `dinfer bench digests`, and its text."""
    from dinfer.bench.prefill import DIGESTS_MODEL, bench_digests, digests_table
    from dinfer.model.checkpoint import check

    lengths = whole_numbers("tokens", tokens)
    if len(lengths) != 1 or lengths[0] < 1:
        raise ConfigError(f"tokens is {tokens!r}; bench digests takes one number, at least 1.")
    Config.of({**values, "model_path": "demo"})  # before a checkpoint is made
    with _checkpoint(model, DIGESTS_MODEL) as folder:
        config = Config.of({**values, "model_path": folder})
        result = bench_digests(config, lengths[0], check(folder).vocab_size, repeats)
    return result, digests_table(result)


@contextmanager
def _checkpoint(model: str, shape: "BenchModel") -> Iterator[str]:
    """The folder `model`, or, for "", a temporary checkpoint of that shape."""
    from dinfer.bench.prefill import random_checkpoint

    if model:
        yield model
        return
    with random_checkpoint(shape) as folder:
        yield str(folder)


def _check_plot(path: str, compared: bool) -> None:
    """Raises ConfigError for a plot file that could not be written."""
    from dinfer.bench.figure import PlotError, check_ending

    if path and not compared:
        raise ConfigError("plot needs --compare pairwise,ring; without it, --json writes the figures.")
    try:
        if path:
            check_ending(path)
    except PlotError as error:
        raise ConfigError(str(error)) from None


def _draw(result: dict[str, Any], path: str) -> None:
    from dinfer.bench.figure import PlotError, figure, write

    try:
        print(f"plot: {write(figure(result), path)}")
    except (PlotError, OSError) as error:
        stop(error, FAILED)
