"""`dinfer bench growth`: how prefill grows with the prompt, the chunks, the ranks and the layers, and what an op costs
beside its layer.

Times of the wall depend on what else the machine does; the ranks' CPU time hardly does. What an op costs is the CPU
time of all ranks without that of the same layers alone, by the number of ops: lanes, events, digests, and both ends of
each message, gloo's own threads included.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from dinfer.bench.prefill import BenchModel, prompt_of, random_checkpoint, run_ranks
from dinfer.config import Config
from dinfer.display import Table

if TYPE_CHECKING:
    from dinfer.bench.growth_rank import GrowthTimes

GROWTH_MODEL = BenchModel(hidden_size=256, layers=8, heads=4, kv_heads=2, head_dim=64, intermediate_size=768)
"""layers of about a millisecond for 32 tokens, so that what an op costs can be seen"""

PROMPTS = (512, 1024, 2048, 4096, 8192)
CHUNKS = (32, 64, 128, 256, 512)
RANKS = (1, 2, 4, 8)
LAYERS = (8, 20, 40, 80)

PER_OP_TARGET_MS = 0.2


class Growth(NamedTuple):
    """One row: what grows in its table, and its sizes."""

    grows: str
    tokens: int
    chunk_size: int
    world_size: int
    layers: int
    schedule: str = "pipelined"


def rows_of(config: Config, tokens: int, layers: int) -> list[Growth]:
    """All rows: one size at a time grows from what is given; and lockstep beside pipelined with the smallest chunks."""
    usual = Growth("", tokens, config.chunk_size, config.world_size, layers)
    return [
        *(usual._replace(grows="prompt", tokens=one) for one in PROMPTS),
        *(usual._replace(grows="chunk", chunk_size=one) for one in CHUNKS if one <= tokens),
        *(usual._replace(grows="ranks", world_size=one) for one in RANKS if one <= layers),
        *(usual._replace(grows="layers", layers=one) for one in LAYERS),
        *(
            usual._replace(grows="schedule", chunk_size=min(CHUNKS), schedule=schedule)
            for schedule in ("pipelined", "lockstep")
        ),
    ]


def bench_growth(
    config: Config, tokens: int, repeats: int, say: Callable[[str], None], shape: BenchModel = GROWTH_MODEL
) -> dict[str, Any]:
    """Time all rows, those of equal ranks and layers on the same processes, in turn. Raises RuntimeError."""
    rows = rows_of(config, tokens, shape.layers)
    return {
        "model": asdict(shape),
        "threads": config.threads,
        "repeats": repeats,
        "cases": timed(rows, config, repeats, say, shape),
    }


def timed(
    rows: Sequence[Growth], config: Config, repeats: int, say: Callable[[str], None], shape: BenchModel
) -> list[dict[str, Any]]:
    """A case for each row, in their order."""
    found: dict[Growth, dict[str, Any]] = {}
    for world_size, layers in dict.fromkeys((row.world_size, row.layers) for row in rows):
        mine = [row for row in rows if (row.world_size, row.layers) == (world_size, layers)]
        say(f"{world_size} ranks, {layers} layers: {len(mine)} cases")
        with _ready(config, shape, world_size, layers) as ready:
            ranks = _on_ranks(ready, mine, repeats, shape.vocab_size)
        for number, row in enumerate(mine):
            found[row] = case_of(row, [times[number] for times in ranks])
    return [found[row] for row in rows]


@contextmanager
def _ready(config: Config, shape: BenchModel, world_size: int, layers: int) -> Iterator[Config]:
    with random_checkpoint(replace(shape, layers=layers)) as folder:
        yield config.with_(world_size=world_size, model_path=str(Path(folder)))


def _on_ranks(
    config: Config, rows: Sequence[Growth], repeats: int, vocab_size: int
) -> "list[list[GrowthTimes]]":
    from dinfer.bench.growth_rank import GrowthCase, GrowthJob, GrowthTimes

    ids = prompt_of(max(row.tokens for row in rows), vocab_size)
    cases = [GrowthCase(row.tokens, row.chunk_size, row.schedule) for row in rows]  # type: ignore[arg-type]
    return run_ranks(
        "dinfer.bench.growth_rank",
        config,
        lambda met: GrowthJob(asdict(met), ids, cases, repeats),
        list[GrowthTimes],
    )


def case_of(row: Growth, ranks: "Sequence[GrowthTimes]") -> dict[str, Any]:
    """A row with its medians. `seconds`: by round, until all ranks were done; `cpu_s`, `layers_cpu_s`: of all ranks;
    `per_op_ms`: the CPU time of an op beside its layer."""
    seconds = [max(one) for one in zip(*(rank.seconds for rank in ranks), strict=True)]
    cpu = [sum(one) for one in zip(*(rank.cpu_s for rank in ranks), strict=True)]
    alone = [sum(one) for one in zip(*(rank.layers_cpu_s for rank in ranks), strict=True)]
    ops = sum(rank.ops for rank in ranks)
    beside = [(whole - layers) / ops * 1e3 for whole, layers in zip(cpu, alone, strict=True)]
    return {
        **row._asdict(),
        "ops": ops,
        "seconds": seconds,
        "median_s": median(seconds),
        "cpu_s": median(cpu),
        "layers_cpu_s": median(alone),
        "per_op_ms": median(beside),
    }


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    columns = (
        "grows",
        "tokens",
        "chunk",
        "ranks",
        "layers",
        "schedule",
        "ops",
        "s",
        "CPU s",
        "layers' CPU s",
        "op ms",
    )
    rows = [
        [
            one["grows"], f"{one['tokens']:,}", one["chunk_size"], one["world_size"], one["layers"], one["schedule"],
            f"{one['ops']:,}", *(f"{one[name]:.3f}" for name in ("median_s", "cpu_s", "layers_cpu_s", "per_op_ms")),
        ]
        for one in result["cases"]
    ]  # fmt: skip
    model = result["model"]
    return (
        f"prefill over gloo, hidden {model['hidden_size']}, threads each: {result['threads']}; medians of "
        f"{result['repeats']}, in turn\n{Table(columns, rows)}\n"
        "op ms: CPU time of all ranks without that of the same layers alone, by op, in milliseconds "
        f"(target: at most {PER_OP_TARGET_MS:g})"
    )
