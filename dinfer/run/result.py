"""The result of a run: the merged trace, the figures of each rank and link, as JSON and as a table."""

from collections.abc import Sequence
from typing import Any

from dinfer.cluster.ranks import RankState
from dinfer.display import Table
from dinfer.engine.corruption import Corruption
from dinfer.job import Job
from dinfer.messages import BlockCorrupt
from dinfer.run.nonfinite import NonFiniteBlocks, nonfinite_of
from dinfer.run.prediction import HEADS, figures_beside, predicted, rows_beside
from dinfer.trace.clocks import on_one_clock
from dinfer.trace.events import Event
from dinfer.trace.trace import OVERLAP, Trace, rank_table
from dinfer.version import __version__


def merge(job: Job, by_rank: Sequence[Sequence[Event]], ranks: Sequence[RankState] = ()) -> Trace:
    """One trace of all ranks' events, on this process's clock. `ranks`: what is known of theirs."""
    shape = job.plan.shape
    by_rank, about = on_one_clock(by_rank, [state.clock for state in ranks])
    return Trace.merge(
        by_rank,
        **about,
        dinfer=__version__,
        model=job.config.model_path,
        layers=shape.layers,
        tokens=shape.tokens,
        chunk_size=shape.chunk_size,
        **({"chunks": list(shape.lengths)} if shape.lengths else {}),
        **({"predicted_s": job.predicted_s} if job.predicted_s else {}),
        stages=list(shape.starts),
        schedule=job.plan.schedule,
        sync_strategy=job.plan.sync_strategy,
        **({} if job.config.codec == "none" else {"codec": job.config.codec}),
        world_size=shape.world_size,
        threads=job.config.threads,
        plan_id=f"{job.plan.id:016x}",
    )


def result_of(job: Job, ranks: Sequence[RankState], trace: Trace, text: str) -> dict[str, Any]:
    """The content of `--json`. Seconds and bytes are those of prefill, except `decode_s`; `tokens` are the new ones."""
    reports = [state.result for state in ranks if state.result]
    corrupt = [Corruption.of(n.found) for state in ranks for n in state.notes if isinstance(n, BlockCorrupt)]
    return {
        "prompt_tokens": len(job.ids),
        "tokens": list(reports[0].tokens),
        "text": text,
        "stopped": reports[0].stopped,
        "ttft_s": trace.ttft_s,
        "plan": {"id": f"{job.plan.id:016x}", "proved": job.verdict.proved, "proof": str(job.verdict)},
        "backend": job.config.backend,
        "schedule": job.plan.schedule,
        "sync_strategy": job.plan.sync_strategy,
        "codec": job.config.codec,
        "chosen": _chosen(job),
        "predicted": _predicted(job, trace),
        "machine": job.machine.as_dict() if job.machine else None,
        "ranks": [
            {
                "rank": rank,
                "host": report.host,
                "device": report.device,
                "threads": report.threads,
                "dtype": report.dtype,
                "kernels": report.kernels,
                "kv_sha256": report.kv_sha256,
                "tokens": list(report.tokens),
                **trace.rank_figures(rank)._asdict(),
                "decode_s": report.decode_s,
            }
            for rank, report in enumerate(reports)
        ],
        "links": [link._asdict() for link in trace.link_figures()],
        "corrupt": [{**one.as_dict(), "text": str(one)} for one in corrupt],
        "nonfinite": _nonfinite(nonfinite_of([state.notes for state in ranks], trace.events)),
    }


def _chosen(job: Job) -> dict[str, Any] | None:
    """What the planner has chosen; None where nothing was `auto`. `because`: a sentence on each choice."""
    if not job.because:
        return None
    shape = job.plan.shape
    return {
        "schedule": job.plan.schedule,
        "chunks": [len(chunk) for chunk in shape.chunks],
        "layer_split": list(shape.starts[1:]),
        "sync_strategy": job.plan.sync_strategy,
        "codec": job.config.codec,
        "predicted_s": job.predicted_s,
        "because": list(job.because),
    }


def _predicted(job: Job, trace: Trace) -> list[dict[str, Any]] | None:
    """What the planner has predicted, beside what was measured; None where nothing was measured before the run."""
    if job.machine is None:
        return None
    return [
        {"of": name, "predicted_s": wanted, "measured_s": found}
        for name, wanted, found in figures_beside(predicted(job), trace)
    ]


def _nonfinite(known: NonFiniteBlocks) -> dict[str, Any] | None:
    if known.first is None:
        return None
    blocks = [
        {"rank": rank, "chunk": chunk, "layer": layer, "what": what}
        for (chunk, layer), (rank, what) in sorted(known.blocks.items())
    ]
    return {"text": known.text, "first": known.first.as_dict(), "blocks": blocks}


def table(result: dict[str, Any]) -> str:
    """The figures at the end of a run, one line a rank and one a link."""
    links = [
        [
            f"{link['source']}→{link['target']}",
            link["transfers"],
            f"{link['bytes'] / 1e6:.3f}",
            f"{link['median_transfer_s'] * 1e3:.2f}",
            f"{link['bytes_per_s'] / 1e6:,.0f}" if link["bytes_per_s"] else "-",
        ]
        for link in result["links"]
    ]
    stopped = {
        "end of text": "the text ended",
        "positions": "all positions of the model are used",
        "max_new_tokens": "max_new_tokens is reached",
    }[result["stopped"]]
    new = len(result["tokens"])
    about_tokens = f"{new} new token{'s' * (new != 1)}; stopped because {stopped}"
    about_links = Table(["link", "transfers", "MB", "median ms", "MB/s on the wire"], links)
    about_ranks = f"{rank_table(result['ranks'])}\n{OVERLAP}"
    wanted = [(one["of"], one["predicted_s"], one["measured_s"]) for one in result["predicted"] or ()]
    about_wanted = Table(HEADS, rows_beside(wanted))
    return "\n\n".join(
        [about_ranks, *[str(about_links)] * bool(links), *[str(about_wanted)] * bool(wanted), about_tokens]
    )
