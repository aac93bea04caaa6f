"""KvTools: what else the KV page asks: the next difference, values that are watched, heads over layers, the drift from
the reference, and values to take along.

A browser asks by `tool`; the answer has its name and tool. Ranks are asked on threads of their own, one for what is
watched, so that this goes on while a comparison takes long.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from safetensors.torch import save

from dinfer.errors import DinferError, NotPossible
from dinfer.kv.difference import Difference, number_text
from dinfer.kv.measure import FIELDS
from dinfer.kv.reference.comparison import Comparison
from dinfer.kv.view import KV
from dinfer.plan.ops import PlanError
from dinfer.run.state import MOVING
from dinfer.severity import Severity
from dinfer.views.panel.desk import Action, Painter, Worker, keep_newest
from dinfer.views.protocol import InspectableRun, Json

MOST_PINS = 12

MOST_VALUES = 1 << 22
"""that a browser takes along; more are written by a call"""

SHOWN = ("absmax", "mean", "min", "max", "nan", "inf", "zeros")
"""figures of heads, the first of which is shown first"""

assert set(SHOWN) == set(FIELDS)


class KvPin(NamedTuple):
    """A value that is watched, or one that differs. `tensor`: 0 for K, 1 for V."""

    layer: int
    tensor: int
    token: int
    head: int
    dim: int


class KvTools:
    """The tools of one panel. `send(content, buffers)` sends to all its browsers."""

    def __init__(self, run: InspectableRun, send: Callable[..., object]) -> None:
        self._run, self._send = run, send
        self._worker = Worker("dinfer panel KV tools", self._tell)
        self._painter = Painter(self._watch, "pins", period=0.1)
        self._pins: dict[str, list[KvPin]] = {}

    def ask(self, message: Json) -> None:
        """A browser asks. Returns at once."""
        tool, view = str(message.get("tool")), str(message.get("view"))
        if tool == "pins":
            pins = dict(self._pins)  # another thread goes through the old ones
            keep_newest(pins, view, pins_of(self._run, message.get("pins")))
            self._pins = pins
            self._painter.touch()
            return
        tools: Mapping[str, Callable[[Json], tuple[Json, Sequence[bytes]]]] = {
            "difference": self._difference, "heads": self._heads, "drift": self._drift, "export": self._export,
        }  # fmt: skip
        if tool in tools:
            self._worker.ask(Action(tool, lambda: self._answer(tools[tool], message, view, tool)))

    def touch(self) -> None:
        """Called when the run may have changed."""
        if any(self._pins.values()):
            self._painter.touch()

    def close(self) -> None:
        """Ask nothing more; what is under way ends by itself."""
        self._worker.close()
        self._painter.close(wait=False)

    def _tell(self) -> None:
        """Answers are sent by the actions themselves."""

    def _answer(
        self, tool: Callable[[Json], tuple[Json, Sequence[bytes]]], message: Json, view: str, name: str
    ) -> None:
        to = {"view": view, "tool": name}
        try:
            found, buffers = tool(message)
            self._send({"kv_tool": {**to, **found}}, list(buffers))
        except Exception as error:  # nothing else would report it
            word = getattr(error, "severity", Severity.ERROR).word
            self._send({"kv_tool": {**to, "error": str(error) or type(error).__name__, "severity": word}})

    # -- the tools

    def _difference(self, message: Json) -> tuple[Json, Sequence[bytes]]:
        """The next value that differs between ranks, or the one before, beginning anew at the ends."""
        diff = self._run.kv().diff(values=None)
        shape = self._run.plan.shape
        places = sorted(
            {(_place_of(one), n) for n, one in enumerate(diff.differences) if one.token is not None}
        )
        if not places:
            return {"none": diff.verdict, "severity": diff.severity.word}, ()
        now = pins_of(self._run, [message.get("at")])
        here = now[0] if now else KvPin(-1, 0, 0, 0, 0)
        if message.get("forward", True):
            which = next((n for n, (place, _) in enumerate(places) if place > here), 0)
        else:
            which = max((n for n, (place, _) in enumerate(places) if place < here), default=len(places) - 1)
        place, index = places[which]
        one = diff.differences[index]
        owner = shape.owners[one.layer]
        other = owner if owner != one.rank else (owner + 1) % shape.world_size
        is_shared = len(set(self._values(place))) == 1  # what was passed on: A − B would be empty
        sides = (
            {"a": one.rank, "b": other, "show": "a"}
            if is_shared
            else {"a": other, "b": one.rank, "show": "a-b"}
        )
        return {
            "place": place._asdict(), **sides, "which": which + 1, "count": len(places),
            "chunk": shape.chunk_of(place.token) if place.token < shape.tokens else len(shape.chunks) - 1,
            "text": str(one),
        }, ()  # fmt: skip

    def _heads(self, message: Json) -> tuple[Json, Sequence[bytes]]:
        """Figures of each head of each layer on one rank: `values[field][layer][head]`, None where it has no tokens."""
        tensor, rank = int(message.get("tensor") == "V"), _index(message.get("rank"), self._run.world_size)
        source = self._run.kv().source()
        held, layers = source.held([rank])[0], range(self._run.plan.shape.layers)
        by_layer: list[Any] = [
            source.summary(rank, layer, range(held.rows[layer])) if held.rows[layer] else None
            for layer in layers
        ]
        values = {
            field: [one and [_finite(n) for n in one[field][tensor]] for one in by_layer] for field in SHOWN
        }
        call = f"run.kv(layer=0, rank={rank}).summary()"
        return {
            "fields": list(SHOWN),
            "values": values,
            "rank": rank,
            "letter": "KV"[tensor],
            "call": call,
        }, ()

    def _drift(self, _: Json) -> tuple[Json, Sequence[bytes]]:
        """How far each block is from the reference's, as a share of its largest value."""
        found = self._run.compare("reference")
        if not isinstance(found, Comparison):
            raise NotPossible(f"there is no drift to show: {found}")
        shares = [
            [
                row["layer"],
                row["chunk"],
                *(_finite(row[f"{name}_share"]) for name in ("K", "V")),
                row["tolerance"],
            ]
            for row in found.rows
            if row["layer"] < self._run.plan.shape.layers and row["K_share"] is not None
        ]
        said = {"verdict": found.verdict, "severity": found.severity.word, "call": 'run.compare("reference")'}
        return {"shares": shares, **said}, ()

    def _export(self, message: Json) -> tuple[Json, Sequence[bytes]]:
        """All heads and tokens of K and V of one layer on one rank, as the bytes of a file."""
        layer = _index(message.get("layer"), self._run.plan.shape.layers)
        rank = _index(message.get("rank"), self._run.world_size)
        kv = KV(self._run.kv(layer=layer).source, layer=layer, chunk=None, rank=rank)
        heads, tokens, dims = kv.k.shape
        form = "safetensors" if message.get("form") == "safetensors" else "csv"
        call = f'run.kv(layer={layer}, rank={rank}).to_{form}("kv.{form}")'
        if 2 * heads * tokens * dims > MOST_VALUES:
            raise NotPossible(
                f"{2 * heads * tokens * dims:,} values are too many for a browser, which takes {MOST_VALUES:,}: {call}"
            )
        if form == "csv":
            data = str(kv.to_csv()).encode()
        else:
            about = {name: str(value) for name, value in kv.k.about.items()}
            data = save({"k": kv.k[:].contiguous(), "v": kv.v[:].contiguous()}, about)
        return {"file": f"kv-l{layer}-rank{rank}.{form}", "call": call}, [data]

    # -- what is watched

    def _watch(self) -> None:
        standing = self._run.standing()
        if standing.state in MOVING:
            return
        for view, pins in self._pins.items():
            self._answer(partial(self._watched, pins, standing.last_call), {}, view, "pins")

    def _watched(self, pins: Sequence[KvPin], call: str, _: Json) -> tuple[Json, Sequence[bytes]]:
        values = [self._values(pin) for pin in pins]
        return {"pins": [[*pin] for pin in pins], "values": values, "call": call}, ()

    def _values(self, pin: KvPin) -> list[str]:
        """A value on each rank, as text."""
        try:
            source = self._run.kv(layer=pin.layer).source()
            ranks = range(self._run.world_size)
            held = source.held(ranks)
            return [
                number_text(
                    float(source.part(rank, pin.layer, pin.tensor, [pin.head], [pin.token])[0, 0, pin.dim]),
                    source.subject.dtype,
                )
                if pin.token < has.rows[pin.layer]
                else "not here"
                for rank, has in zip(ranks, held, strict=True)
            ]
        except PlanError:  # nothing is computed
            return ["not here"] * self._run.world_size
        except (DinferError, IndexError) as error:
            return [str(error)]


def pins_of(run: InspectableRun, given: object) -> list[KvPin]:
    """From a browser's message; what is no place of this run is left out."""
    found = []
    for one in given if isinstance(given, list) else []:
        is_place = isinstance(one, list) and len(one) == len(KvPin._fields)
        if is_place and all(type(n) is int and 0 <= n < 1 << 40 for n in one):
            pin = KvPin(*one)
            if pin.layer < run.plan.shape.layers and pin.tensor < 2:
                found.append(pin)
    return found[:MOST_PINS]


def _place_of(one: Difference) -> KvPin:
    return KvPin(one.layer, int(one.tensor == "V"), one.token or 0, one.head or 0, one.dim or 0)


def _index(given: object, count: int) -> int:
    return max(0, min(count - 1, given)) if isinstance(given, int) else 0


def _finite(number: float | None) -> float | str | None:
    """As JSON has it, which knows no NaN and no Inf."""
    if number is None or abs(number) < float("inf"):
        return number
    return str(number)
