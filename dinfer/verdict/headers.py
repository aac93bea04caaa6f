"""What an unexpected message tells about which rank is wrong, and how."""

from collections.abc import Sequence

from dinfer.plan.graph import Channel, Graph, channel_of
from dinfer.plan.ops import Op, Value, parse_op
from dinfer.plan.plan import OpPlace
from dinfer.verdict.signs import Came, Raised, Signs
from dinfer.verdict.waits import HangKind, Root


def mismatch(graph: Graph, signs: Sequence[Signs], rank: int, raised: Raised) -> Root:
    """The root of an exception on `rank` that a message has caused. `raised.came` and `raised.op` must be known."""
    came, op = raised.came, parse_op(raised.op)
    assert came
    event = f"at `{op}` rank {rank} got {came.value}, {came.tokens} tokens"
    if came.here not in (0, graph.plan.id):
        text = f"runs another plan (id {came.here:016x}): {event} by the others' plan"
        return Root("another plan", rank, text, op.peer)
    if came.plan_id != graph.plan.id:
        return Root("another plan", op.peer, f"runs another plan (id {came.plan_id:016x}): {event}", rank)
    if came.value == op.value:
        text = f"sent {op.value} in another size: {event}, {came.nbytes:,} bytes"
        return Root("other size", op.peer, text, rank)
    kind, culprit, text = _order(graph, signs, rank, op, came)
    return Root(kind, culprit, f"{text}: {event}", op.peer if culprit == rank else rank)


def _order(graph: Graph, signs: Sequence[Signs], rank: int, op: Op, came: Came) -> tuple[HangKind, int, str]:
    """Which rule of order was broken, by which rank, and a text that says so."""
    channel = channel_of(rank, op)
    sends, recvs = graph.channels.get(channel, ([], []))
    expected = next((n for n, recv in enumerate(recvs) if graph.ops[recv] == op), None)
    number = next((n for n, send in enumerate(sends) if graph.ops[send].value == came.value), None)
    if number is None or expected is None:
        for other, (others, _) in graph.channels.items():
            if other.source == op.peer and any(graph.ops[send].value == came.value for send in others):
                return (
                    "wrong peer",
                    op.peer,
                    f"sent {came.value} to rank {rank} in place of rank {other.target}",
                )
        return "out of order", op.peer, f"sent {came.value}, which the plan never sends on this link"
    if expected > _passed(graph, signs[rank], recvs):
        return "out of order", rank, f"receives {op.value} before what comes first"
    if number < expected:
        if _is_empty(graph, signs[rank], recvs[number]):
            return "never received", rank, f"has passed `{graph.ops[recvs[number]]}` and not received it"
        robbed = who_lacks(graph, signs, channel, came.value)
        if robbed is not None:
            return "wrong peer", op.peer, f"sent {came.value} to rank {rank} in place of rank {robbed}"
        return "sent twice", op.peer, f"sent {came.value} twice"
    peer = signs[op.peer]
    if _is_empty(graph, peer, sends[expected]) or _passed(graph, peer, sends) > number:
        return "never sent", op.peer, f"has passed `{graph.ops[sends[expected]]}` and not sent it"
    return "out of order", op.peer, f"sent {came.value} before {op.value}"


def who_lacks(graph: Graph, signs: Sequence[Signs], channel: Channel, value: Value) -> int | None:
    """Another rank to which the channel's source has sent this value, by its own account, and which has not received
    it: if one rank got a value twice, the second was meant for that rank."""
    for other, (sends, recvs) in graph.channels.items():
        if other._replace(target=channel.target) != channel or other == channel:
            continue
        for send, recv in zip(sends, recvs, strict=False):
            sent = has_passed(signs[other.source], graph.place(send))
            came = has_passed(signs[other.target], graph.place(recv))
            if graph.ops[send].value == value and sent and not came:
                return other.target
    return None


def has_passed(signs: Signs, place: OpPlace) -> bool:
    """Whether the op at that place has ended."""
    return place.lane < len(signs.positions) and signs.positions[place.lane] > place.index


def _passed(graph: Graph, signs: Signs, numbers: list[int]) -> int:
    """How many of these ops, all on one lane of the rank, have ended."""
    return sum(has_passed(signs, graph.place(number)) for number in numbers)


def _is_empty(graph: Graph, signs: Signs, number: int) -> bool:
    place = graph.place(number)
    return (place.lane, place.index) in signs.empty
