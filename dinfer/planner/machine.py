"""A measured machine: what layers cost on each rank, and what each link carries alone and when all are busy."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Self

from dinfer.codec.choice import BlockSize, Codec
from dinfer.plan.graph import Channel
from dinfer.plan.lower import by_stream, lower
from dinfer.plan.ops import Op
from dinfer.plan.partition import Shape
from dinfer.plan.plan import Plan
from dinfer.planner.costs import LayerCost


class CodecCost(NamedTuple):
    """What one codec takes for KV of the model that was measured. `ratio`: encoded bytes for each byte; `encode_s`,
    `decode_s`: seconds for one token's K and V in one layer."""

    name: str
    ratio: float
    encode_s: float
    decode_s: float


class LinkSpeed(NamedTuple):
    """One direction between two ranks. `latency_s`: seconds of a message without payload; `alone`, `together`: payload
    bytes per second, if no other link is busy, and if all are; `ahead`: bytes still on their way when a send ends."""

    source: int
    target: int
    latency_s: float
    alone: float
    together: float
    ahead: float = 0.0


@dataclass(frozen=True)
class Links:
    """All links of a machine, and what messages get of them that travel at the same time: hidden states go first
    (`transport.precedence`), blocks share what they leave; without `hidden_first`, as on streams, all share alike.

    Four things bound a message: its link; what its source can send and its target receive; and what the whole network
    carries. Each was seen at its largest in one of two measurements: a link alone, and all links together.
    """

    speeds: tuple[LinkSpeed, ...]
    hidden_first: bool = True

    @cached_property
    def by_link(self) -> dict[tuple[int, int], LinkSpeed]:
        return {(one.source, one.target): one for one in self.speeds}

    @cached_property
    def _bounds(self) -> dict[object, float]:
        bounds: dict[object, float] = {(one.source, one.target): one.alone for one in self.speeds}
        for rank in {one.source for one in self.speeds}:
            bounds["from", rank] = _most(one for one in self.speeds if one.source == rank)
            bounds["to", rank] = _most(one for one in self.speeds if one.target == rank)
        bounds["all"] = _most(self.speeds)
        return bounds

    @cached_property
    def _known(self) -> dict[tuple[Channel, ...], list[float]]:
        return {}

    def rates(self, moving: Sequence[Channel]) -> list[float]:
        """Bytes per second of each message, 0 for a block that hidden states leave nothing to."""
        key = tuple(moving)
        if key not in self._known:
            self._known[key] = self._shared(key)
        return self._known[key]

    def _shared(self, moving: Sequence[Channel]) -> list[float]:
        """Rates grow alike until a bound is reached; those that it does not bind go on."""
        needed = [((c.source, c.target), ("from", c.source), ("to", c.target), "all") for c in moving]
        left, rates = dict(self._bounds), [0.0] * len(moving)
        for communicators in (("hidden",), ("kv",)) if self.hidden_first else (("hidden", "kv"),):
            growing = {n for n, channel in enumerate(moving) if channel.communicator in communicators}
            while growing:
                users = Counter[object](one for n in growing for one in needed[n])
                tight = min(users, key=lambda one: left[one] / users[one])
                more = left[tight] / users[tight]
                for n in growing:
                    rates[n] += more
                for one, count in users.items():
                    left[one] = max(0.0, left[one] - more * count)
                left[tight] = 0.0
                growing = {n for n in growing if tight not in needed[n]}
        return rates


def _most(speeds: Iterable[LinkSpeed]) -> float:
    """What these links have carried at the same time, or the fastest of them alone."""
    links = list(speeds)
    return max(sum(one.together for one in links), max(one.alone for one in links))


@dataclass(frozen=True)
class MeasuredMachine:
    """All that a simulation needs (`plan.timing.Timings`). `layers`: by rank; `hidden_bytes`, `block_bytes`: of one
    token's hidden state, and of its K and V in one layer; `measured`: by rank and op, seconds that count instead;
    `codecs`: those that were measured; `codec`: what blocks are sent by, as in a config; `padded`: a chunk takes as
    long as the longest of its plan, as graphs do; `streams`: plans are lowered, and their ops issued to streams."""

    layers: tuple[LayerCost, ...]
    links: Links
    hidden_bytes: int
    block_bytes: int
    measured: Mapping[tuple[int, Op], float] = field(default_factory=dict)
    codecs: tuple[CodecCost, ...] = ()
    codec: str = "none"
    padded: bool = False
    streams: bool = False

    @cached_property
    def _coding(self) -> CodecCost:
        """Of K and V together. A codec that was not measured takes no time, and as many bytes as are typical."""
        known = {one.name: one for one in self.codecs}
        halves = [
            known.get(name) or _unmeasured_cost(name, self.block_bytes) for name in Codec.of(self.codec)
        ]
        return CodecCost(self.codec, *(sum(parts) / 2 for parts in list(zip(*halves, strict=True))[1:]))

    def coding(self, op: Op) -> tuple[float, float]:
        if op.what != "kv":
            return 0.0, 0.0
        return op.tokens * self._coding.encode_s, op.tokens * self._coding.decode_s

    def compute(self, rank: int, op: Op, shape: Shape) -> float:
        known = self.measured.get((rank, op))
        if known is not None:
            return known
        if op.kind != "layer":
            return 0.0
        rows = shape.chunks[op.chunk]
        tokens = max(map(len, shape.chunks)) if self.padded else len(rows)
        return self.layers[rank].seconds(rows.start, tokens)

    def as_run(self, plan: Plan) -> Plan:
        """The plan with the lanes in which its ops run here."""
        return by_stream(lower(plan)) if self.streams else plan

    def message(self, op: Op) -> int:
        if op.what != "kv":
            return op.tokens * self.hidden_bytes
        return round(op.tokens * self.block_bytes * self._coding.ratio)

    def latency(self, channel: Channel) -> float:
        return self.links.by_link[channel.source, channel.target].latency_s

    def ahead(self, channel: Channel) -> float:
        return self.links.by_link[channel.source, channel.target].ahead

    def rates(self, moving: Sequence[Channel]) -> Sequence[float]:
        return self.links.rates(moving)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; without `measured`."""
        return {
            "layers": [vars(cost) for cost in self.layers],
            "links": [one._asdict() for one in self.links.speeds],
            "hidden_bytes": self.hidden_bytes,
            "block_bytes": self.block_bytes,
            "codecs": [one._asdict() for one in self.codecs],
            "codec": self.codec,
            "padded": self.padded,
            "streams": self.streams,
        }

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `as_dict`."""
        layers = tuple(LayerCost(**cost) for cost in values["layers"])
        streams = values.get("streams", False)
        links = Links(tuple(LinkSpeed(**one) for one in values["links"]), hidden_first=not streams)
        codecs = tuple(CodecCost(**one) for one in values.get("codecs", ()))
        return cls(
            layers, links, values["hidden_bytes"], values["block_bytes"],
            codecs=codecs, codec=values.get("codec", "none"),
            padded=values.get("padded", False), streams=streams,
        )  # fmt: skip


def _unmeasured_cost(name: str, block_bytes: int) -> CodecCost:
    size = BlockSize(1, 1, max(1, block_bytes // 4), "bfloat16")
    return CodecCost(name, 1.0 if name == "none" else Codec(name, name).typical(size) / size.nbytes, 0.0, 0.0)
