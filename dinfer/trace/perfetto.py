"""A trace as the trace-event JSON that Perfetto and Chrome read: ranks as processes, lanes as threads, sends as arrows.

The format is the one that Chromium's developers describe under that name. Times are microseconds, with fractions.
"""

from collections.abc import Iterator
from typing import Any

from dinfer.trace.events import Event
from dinfer.trace.trace import COMPUTE, Trace
from dinfer.trace.transfers import Transfer, transfers

Json = dict[str, Any]
Threads = dict[tuple[int, str], int]
End = tuple[int, str, int | None, str, int | None, int | None]
"""rank, kind, peer, what, chunk, layer"""


def trace_events(trace: Trace) -> Json:
    """The whole file. Time 0 is when the first op was allowed to begin."""
    began = min((event.ready for event in trace.events), default=0)
    lanes = sorted({(event.rank, event.lane) for event in trace.events}, key=_order)
    threads = {lane: number for number, lane in enumerate(lanes, 1)}
    events = [
        *_names(threads),
        *(slice_ for event in trace.events for slice_ in _slices(event, threads, began)),
        *_arrows(trace, threads, began),
    ]
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": trace.about}


def op_name(event: Event) -> str:
    """For example `send kv c3 l5`."""
    words = [
        event.kind,
        event.what,
        f"c{event.chunk}" * (event.chunk is not None),
        f"l{event.layer}" * (event.layer is not None),
    ]
    return " ".join(filter(None, words))


def _names(threads: Threads) -> Iterator[Json]:
    for rank in sorted({rank for rank, _ in threads}):
        yield _meta("process_name", rank, 0, {"name": f"rank {rank}"})
        yield _meta("process_sort_index", rank, 0, {"sort_index": rank})
    for (rank, lane), number in threads.items():
        yield _meta("thread_name", rank, number, {"name": lane})
        yield _meta("thread_sort_index", rank, number, {"sort_index": number})


def _meta(name: str, rank: int, thread: int, arguments: Json) -> Json:
    return {"name": name, "ph": "M", "pid": rank, "tid": thread, "ts": 0, "args": arguments}


def _slices(event: Event, threads: Threads, began: int) -> Iterator[Json]:
    """The wait for the peer, if there was one, and the op."""
    where = {"pid": event.rank, "tid": threads[event.rank, event.lane]}
    about = {
        name: value
        for name, value in event.as_dict().items()
        if name in _ARGUMENTS and value not in (None, "")
    }
    if event.waited > 0:
        yield _complete(f"wait: {op_name(event)}", "wait", event.start - began, event.waited, where, about)
    category = "compute" if event.kind in COMPUTE else "transfer"
    yield _complete(op_name(event), category, event.met - began, event.busy, where, about)


def _complete(name: str, category: str, start: int, long: int, where: Json, arguments: Json) -> Json:
    times = {"ts": start / 1e3, "dur": long / 1e3}
    return {"name": name, "cat": category, "ph": "X", **times, **where, "args": arguments}


def _arrows(trace: Trace, threads: Threads, began: int) -> Iterator[Json]:
    """From each send to its recv: a flow starts inside the one's slice and ends inside the other's."""
    lanes = {(e.rank, e.kind, e.peer, e.what, e.chunk, e.layer): e.lane for e in trace.prefill()}
    for number, one in enumerate(transfers(trace)):
        ends = [lanes.get(key) for key in _ends(one)]
        if ends[0] is None or ends[1] is None:
            continue
        for phase, rank, lane, time in (
            ("s", one.source, ends[0], one.met),
            ("f", one.target, ends[1], one.end),
        ):
            where = {"pid": rank, "tid": threads[rank, lane], "ts": (time - began) / 1e3}
            yield {
                "name": one.what or "transfer",
                "cat": "flow",
                "ph": phase,
                "id": number,
                "bp": "e",
                **where,
            }


def _ends(one: Transfer) -> list[End]:
    of_block = (one.what, one.chunk, one.layer)
    return [(one.source, "send", one.target, *of_block), (one.target, "recv", one.source, *of_block)]


def _order(lane: tuple[int, str]) -> tuple[int, bool, str]:
    return lane[0], lane[1] != "compute", lane[1]


_ARGUMENTS = ("chunk", "layer", "peer", "tokens", "bytes", "index")
