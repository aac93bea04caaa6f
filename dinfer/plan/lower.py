"""Lowering for NCCL: from several lanes a rank to one, in one order for all ranks.

NCCL guarantees less than threads: on one communicator a pending recv blocks a later send to the same peer, and CUDA
does not guarantee that independent streams progress. In the worst case all that a rank issues runs serially in issue
order, which is a plan with one blocking lane a rank. So what `verify` proves of a lowered plan holds on NCCL.
"""

from dataclasses import replace
from heapq import heappop, heappush

from dinfer.plan.graph import NONE, Graph, gc_paused, levels, simulate
from dinfer.plan.ops import Op, PlanError
from dinfer.plan.plan import ISSUE, Lane, Plan


@gc_paused()
def lower(plan: Plan) -> Plan:
    """The same ops with one lane a rank, in one global order: each send is followed by its recv, and blocks go about a
    chunk behind hidden states.

    A plan that has one lane a rank keeps its order, even if it can hang. Raises PlanError for another plan that can
    hang: it has no such order.
    """
    if all(len(lanes) <= 1 for lanes in plan.lanes):
        issued = [list(lanes[0].ops if lanes else ()) for lanes in plan.lanes]
    else:
        graph, issued = Graph(plan), list[list[Op]]([] for _ in plan.lanes)
        for number in _global_order(graph):
            issued[graph.ranks[number]].append(graph.ops[number])
    return replace(plan, lanes=tuple((Lane(ISSUE, tuple(ops)),) for ops in issued))


def by_stream(plan: Plan) -> Plan:
    """A lowered plan with a lane for each stream to which its ops are issued (`transport.streams.stream_of`): to say
    how long it takes, not to run it. On a stream ops go one after another, both directions with one peer together."""
    lanes = []
    for rank in plan.lanes:
        streams = dict[str, list[Op]]()
        for op in (op for lane in rank for op in lane.ops):
            where = (
                f"{op.communicator}:{op.peer}"
                if op.is_transfer
                else "entry"
                if op.kind == "embed"
                else "compute"
            )
            streams.setdefault(where, []).append(op)
        lanes.append(tuple(Lane(name, tuple(ops)) for name, ops in streams.items()))
    return replace(plan, lanes=tuple(lanes))


def _global_order(graph: Graph) -> list[int]:
    """All ops, each after those that it needs and its predecessors on its lane; a recv right after its send.

    Of those that are ready, hidden states come first, then compute, then blocks of one chunk before. A level is the
    time of one layer, so a chunk passes a stage in as many levels as the stage has layers.
    """
    course = simulate(graph, rendezvous=True)
    if len(course.order) < len(graph.ops):
        raise PlanError("this plan can hang, so it cannot be lowered: verify says why.")
    a_chunk = max(len(stage) for stage in graph.plan.shape.stages)
    keys = list[tuple[int, int, int, int]]()
    for op, level in zip(graph.ops, levels(graph, course.order), strict=True):
        is_block = op.is_transfer and op.what == "kv"
        kind = 2 if is_block else 0 if op.is_transfer else 1
        keys.append((level + a_chunk * is_block, kind, op.chunk, op.layer))

    missing = [len(deps) + (before != NONE) for deps, before in zip(graph.deps, graph.before, strict=True)]
    ready: list[tuple[tuple[int, ...], int]] = []
    order: list[int] = []

    def offer(number: int) -> None:
        """Add an op that is ready; a transfer is ready when both ends are, and counts by its send."""
        partner = graph.partner[number]
        if not missing[number] and (partner == NONE or not missing[partner]):
            first = partner if graph.ops[number].kind == "recv" else number
            heappush(ready, (keys[first], first))

    for number, op in enumerate(graph.ops):
        if op.kind != "recv":
            offer(number)
    while ready:
        number = heappop(ready)[1]
        ended = [number] if graph.partner[number] == NONE else [number, graph.partner[number]]
        order += ended
        for dependent in (d for end in ended for d in graph.dependents[end]):
            missing[dependent] -= 1
            if not missing[dependent]:
                offer(dependent)
    return order
