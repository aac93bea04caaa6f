"""`dinfer bench`: times of prefill, sessions and views on this machine."""

from contextlib import nullcontext
from typing import Annotated, Any

from typer import Argument, Option

from dinfer.cli.root import BAD_INPUT, FAILED, INTERRUPTED, app, check_outputs, keep_json, log, stop
from dinfer.config import Config, ConfigError, whole_numbers
from dinfer.errors import DinferError

TOKENS = "2048"
"""of the prompt, where nothing else is said"""


@app.command()
def bench(
    what: Annotated[
        str,
        Argument(
            help="prefill; cores: beside one process with all cores, decode beside transformers; links: over slow "
            "links; planner: its choice beside a sweep; growth: with prompt, chunks, ranks, layers, and what an op "
            "costs; digests: with and without; gpu: kernels beside transformers; session: steps, recording, a death; "
            "views: figures, report"
        ),
    ] = "prefill",
    model: Annotated[
        str,
        Option(
            help="checkpoint folder; default: random weights, 8 layers of hidden size 1024, for planner 512"
        ),
    ] = "",
    tokens: Annotated[
        str,
        Option(
            help="length of the prompt; with --compare also several: 512,2048; default: 2048, for planner 768"
        ),
    ] = "",
    chunk_size: Annotated[str, Option(help="tokens per chunk; with --compare also several: 64,128")] = "128",
    world_size: Annotated[int, Option(help="number of ranks")] = 2,
    threads: Annotated[int, Option(help="CPU threads of each rank")] = 1,
    repeats: Annotated[int, Option(help="timed rounds, after a warm-up round")] = 3,
    json_path: Annotated[str, Option("--json", help="write the figures to this file")] = "",
    compare: Annotated[str, Option(help="compare two sync strategies: pairwise,ring")] = "",
    plot: Annotated[str, Option(help="with --compare: a plot file, .html, .svg or .png")] = "",
    rate: Annotated[
        str, Option(help="links: speed of every host's interface, one or several; needs root")
    ] = "10gbit,1gbit,100mbit",
    codec: Annotated[
        str, Option(help="links: codecs of KV, one or several: none,int8,k=int8+v=fp8; lossless: in bfloat16")
    ] = "none",
    hosts: Annotated[int, Option(help="links: number of hosts, one rank on each")] = 3,
    overwrite: Annotated[
        bool, Option("--overwrite", help="replace the files of --json and --plot if they exist")
    ] = False,
    growth: Annotated[
        bool, Option("--growth", help="gpu: also other numbers of tokens and chunk sizes")
    ] = False,
    engines: Annotated[
        bool, Option("--engines", help="views: also time the inspector on three engines")
    ] = False,
) -> None:
    """Time pairwise, ring, lockstep, no sync and one process on this machine, or --compare two strategies."""
    from dinfer.launch.processes import interrupt_as_error

    sizes = {"world_size": world_size, "threads": threads}
    asked, tokens = tokens, tokens or TOKENS
    try:
        if repeats < 1:
            raise ConfigError(f"repeats is {repeats}; it must be at least 1.")
        check_outputs({"--json": json_path, "--plot": plot}, overwrite=overwrite)
        interrupt_as_error()  # or ranks would go on where `timeout` or a scheduler ends this process
        match what:
            case "prefill":
                if plot and not compare:
                    raise ConfigError(
                        "plot needs --compare pairwise,ring; without it, --json writes the figures."
                    )
                if plot:
                    from dinfer.bench.figure import check_ending

                    check_ending(plot)
                result, text = _bench_prefill(model, tokens, chunk_size, sizes, repeats, compare)
            case "links":
                result, text = _bench_links(
                    model,
                    tokens,
                    {**sizes, "world_size": hosts, "chunk_size": chunk_size},
                    repeats,
                    rate,
                    codec,
                )
            case "cores":
                result, text = _bench_cores(model, tokens, {**sizes, "chunk_size": chunk_size}, repeats)
            case "planner":
                result, text = _bench_planner(model, asked, {**sizes, "chunk_size": chunk_size}, repeats)
            case "growth":
                from dinfer.bench import growth as growing

                config = Config.of({**sizes, "chunk_size": chunk_size, "model_path": "demo"})
                if model:
                    raise ConfigError(
                        "bench growth takes no model: it makes those that it needs, with more layers."
                    )
                result = growing.bench_growth(config, _one_length("growth", tokens), repeats, log)
                text = growing.table(result)
            case "digests":
                result, text = _bench_digests(model, tokens, {**sizes, "chunk_size": chunk_size}, repeats)
            case "gpu":
                from dinfer.bench import gpu

                lengths = whole_numbers("tokens", tokens), whole_numbers("chunk_size", chunk_size)
                if any(len(numbers) != 1 or numbers[0] < 1 for numbers in lengths):
                    raise ConfigError(
                        "bench gpu takes one number of tokens and one chunk_size, each at least 1."
                    )
                result = gpu.bench_gpu(model, lengths[0][0], lengths[1][0], repeats, log, growth=growth)
                text = gpu.table(result)
            case "session":
                from dinfer.bench import session

                result = session.bench_session(repeats, log)
                text = session.table(result)
            case "views":
                from dinfer.bench import views

                result = views.bench_views(repeats, log, engines=engines)
                text = views.table(result)
            case _:
                raise ConfigError(
                    f"bench {what!r} is unknown; use prefill, cores, links, planner, growth, digests, gpu, session or "
                    "views."
                )
    except KeyboardInterrupt:
        stop("interrupted; all ranks were ended.", INTERRUPTED)
    except (DinferError, RuntimeError) as error:
        stop(error, BAD_INPUT if isinstance(error, ValueError) else FAILED)
    print(text)
    if json_path:
        keep_json(result, json_path)
    if plot and what == "prefill":
        from dinfer.bench.figure import PlotError, figure, write

        try:
            print(f"plot: {write(figure(result), plot)}")
        except (PlotError, OSError) as error:
            stop(error, FAILED)


def _bench_prefill(
    model: str, tokens: str, chunk_size: str, sizes: dict[str, Any], repeats: int, compare: str
) -> tuple[dict[str, Any], str]:
    """The result of `dinfer bench`, and its text."""
    from dinfer.bench import prefill, strategies
    from dinfer.model.checkpoint import check

    names = compare.split(",") if compare else []
    lengths, chunks = whole_numbers("tokens", tokens), whole_numbers("chunk_size", chunk_size)
    strategies.check_asked(names, lengths, chunks, repeats)
    Config.of(
        {**sizes, "model_path": model or "demo", "chunk_size": chunks[0]}
    )  # before a checkpoint is made
    with nullcontext(model) if model else prefill.random_checkpoint(prefill.BenchModel()) as folder:
        config = Config.of({**sizes, "model_path": str(folder), "chunk_size": chunks[0]})
        vocabulary = check(str(folder)).vocab_size
        if names:
            result = strategies.compare(config, vocabulary, names, lengths, chunks, repeats)
            return result, strategies.table(result)
        result = prefill.bench(config, lengths[0], vocabulary, repeats)
        return result, prefill.table(result)


def _bench_digests(
    model: str, tokens: str, values: dict[str, Any], repeats: int
) -> tuple[dict[str, Any], str]:
    """The result of `dinfer bench digests`, and its text."""
    from dinfer.bench.prefill import DIGESTS_MODEL, bench_digests, digests_table, random_checkpoint
    from dinfer.model.checkpoint import check

    length = _one_length("digests", tokens)
    Config.of({**values, "model_path": "demo"})  # before a checkpoint is made
    with nullcontext(model) if model else random_checkpoint(DIGESTS_MODEL) as folder:
        config = Config.of({**values, "model_path": str(folder)})
        result = bench_digests(config, length, check(str(folder)).vocab_size, repeats)
    return result, digests_table(result)


def _bench_links(
    model: str, tokens: str, values: dict[str, Any], repeats: int, rates: str, codecs: str
) -> tuple[dict[str, Any], str]:
    """The result of `dinfer bench links`, and its text."""
    from dinfer.bench import links
    from dinfer.bench.prefill import BenchModel, random_checkpoint
    from dinfer.job import check_codec
    from dinfer.model.checkpoint import check

    length = _one_length("links", tokens)
    config = Config.of({**values, "model_path": "demo"})
    named = [rate for rate in rates.split(",") if rate.strip()]
    ways = links.codecs_of(codecs)
    if any("lossless" in way for way in ways):
        config = config.with_(dtype="bfloat16")
    links.check_asked(config, named)
    with nullcontext(model) if model else random_checkpoint(BenchModel()) as folder:
        spec = check(str(folder))
        config = config.with_(model_path=str(folder))
        for way in ways:
            check_codec(config.with_(codec=way), spec)
        result = links.bench_links(config, spec.vocab_size, spec.layers, length, named, repeats, ways, log)
    return result, links.table(result)


def _bench_cores(model: str, tokens: str, values: dict[str, Any], repeats: int) -> tuple[dict[str, Any], str]:
    """The result of `dinfer bench cores`, and its text."""
    from dinfer.bench import cores
    from dinfer.bench.prefill import BenchModel, random_checkpoint
    from dinfer.model.checkpoint import check

    length = _one_length("cores", tokens)
    config = Config.of({**values, "model_path": "demo"})
    cores.check_asked(config, length)
    with nullcontext(model) if model else random_checkpoint(BenchModel()) as folder:
        spec = check(str(folder))
        config = config.with_(model_path=str(folder))
        result = cores.bench_cores(config, spec.vocab_size, spec.layers, length, repeats, log)
    return result, cores.table(result)


def _bench_planner(
    model: str, tokens: str, values: dict[str, Any], repeats: int
) -> tuple[dict[str, Any], str]:
    """The result of `dinfer bench planner`, and its text."""
    from dinfer.bench import planner
    from dinfer.bench.prefill import random_checkpoint
    from dinfer.model.checkpoint import check

    length = _one_length("planner", tokens or str(planner.TOKENS))
    config = Config.of({**values, "model_path": "demo"})
    planner.check_asked(config)
    with nullcontext(model) if model else random_checkpoint(planner.MODEL) as folder:
        spec = check(str(folder))
        config = config.with_(model_path=str(folder))
        result = planner.bench_planner(config, spec.vocab_size, spec.layers, length, repeats, log)
    return result, planner.table(result)


def _one_length(what: str, tokens: str) -> int:
    """The number of tokens of a benchmark that takes one. Raises ConfigError."""
    lengths = whole_numbers("tokens", tokens)
    if len(lengths) != 1 or lengths[0] < 1:
        raise ConfigError(f"tokens is {tokens!r}; bench {what} takes one number, at least 1.")
    return lengths[0]
