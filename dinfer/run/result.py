"""The result of a run: the merged trace, the figures of each rank and link, as JSON and as a table."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dinfer.cluster.ranks import RankState
from dinfer.engine.corruption import Corruption
from dinfer.job import Job
from dinfer.trace.events import Event
from dinfer.trace.trace import Trace
from dinfer.version import __version__


def merge(job: Job, by_rank: Sequence[Sequence[Event]]) -> Trace:
    """One trace of all ranks' events."""
    shape = job.plan.shape
    return Trace.merge(
        by_rank,
        dinfer=__version__,
        model=job.config.model_path,
        layers=shape.layers,
        tokens=shape.tokens,
        chunk_size=shape.chunk_size,
        stages=list(shape.starts),
        schedule=job.plan.schedule,
        sync_strategy=job.plan.sync_strategy,
        world_size=shape.world_size,
        threads=job.config.threads,
        plan_id=f"{job.plan.id:016x}",
    )


def result_of(job: Job, ranks: Sequence[RankState], trace: Trace, text: str) -> dict[str, Any]:
    """The content of `--json`. Seconds and bytes are those of prefill, except `decode_s`; `tokens` are the new ones."""
    reports = [state.reports["result"] for state in ranks]
    figures = [trace.rank_figures(rank) for rank in range(len(ranks))]
    return {
        "prompt_tokens": len(job.ids),
        "tokens": reports[0]["tokens"],
        "text": text,
        "plan": {"id": f"{job.plan.id:016x}", "proved": job.verdict.proved, "proof": str(job.verdict)},
        "backend": job.config.backend,
        "schedule": job.plan.schedule,
        "sync_strategy": job.plan.sync_strategy,
        "ranks": [
            {
                "rank": figure.rank,
                **{
                    name: report[name]
                    for name in ("host", "device", "threads", "dtype", "kv_sha256", "tokens")
                },
                "prefill_s": figure.prefill_s,
                "compute_s": figure.compute_s,
                "exposed_sync_s": figure.exposed_sync_s,
                "check_s": figure.check_s,
                "decode_s": report["decode_s"],
                "waiting_s": figure.waiting_s,
                "wire_s": figure.wire_s,
                "sent_bytes": figure.sent_bytes,
                "received_bytes": figure.received_bytes,
            }
            for figure, report in zip(figures, reports, strict=True)
        ],
        "links": [link._asdict() for link in trace.link_figures()],
        "corrupt": [{**one.as_dict(), "text": str(one)} for one in corrupt_blocks(ranks)],
    }


def corrupt_blocks(ranks: Sequence[RankState]) -> list[Corruption]:
    """The blocks in which ranks have found changed bytes."""
    return [
        Corruption.of(note["found"]) for state in ranks for note in state.notes if note["note"] == "corrupt"
    ]


def write_json(result: dict[str, Any], path: str | Path) -> None:
    Path(path).write_text(json.dumps(result, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def table(result: dict[str, Any]) -> str:
    """The figures at the end of a run, one line a rank and one a link."""
    lines = [
        "rank  device   prefill s  compute s  exposed sync s  decode s  waiting s  wire s     sent MB  received MB",
        *(_rank_line(rank) for rank in result["ranks"]),
    ]
    if result["links"]:
        lines += ["", "link   transfers         MB  median ms     MB/s on the wire"]
    for link in result["links"]:
        speed = f"{link['bytes_per_s'] / 1e6:,.0f}" if link["bytes_per_s"] else "-"
        lines.append(
            f"{link['source']}→{link['target']:<4} {link['transfers']:>9}  {link['bytes'] / 1e6:>9.3f}"
            f"  {link['median_transfer_s'] * 1e3:>9.2f}  {speed:>19}"
        )
    return "\n".join(lines)


def _rank_line(rank: dict[str, Any]) -> str:
    return (
        f"{rank['rank']:>4}  {rank['device']:<7}  {rank['prefill_s']:>9.3f}  {rank['compute_s']:>9.3f}"
        f"  {rank['exposed_sync_s']:>14.3f}  {rank['decode_s']:>8.3f}  {rank['waiting_s']:>9.3f}"
        f"  {rank['wire_s']:>6.3f}  {rank['sent_bytes'] / 1e6:>10.3f}  {rank['received_bytes'] / 1e6:>11.3f}"
    )
