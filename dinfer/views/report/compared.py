"""Compared: the facts of several runs, row by row, with the ratio of two, its direction, and a mark on what differs."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dinfer.trace.clocks import KEY as CLOCKS
from dinfer.trace.findings import KEY, Findings, findings_of
from dinfer.trace.shares import ABOUT_PARTS, percentages, shares
from dinfer.trace.summary import SAME, summary
from dinfer.trace.trace import Trace
from dinfer.views.report.facts import as_sentence, kv_part, parts_of, text_of

COMPARABLE_S = 1.05
"""times that differ by a smaller factor are not marked: one run of each cannot show so small a difference"""


class ComparedRow(NamedTuple):
    """One fact of several runs. `ratio`: of two runs, the second against the first, with its direction; `differs`:
    whether it is marked; `about`: what the fact is."""

    name: str
    cells: Sequence[str]
    ratio: str = ""
    differs: bool = False
    about: str = ""


class ComparedGroup(NamedTuple):
    """Facts under a title."""

    title: str
    rows: Sequence[ComparedRow]


PARTS_NAMED = {
    "compute": "computing",
    "exposed_wire": "exposed, on the wire",
    "exposed_wait": "exposed, waiting",
    "bubble": "bubble",
}


def compared(traces: Sequence[Trace]) -> list[ComparedGroup]:
    """What the runs are, hold and took, fact by fact."""
    known = [findings_of(trace) for trace in traces]
    machines = [{**one.machine, **one.versions} for one in known]
    settings = [_settings(trace, one) for trace, one in zip(traces, known, strict=True)]
    rows = {
        "Result": _results(traces, known),
        "Time": _times(traces),
        "Transfers": _transfers(traces),
        "Settings": _texts(settings),
        "Machine and versions": _texts(machines),
    }
    groups = [ComparedGroup(title, list(some)) for title, some in rows.items()]
    return [group for group in groups if group.rows]


def _results(traces: Sequence[Trace], known: Sequence[Findings]) -> Iterator[ComparedRow]:
    """How each run ended, and what its ranks hold."""
    results = [parts_of(one, shares(trace), trace.span)[0] for trace, one in zip(traces, known, strict=True)]
    rows = {
        "result": results,
        "KV": [as_sentence(kv_part(one)) for one in known],
        "new tokens": [_tokens_text(one) for one in known],
    }
    for name, cells in rows.items():
        if any(cells) and (name == "result" or cells != results):
            yield ComparedRow(name, cells, "", len(set(cells)) > 1)


def _tokens_text(findings: Findings) -> str:
    tokens = [rank.tokens for rank in findings.ranks if rank.tokens]
    return ", ".join(map(str, tokens[0])) if tokens else ""


def _times(traces: Sequence[Trace]) -> Iterator[ComparedRow]:
    """Seconds of prefill, and its parts as shares that add up to 100 %."""
    found = [summary(trace) for trace in traces]
    if not all(one["ended"] and one["prefill_s"] for one in found):
        cells = [f"{one['prefill_s']:.3f}" if one["ended"] else "not ended" for one in found]
        yield ComparedRow(
            "prefill, s", cells, "", len(set(cells)) > 1, "there is no ratio where a run did not end"
        )
        return
    is_same_work = all(one[name] == found[0][name] for one in found for name in SAME)
    about = "from the first op on any rank to the last"
    yield _number(
        "prefill, s", [one["prefill_s"] for one in found], "{:.3f}", "as long" * is_same_work, about
    )
    parts = [shares(trace).parts for trace in traces]
    shown = [dict(zip(one, percentages(list(one.values())), strict=True)) for one in parts]
    for key, name in PARTS_NAMED.items():
        change = 100 * (parts[-1][key] - parts[0][key])
        ratio = f"{change:+.1f} points".replace("-", "−") if len(parts) == 2 else ""
        yield ComparedRow(name, [one[key] for one in shown], ratio, abs(change) >= 5, ABOUT_PARTS[key])


def _transfers(traces: Sequence[Trace]) -> Iterator[ComparedRow]:
    found = [summary(trace) for trace in traces]
    counts = [one["transfers"] for one in found]
    yield _number("transfers", counts, "{:,}", "as many", "messages between ranks in prefill")
    megabytes = [one["bytes"] / 1e6 for one in found]
    yield _number("MB sent", megabytes, "{:,.3f}", "as much", "payloads, without headers")
    if all(one["p50_s"] for one in found):
        about = "from when a payload was ready until the receiver had it all, waiting included"
        for name, key in (("median", "p50_s"), ("99th percentile", "p99_s")):
            times = [one[key] * 1e3 for one in found]
            yield _number(f"latency, {name}, ms", times, "{:,.3f}", "as long", about)


def _number(name: str, values: Sequence[float], form: str, direction: str, about: str) -> ComparedRow:
    """A number of each run. `direction`: of the ratio, such as "as long"; without it there is no ratio."""
    cells = [form.format(value) for value in values]
    low, high = min(values), max(values)
    differs = high > COMPARABLE_S * low
    ratio = (
        f"{values[1] / values[0]:.2f} × {direction}" if direction and len(values) == 2 and values[0] else ""
    )
    return ComparedRow(name, cells, "the same" if ratio and low == high else ratio, differs, about)


def _settings(trace: Trace, findings: Findings) -> dict[str, Any]:
    """What was asked for, by name."""
    left_out = {KEY, CLOCKS, "plan_id", "dinfer"} | (
        {"model"} if "model_path" in findings.parameters else set()
    )
    about = {name: value for name, value in trace.about.items() if name not in left_out}
    return {**about, **findings.parameters}


def _texts(values: Sequence[Mapping[str, Any]]) -> Iterator[ComparedRow]:
    """A row for each name, those that differ first."""
    names = dict.fromkeys(name for one in values for name in one)
    rows = [ComparedRow(name, [text_of(one.get(name, "–")) for one in values]) for name in names]
    marked = [row._replace(differs=len(set(row.cells)) > 1) for row in rows]
    yield from sorted(marked, key=lambda row: not row.differs)
