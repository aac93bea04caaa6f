"""Summary: a run in one row of figures, to be compared with other runs. Pure."""

from collections.abc import Mapping
from typing import Any

from dinfer.display import numbers_text
from dinfer.trace.findings import findings_of
from dinfer.trace.shares import shares
from dinfer.trace.trace import Trace
from dinfer.trace.transfers import spread, transfers

SAME = ("model", "layers", "tokens", "world_size")
"""fields in which runs must agree for their times to be compared"""


def chunks_text(about: Mapping[str, Any]) -> str:
    """The tokens of a run's chunks: `128`, or `2 × 128, 64` where they differ; "" where they are not known."""
    return numbers_text(about["chunks"]) if about.get("chunks") else str(about.get("chunk_size") or "")


def summary(trace: Trace) -> dict[str, Any]:
    """Prefill of all ranks, in seconds, shares of 1 and bytes; None where nothing was sent. `ended`: whether prefill
    has ended, as far as is known; otherwise its times cannot be compared."""
    found, sent, known = shares(trace), transfers(trace), findings_of(trace)
    latency = spread(one.latency for one in sent) if sent else None
    return {
        **{name: trace.about.get(name) for name in (*SAME, "sync_strategy", "schedule")},
        "chunk_size": chunks_text(trace.about) or None,
        "ended": not known.failure and known.state in ("", "done", "decoding"),
        "prefill_s": max((rank.prefill_s for rank in found.ranks), default=0.0),
        "exposed": found.exposed,
        "bubble": found.bubble,
        "exposed_communication": found.exposed_communication,
        "bytes": sum(one.bytes for one in sent),
        "transfers": len(sent),
        "p50_s": latency and latency.p50,
        "p99_s": latency and latency.p99,
    }


def verdict(first: Mapping[str, Any], second: Mapping[str, Any], names: tuple[str, str]) -> str:
    """Which of two runs was faster, in one sentence; or why their times cannot be compared."""
    if different := [name for name in SAME if first[name] != second[name]]:
        listed = "; ".join(f"{name} {first[name]} and {second[name]}" for name in different)
        return f"These are runs of different things, whose times cannot be compared: {listed}."
    if unended := [name for name, one in zip(names, (first, second), strict=True) if not one["ended"]]:
        listed = f"{' and '.join(unended)} did not come to the end of {'its' if len(unended) == 1 else 'their'} prefill"
        return f"{listed}: there are no times to compare."
    times = first["prefill_s"], second["prefill_s"]
    if min(times) <= 0:
        return "One of these runs has no prefill in its trace."
    fast, slow = (0, 1) if times[0] <= times[1] else (1, 0)
    factor = times[slow] / times[fast]
    times_text = f"{names[fast]} took {times[fast]:.3g} s and {names[slow]} {times[slow]:.3g} s"
    if factor < 1.05:
        return f"{times_text}: one run of each cannot show so small a difference."
    exposed = [f"{names[n]} {(first, second)[n]['exposed'] * 100:.0f} %" for n in (fast, slow)]
    return f"{times_text}, {factor:.2f} × as long; exposed communication: {exposed[0]}, {exposed[1]}."
