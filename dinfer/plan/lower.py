"""Lowering: from lanes to one lane a rank, in one order for all ranks, which is what NCCL can keep.

NCCL promises less than threads do: on one communicator a pending recv blocks a later send to the same peer, and
CUDA does not promise that independent streams progress. The worst case is that everything a rank issues runs
serially in issue order, and that is exactly a plan with one blocking lane a rank: what `verify` proves of a
lowered plan holds there too. Ops keep their text; nothing here issues anything.
"""

from dataclasses import replace
from heapq import heappop, heappush

from dinfer.plan.graph import NONE, Graph, levels, no_collection, simulate
from dinfer.plan.ops import Op, PlanError
from dinfer.plan.plan import ISSUE, Lane, Plan

MessageKey = tuple[int, int, int, int]


@no_collection()
def lower(plan: Plan) -> Plan:
    """The same ops, on each rank in one lane: the ranks' shares of one global order in which each send is followed
    by its recv and blocks go about a chunk behind hidden states.

    A plan that has one lane a rank keeps its order, whatever verify says of it. Raises PlanError for another that
    can hang: it has no such order.
    """
    if all(len(lanes) <= 1 for lanes in plan.lanes):
        issued = [list(lanes[0].ops if lanes else ()) for lanes in plan.lanes]
    else:
        issued = _shares(plan)
    return replace(plan, lanes=tuple((Lane(ISSUE, tuple(ops)),) for ops in issued))


def _shares(plan: Plan) -> list[list[Op]]:
    graph = Graph(plan)
    course = simulate(graph, rendezvous=True)
    if len(course.order) < len(graph.ops):
        raise PlanError("only a plan that verify has proved can be lowered; this one can hang.")
    shares: list[list[Op]] = [[] for _ in plan.lanes]
    for number in _global_order(graph, _keys(graph, course.order)):
        shares[graph.ranks[number]].append(graph.ops[number])
    return shares


def _keys(graph: Graph, order: list[int]) -> list[MessageKey]:
    """When each op would best be issued: hidden states first, then compute, then blocks that are a chunk old.

    A stage's layers are a chunk's worth of levels, the time in which every layer takes as long as another.
    """
    chunk = max(len(stage) for stage in graph.plan.shape.stages)
    found = []
    for op, level in zip(graph.ops, levels(graph, order), strict=True):
        is_block = op.is_transfer and op.what == "kv"
        kind = 2 if is_block else 0 if op.is_transfer else 1
        found.append((level + chunk * is_block, kind, op.chunk, op.layer))
    return found


def _global_order(graph: Graph, keys: list[MessageKey]) -> list[int]:
    """Every op after what it needs and after those before it on its lane; a recv right after its send."""
    missing = [len(deps) + (before != NONE) for deps, before in zip(graph.deps, graph.before, strict=True)]
    ready: list[tuple[MessageKey, int]] = []
    order: list[int] = []

    def offer(number: int) -> None:
        """A transfer is ready with both its ends, and goes by its send."""
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
