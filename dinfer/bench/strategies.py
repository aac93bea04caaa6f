"""`dinfer bench --compare`: two sync strategies over prompt lengths and chunk sizes, and which of them to use.

All cases run on the same ranks, in turn. A difference counts only if the slowest round of one strategy was faster than
the fastest round of the other. `figure` draws the result.
"""

from collections.abc import Sequence
from itertools import product
from statistics import median
from typing import Any, get_args

from dinfer.bench.prefill import on_ranks
from dinfer.config import Config, ConfigError, SyncStrategy
from dinfer.display import Table

DEFAULT = "pairwise"


def check_asked(
    strategies: Sequence[str], tokens: Sequence[int], chunk_sizes: Sequence[int], repeats: int
) -> None:
    """Raises ConfigError for cases that cannot be timed; without strategies, nothing is compared."""
    for name, numbers in (("tokens", tokens), ("chunk_size", chunk_sizes)):
        if not numbers or min(numbers) < 1:
            raise ConfigError(f"{name} is {','.join(map(str, numbers))!r}; it must be at least 1.")
        if len(numbers) > 1 and not strategies:
            given = ",".join(map(str, numbers))
            raise ConfigError(f"{name} is {given}; several values need --compare pairwise,ring.")
    if strategies:
        check_compared(strategies, repeats)


def check_compared(strategies: Sequence[str], repeats: int) -> None:
    """Raises ConfigError unless these are two strategies and at least two rounds."""
    known = get_args(SyncStrategy)
    if len(set(strategies)) != 2 or len(strategies) != 2 or not set(strategies) <= set(known):
        raise ConfigError(
            f"compare is {','.join(strategies)!r}; it must be two of {', '.join(known)}, such as "
            f"{','.join(known[:2])}."
        )
    if repeats < 2:
        raise ConfigError(
            f"repeats is {repeats}; --compare needs at least 2 to judge differences by their scatter, better 5."
        )


def compare(
    config: Config,
    vocab_size: int,
    strategies: Sequence[str],
    tokens: Sequence[int],
    chunk_sizes: Sequence[int],
    repeats: int,
) -> dict[str, Any]:
    """Time both strategies for every prompt length and chunk size.

    Raises ConfigError, or RuntimeError if a rank fails.
    """
    from dinfer.bench.rank import BenchCase, Variant

    check_compared(strategies, repeats)
    variants = [Variant(name, sync_strategy=name) for name in strategies]  # type: ignore[arg-type] # checked above
    cases = [BenchCase(variant, *sizes) for sizes in product(tokens, chunk_sizes) for variant in variants]
    by_rank = on_ranks(config, vocab_size, cases, repeats)
    measured = [
        [
            (max(t.seconds for t in ranks), max(t.exposed_sync_s for t in ranks))
            for ranks in zip(*took, strict=True)
        ]
        for took in zip(*by_rank, strict=True)
    ]
    rows = [
        _row(sizes, dict(zip(strategies, measured[2 * n : 2 * n + 2], strict=True)))
        for n, sizes in enumerate(product(tokens, chunk_sizes))
    ]
    about = {"world_size": config.world_size, "threads": config.threads, "repeats": repeats}
    return {"strategies": list(strategies), **about, "cases": rows, "verdict": verdict(rows)}


def _row(sizes: tuple[int, int], measured: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """The result for one prompt length and chunk size. `ratio`: the second strategy's median over the first's."""
    seconds = {name: [took for took, _ in rounds] for name, rounds in measured.items()}
    medians = {name: median(took) for name, took in seconds.items()}
    first, second = medians
    return {
        "tokens": sizes[0],
        "chunk_size": sizes[1],
        "seconds": seconds,
        "medians": medians,
        "exposed_sync_s": {name: median(sync for _, sync in rounds) for name, rounds in measured.items()},
        "ratio": medians[second] / medians[first],
        "faster": _faster(seconds),
    }


def _faster(seconds: dict[str, list[float]]) -> str | None:
    """The strategy of which every round was faster than every round of the other, if any."""
    first, second = seconds
    if max(seconds[first]) < min(seconds[second]):
        return first
    return second if max(seconds[second]) < min(seconds[first]) else None


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """One sentence: which strategy to use, and why."""
    winners = {row["faster"] for row in rows} - {None}
    if not winners:
        return _no_difference(rows)
    if len(winners) > 1:
        parts = [
            f"{name} for {_listed([r for r in rows if r['faster'] == name])}" for name in sorted(winners)
        ]
        return f"It depends: use {'; '.join(parts)}; otherwise their rounds overlap."
    (name,) = winners
    won = [row for row in rows if row["faster"] == name]
    (other,) = set(rows[0]["medians"]) - {name}
    best = min(won, key=lambda row: _share(row, name))
    sync = best["exposed_sync_s"]
    rest = "" if len(won) == len(rows) else "; otherwise their rounds overlap"
    return (
        f"Use {name}: for {_listed(won)} it took {_span([_share(row, name) for row in won])} × the time of {other} "
        f"(medians), and each of its rounds was faster than any of {other}. At {_sizes(best)}, a rank spent "
        f"{sync[name]:.3f} s moving KV without computing, against {sync[other]:.3f} s{rest}."
    )


def _no_difference(rows: Sequence[dict[str, Any]]) -> str:
    first, second = rows[0]["medians"]
    keep = DEFAULT if DEFAULT in (first, second) else first
    where = "in every case" if len(rows) > 1 else f"at {_sizes(rows[0])}"
    ratios = _span([row["ratio"] for row in rows])
    return (
        f"No difference beyond the scatter: {second} took {ratios} × the time of {first} "
        f"(medians), and {where} their rounds overlap. Keep {keep}, the default."
    )


def _share(row: dict[str, Any], name: str) -> float:
    """The strategy's median over the other's."""
    (other,) = set(row["medians"]) - {name}
    return float(row["medians"][name] / row["medians"][other])


def _span(ratios: Sequence[float]) -> str:
    low, high = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
    return low if low == high else f"{low}–{high}"


def _listed(rows: Sequence[dict[str, Any]]) -> str:
    return ", ".join(_sizes(row) for row in rows)


def _sizes(row: dict[str, Any]) -> str:
    return f"{row['tokens']:,} tokens by {row['chunk_size']}"


def table(result: dict[str, Any]) -> str:
    """The seconds of both strategies, a row for each prompt length and chunk size, and the verdict."""
    first, second = result["strategies"]
    rows = [
        [
            row["tokens"],
            row["chunk_size"],
            _cell(row, first),
            _cell(row, second),
            f"{row['ratio']:.2f}",
            row["faster"] or "-",
        ]
        for row in result["cases"]
    ]
    return (
        f"prefill on {result['world_size']} ranks, threads each: {result['threads']}; seconds, medians of "
        f"{result['repeats']} in turn (fastest–slowest)\n"
        f"{Table(('tokens', 'chunk', first, second, f'time of {second} ÷ {first}', 'faster'), rows)}\n"
        f"{result['verdict']}"
    )


def _cell(row: dict[str, Any], name: str) -> str:
    rounds = row["seconds"][name]
    return f"{row['medians'][name]:.3f} ({min(rounds):.3f}–{max(rounds):.3f})"
