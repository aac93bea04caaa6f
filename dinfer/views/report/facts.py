"""Facts of a report, from a trace and its findings: its first sentence, plan, map, tables. Pure."""

import re
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

import numpy as np

from dinfer.plan.lower import lower
from dinfer.plan.ops import PlanError
from dinfer.plan.partition import Shape
from dinfer.plan.plan import Plan, parse_plan
from dinfer.plan.schedule import build
from dinfer.run.prediction import HEADS, beside
from dinfer.run.state import Mark
from dinfer.severity import Severity
from dinfer.trace.findings import Findings
from dinfer.trace.shares import Shares
from dinfer.trace.trace import Trace
from dinfer.trace.transfers import Transfer, by_collective, by_link, by_link_and_layer, spread, transfers
from dinfer.verdict.signs import Signs
from dinfer.views.cells import CellMap, CellStates, held_states
from dinfer.views.figures.style import link_name

Key = TypeVar("Key")


class FactTable(NamedTuple):
    """Rows under heads. `wide`: the number of first columns that hold text, not numbers; `left_out`: a sentence on rows
    that are left out."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    wide: int = 1
    left_out: str = ""


MOST_LINKS, MOST_LAYERS, MOST_OPS = 60, 400, 20_000
"""so many rows of links, rows of links and layers, and lines of a plan at most: what no one reads makes a page slow"""


LARGEST = 200_000
"""blocks × ranks of a plan that is built again for any report; a larger one only for a trace that has as many events"""


def plan_of(trace: Trace, findings: Findings) -> Plan | None:
    """The plan of the run: from the findings, or built from its shape if that, lowered for NCCL or not, gives the same
    plan id."""
    about = trace.about
    if findings.plan:
        return parse_plan(findings.plan)
    try:
        sizes = about["layers"], about["tokens"], about["chunk_size"], tuple(about["stages"])
        shape = Shape(*sizes, tuple(about.get("chunks") or ()))
        if shape.blocks * shape.world_size > max(LARGEST, 10 * len(trace.events)):
            return None
        made = build(shape, about["schedule"], about["sync_strategy"])
        if f"{made.id:016x}" != about.get("plan_id"):
            made = lower(made)
    except (KeyError, TypeError, PlanError):
        return None
    return made if f"{made.id:016x}" == about.get("plan_id") else None


def owners_of(trace: Trace, plan: Plan | None) -> Sequence[int]:
    """The rank that owns each layer: by the plan, else the rank that computed it."""
    if plan:
        return plan.shape.owners
    computed = {event.layer: event.rank for event in trace.prefill() if event.kind == "layer"}
    layers = 1 + max((layer for layer in computed if layer is not None), default=-1)
    return [computed.get(layer, 0) for layer in range(layers)]


def stands_in(plan: Plan, positions: Sequence[Sequence[int]]) -> bool:
    """Whether these are positions of that plan."""
    if [len(at) for at in positions] != [len(lanes) for lanes in plan.lanes]:
        return False
    found = zip(
        (n for at in positions for n in at), (lane for lanes in plan.lanes for lane in lanes), strict=True
    )
    return all(0 <= position <= len(lane.ops) for position, lane in found)


def map_states(trace: Trace, findings: Findings, plan: Plan | None) -> CellStates | None:
    """What each rank held of each block at the end; None if the trace has no blocks."""
    if plan and stands_in(plan, findings.positions):  # or they are of another plan
        return CellMap(plan).states([Signs(at, (False,) * len(at), at) for at in findings.positions])
    held = np.array([trace.received(rank) for rank in trace.ranks], bool)
    return held_states(held.transpose(2, 1, 0)) if held.size else None


def marks_of(findings: Findings, shape: tuple[int, ...]) -> list[Mark]:
    """Notes on single blocks of a map of that shape, (layers, chunks, ranks): the run's marks, and the differences in
    KV."""
    found = [Mark(*mark) for mark in findings.marks]
    found += [Mark(*block, "differs", "") for block in (findings.kv.blocks if findings.kv else ())]
    return [
        mark
        for mark in found
        if all(0 <= at < size for at, size in zip((mark.layer, mark.chunk, mark.rank), shape, strict=True))
    ]


def link_table(trace: Trace) -> FactTable:
    """Percentiles of each link's latency in milliseconds, on the wire and waiting."""
    heads = ["link", "transfers", "MB"]
    for part in ("wire", "waiting"):
        heads += [f"{part} {name}" for name in ("p50", "p90", "p99", "longest")]
    rows, links = [], by_link(transfers(trace))
    for link, found in slowest(links, MOST_LINKS).items():
        wire, waited = spread(one.wire for one in found), spread(one.waited for one in found)
        megabytes = f"{sum(one.bytes for one in found) / 1e6:,.3f}"
        times = map(milliseconds, (*wire[1:], *waited[1:]))
        rows.append([link_name(link), str(len(found)), megabytes, *times])
    return FactTable(heads, rows, left_out=_left_out(len(rows), len(links), "links"))


def prediction_table(trace: Trace, findings: Findings) -> FactTable | None:
    """What the planner predicted of prefill, ranks and links beside what was measured; None where it did not."""
    rows = beside(findings.predicted, trace)
    more = f"The first {MOST_LAYERS} of {len(rows):,} rows." if len(rows) > MOST_LAYERS else ""
    return FactTable(HEADS, rows[:MOST_LAYERS], left_out=more) if rows else None


def collective_table(trace: Trace) -> FactTable:
    """The collectives of a watched program, by kind and group: how many calls, bytes, and milliseconds of waiting and
    of all else."""
    rows = []
    for (kind, group), events in by_collective(trace.events).items():
        busy, waited = (spread(map(attrgetter(name), events)) for name in ("busy", "waited"))
        times = map(milliseconds, (*busy[1:], *waited[1:]))
        megabytes = f"{sum(event.bytes for event in events) / 1e6:,.3f}"
        rows.append([kind, group, str(len(events)), megabytes, *times])
    heads = ["collective", "group", "calls of all ranks", "MB"]
    for part in ("in it", "waiting"):
        heads += [f"{part} {name}" for name in ("p50", "p90", "p99", "longest")]
    return FactTable(heads, rows, wide=2)


def layer_table(trace: Trace) -> FactTable:
    """Percentiles of the latency, waiting plus wire, by link and layer."""
    rows, layers = [], by_link_and_layer(transfers(trace))
    for (link, layer), found in slowest(layers, MOST_LAYERS).items():
        times = spread(one.latency for one in found)
        rows.append([link_name(link), str(layer), str(times.number), *map(milliseconds, times[1:])])
    heads = ["link", "layer", "transfers", "p50, ms", "p90, ms", "p99, ms", "longest, ms"]
    return FactTable(heads, rows, left_out=_left_out(len(rows), len(layers), "links and layers"))


def slowest(found: dict[Key, list[Transfer]], most: int) -> dict[Key, list[Transfer]]:
    """Of more than `most`, those with the longest transfers, in their order."""
    if len(found) <= most:
        return found
    longest = {key: max(one.latency for one in some) for key, some in found.items()}
    kept = set(sorted(found, key=longest.__getitem__)[-most:])
    return {key: some for key, some in found.items() if key in kept}


def _left_out(shown: int, count: int, what: str) -> str:
    return f"The {shown} {what} with the longest transfers, of {count:,}." if shown < count else ""


def plan_text(plan: Plan) -> str:
    """An op per line; of a long plan, the beginning."""
    lines = plan.text().splitlines()
    more = [f"… and {len(lines) - MOST_OPS:,} more lines: `dinfer plan` prints them"] * (
        len(lines) > MOST_OPS
    )
    return "\n".join([*lines[:MOST_OPS], *more])


def rank_table(findings: Findings) -> FactTable:
    """Where each rank ran, and what it holds; without empty columns."""
    columns = {
        "rank": [str(rank.rank) for rank in findings.ranks],
        "device": [rank.device for rank in findings.ranks],
        "host": [rank.host for rank in findings.ranks],
        "dtype": [rank.dtype for rank in findings.ranks],
        "threads": [str(rank.threads or "") for rank in findings.ranks],
        "KV, SHA-256": [rank.kv_sha256[:16] or "not checked" for rank in findings.ranks],
        "new tokens": ["" if rank.tokens is None else str(len(rank.tokens)) for rank in findings.ranks],
    }
    known = {head: cells for head, cells in columns.items() if any(cells)}
    return FactTable(list(known), list(zip(*known.values(), strict=True)), wide=len(known))


def is_summary(one: Mapping[str, Any]) -> bool:
    """Whether it has what `compared_table` shows: a file may say anything of other runs."""
    numbers = [one.get(key) for key in ("prefill_s", "exposed", "bubble", "bytes")]
    latency = [one.get(key) for key in ("p50_s", "p99_s")]
    return all(isinstance(value, int | float) for value in numbers) and all(
        isinstance(value, int | float | None) for value in latency
    )


def compared_table(summaries: Sequence[tuple[str, Mapping[str, Any]]]) -> FactTable:
    """A row for each run."""
    heads = ["run", "strategy", "schedule", "chunk size", "prefill, s", "exposed", "bubble"]
    heads += ["MB sent", "p50, ms", "p99, ms"]
    rows = []
    for name, one in summaries:
        times = ["not ended", "–", "–"]
        if one.get("ended", True):
            times = [f"{one['prefill_s']:.3f}", *(f"{100 * one[key]:.1f} %" for key in ("exposed", "bubble"))]
        latency = ("–" if one.get(key) is None else milliseconds(one[key]) for key in ("p50_s", "p99_s"))
        settings = (str(one.get(key)) for key in ("sync_strategy", "schedule", "chunk_size"))
        rows.append([name, *settings, *times, f"{one['bytes'] / 1e6:,.3f}", *latency])
    return FactTable(heads, rows, wide=3)


def difference_table(findings: Findings) -> FactTable | None:
    """The differences in KV, with the columns of the comparison."""
    found = findings.kv.differences if findings.kv else ()
    if not found:
        return None
    heads = list(found[0])
    return FactTable(heads, [[str(one.get(head, "")) for head in heads] for one in found], wide=len(heads))


def pairs(values: Mapping[str, Any]) -> FactTable:
    """A row for each name and value."""
    return FactTable(["", ""], [(name, text_of(value)) for name, value in values.items()], wide=2)


def text_of(value: Any) -> str:
    """A value, or those of a list, as text."""
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.3f}"


FAILURES = {
    "hung": "the run hangs",
    "running": "the run hangs",  # as earlier versions said, and the next
    "decoding": "the run hangs",
    "lost": "a rank was lost",
    "taken over": "another session took the engines over",
}
"""how a sentence about a failure begins, by the run's state; others: the run failed"""


def severity(findings: Findings) -> Severity:
    """How grave the gravest finding is."""
    found = [kv_severity(findings)]
    found += [failure_severity(findings)] * bool(findings.failure)
    found += [Severity.ERROR] * (bool(findings.corrupt) or len({rank.tokens for rank in findings.ranks}) > 1)
    found += [Severity.WARNING] * bool(
        findings.faults or findings.edited or findings.nonfinite or findings.warnings
    )
    return max(found)


def failure_severity(findings: Findings) -> Severity:
    """How grave it is that the run could not go on."""
    return Severity.WARNING if findings.state == "taken over" else Severity.ERROR


def kv_severity(findings: Findings) -> Severity:
    """How grave it is what `kv_part` says."""
    if findings.kv:
        return Severity.OK if findings.kv.equal else Severity.ERROR
    digests = {rank.kv_sha256 for rank in findings.ranks}
    if "" in digests or len(findings.ranks) < 2:
        return Severity.NOTE
    return Severity.OK if len(digests) == 1 else Severity.ERROR


def parts_of(findings: Findings, found: Shares, span: str = "prefill") -> list[str]:
    """What is known of the run, a sentence each, the most important first: it is the headline. `span`: `Trace.span`."""
    return list(map(as_sentence, _parts(findings, found, span)))


def as_sentence(text: str) -> str:
    """With a capital and a full stop."""
    return f"{text[:1].upper()}{text[1:]}."


MOST_WARNINGS = 3
"""in the headline; all stand below it"""

POSITION = re.compile(r"; it st(?:ood|ands) at: ")
"""before the lanes of a rank that was lost, which the message below the headline names"""

OUTSIDE_QUOTES = re.compile(r"; (?=(?:[^']*'[^']*')*[^']*$)")
"""between the clauses of a comparison, not within the text of a token"""


def _parts(findings: Findings, found: Shares, span: str) -> Iterator[str]:
    if findings.failure:
        what = FAILURES.get(findings.state, "the run failed")
        yield f"{what}: {POSITION.split(findings.failure.splitlines()[0])[0].rstrip('.')}"
    elif findings.state in ("paused", "running", "preparing", "starting"):
        yield "the run is not at the end of its prefill"
    yield from (one.rstrip(".") for one in findings.warnings[:MOST_WARNINGS])
    is_checked = findings.kv or (findings.ranks and all(rank.kv_sha256 for rank in findings.ranks))
    if is_checked:
        for clause in OUTSIDE_QUOTES.split(kv_part(findings)):
            yield f"{clause} differ" if clause.endswith(" values") else clause
    tokens = [rank.tokens for rank in findings.ranks]
    if any(tokens) and None not in tokens:  # nothing without decode
        greedy = "greedy tokens" if findings.parameters.get("temperature") == 0 else "tokens"
        yield f"{greedy} agree" if len(set(tokens)) == 1 else f"{greedy} differ between ranks"
    if findings.faults:
        count = len(findings.faults)
        yield f"{count} {'fault was' if count == 1 else 'faults were'} armed on purpose"
    if findings.edited:
        yield "values were edited by hand"
    if findings.corrupt:
        count = len(findings.corrupt)
        yield f"changed bytes were found {'once' if count == 1 else f'{count} times'}"
    if findings.nonfinite:
        yield f"not finite: {findings.nonfinite}"
    if not findings.failure:  # the transfers in which a failed run stopped, and their time, are in no event
        yield exposed_part(found, span)
    if not is_checked and span == "prefill":  # a watched program may have no KV
        yield kv_part(findings)


def kv_part(findings: Findings) -> str:
    """Whether the ranks hold the same KV, by comparison or else by digests."""
    if findings.kv:
        text = findings.kv.sentence.rstrip(".")
        # In lower case, unless it begins with an abbreviation.
        return text[:1].lower() + text[1:] if text[1:2].islower() else text
    digests = [rank.kv_sha256 for rank in findings.ranks]
    if not digests or not all(digests):
        return "whether the ranks hold the same KV was not checked"
    if len(digests) == 1:
        return "there is only one rank"
    others = [str(rank.rank) for rank in findings.ranks if rank.kv_sha256 != digests[0]]
    if not others:
        return f"all {len(digests)} ranks hold the same KV"
    hold = f"rank {others[0]} holds" if len(others) == 1 else f"ranks {', '.join(others)} hold"
    return f"{hold} other KV than rank {findings.ranks[0].rank}"


def exposed_part(found: Shares, span: str = "prefill") -> str:
    """How much of prefill was exposed communication, and where most of it occurred. `span`: `Trace.span`."""
    if not found.ranks:
        return f"the trace holds no {span.removeprefix('the ')}"
    if not found.links and not found.exposed:
        return "nothing was sent between ranks"
    if found.exposed == 0:
        return f"no communication of {span} was exposed"
    if not found.links:
        return f"{percent(found.exposed)} of {span} was exposed communication, in collectives"
    # Waiting or the wire, whichever is more over all ranks, as in their figure, and the link with most of it.
    waits = found.wait_s > found.wire_s
    where, seconds = ("waiting", attrgetter("wait_s")) if waits else ("on the wire", attrgetter("wire_s"))
    link = max(found.links, key=seconds)
    if seconds(link):
        alone = seconds(link) == sum(map(seconds, found.links))
        name = f"link {link.source}→{link.target}"
        whom = f"for rank {link.late} on {name}" if link.late is not None else f"on {name}"
        where += f"{'' if alone else ', above all'} {whom if waits else f'of {name}'}"
    return f"{percent(found.exposed)} of {span} was exposed communication, most of it {where}"


def percent(part: float) -> str:
    """For example 7 %; below 1 %, with one decimal."""
    if 0 < part < 0.001:
        return "less than 0.1 %"
    return f"{100 * part:.1f} %" if 0 < part < 0.01 else f"{100 * part:.0f} %"
