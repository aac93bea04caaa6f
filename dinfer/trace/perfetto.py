"""A trace as trace-event JSON, which Perfetto and Chrome read: ranks as processes, lanes as threads, sends as arrows.

The format is Chromium's "Trace Event Format". Times are microseconds, with fractions.
"""

from collections.abc import Iterator
from typing import Any

from dinfer.trace.events import COMPUTE, Event, EventLog, pairs

PerfettoJson = dict[str, Any]

Threads = dict[tuple[int, str], int]


def trace_events(trace: EventLog) -> PerfettoJson:
    """The content of the file. Time 0 is when the first op was allowed to start."""
    began = min((event.ready for event in trace.events), default=0)
    lanes = sorted({(event.rank, event.lane) for event in trace.events}, key=_order)
    threads = {lane: number for number, lane in enumerate(lanes, 1)}
    arrows = _arrows(trace)
    events = [
        *_names(threads),
        *(
            one
            for event in trace.events
            for one in (
                *_slices(event, threads, began),
                *_arrow(event, arrows.get(id(event)), threads, began),
            )
        ),
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


def _names(threads: Threads) -> Iterator[PerfettoJson]:
    for rank in sorted({rank for rank, _ in threads}):
        yield _meta("process_name", rank, 0, {"name": f"rank {rank}"})
        yield _meta("process_sort_index", rank, 0, {"sort_index": rank})
    for (rank, lane), number in threads.items():
        yield _meta("thread_name", rank, number, {"name": lane})
        yield _meta("thread_sort_index", rank, number, {"sort_index": number})


def _meta(name: str, rank: int, thread: int, arguments: PerfettoJson) -> PerfettoJson:
    return {"name": name, "ph": "M", "pid": rank, "tid": thread, "ts": 0, "args": arguments}


def _slices(event: Event, threads: Threads, began: int) -> Iterator[PerfettoJson]:
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


def _complete(
    name: str, category: str, start: int, long: int, where: PerfettoJson, arguments: PerfettoJson
) -> PerfettoJson:
    times = {"ts": start / 1e3, "dur": long / 1e3}
    return {"name": name, "cat": category, "ph": "X", **times, **where, "args": arguments}


def _arrows(trace: EventLog) -> dict[int, tuple[str, int]]:
    """By the id() of an event: "s" or "f" for the start or end of an arrow from a send to its recv, and its number."""
    found = dict[int, tuple[str, int]]()
    for number, (send, recv) in enumerate(pairs(trace.events)):
        if send and recv:
            found[id(send)], found[id(recv)] = ("s", number), ("f", number)
    return found


def _arrow(event: Event, end: tuple[str, int] | None, threads: Threads, began: int) -> Iterator[PerfettoJson]:
    """One end of an arrow, to be written just after its slice.

    A reader assigns it to the slice that began last on its thread by then, in the order of times and then of the file.
    So it must come before anything that begins where this slice ends.
    """
    if end is None:
        return
    phase, number = end
    time = event.met if phase == "s" else max(event.met, event.end - 1)
    yield {
        "name": event.what or "transfer",
        "cat": "flow",
        "ph": phase,
        "id": number,
        "bp": "e",
        "pid": event.rank,
        "tid": threads[event.rank, event.lane],
        "ts": (time - began) / 1e3,
    }


def _order(lane: tuple[int, str]) -> tuple[int, bool, str]:
    return lane[0], lane[1] != "compute", lane[1]


_ARGUMENTS = ("chunk", "layer", "peer", "tokens", "bytes", "index")
