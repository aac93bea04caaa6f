"""Inspector: the KV of a layer as a picture, for browsers that ask for it, and exact values of what the picture shows.

A browser asks for a picture and says which one it has; it is answered once there is a newer one. So only what is on a
screen is fetched, no faster than the browser draws. A thread of its own waits for the ranks.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from dinfer.kv.difference import number_text
from dinfer.kv.source import Subject, ViewableSource
from dinfer.plan.ops import PlanError
from dinfer.views.desk import Painter
from dinfer.views.protocol import InspectableRun, Json, RunView
from dinfer.views.quantise import MISSING, Scale, Values, figures, quantise

LIMIT = 96 << 20
"""bytes of values that are cached"""

CacheKey = tuple[int, int, int, int, int]
"""(layer, K or V, first token, tokens, digest)"""


class BlockCache:
    """Cached blocks of one run. Used by one thread."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit, self._bytes = limit, 0
        self._kept: OrderedDict[CacheKey, Values] = OrderedDict()

    def of(self, source: ViewableSource, ranks: Sequence[int], layer: int, tensor: int) -> list[Values]:
        """K (0) or V (1) of a layer as each rank holds it now, [heads, tokens, dims], from the first token on."""
        subject = source.subject
        spans = [span for span in subject.spans if span]
        found = []
        digests = source.digests(ranks, [layer], spans)
        for rank, held, numbers in zip(ranks, source.held(ranks), digests, strict=True):
            keys = [
                (layer, tensor, span.start, len(span), int(number))
                for span, number in zip(spans[: held.spans[layer]], numbers[0, :, tensor], strict=False)
            ]
            found.append(self._whole(source, rank, keys))
        return found

    def _whole(self, source: ViewableSource, rank: int, keys: Sequence[CacheKey]) -> Values:
        here = {key: self._kept[key] for key in keys if key in self._kept}
        absent = {key for key in keys if key not in here}
        for missing, some in groupby(keys, absent.__contains__):
            if missing:  # neighbouring blocks are fetched together
                here |= _fetched(source, rank, list(some))
        for key in keys:
            self._keep(key, here[key])
        empty = np.zeros((source.subject.kv_heads, 0, source.subject.head_dim), np.float32)
        return np.concatenate([here[key] for key in keys], axis=1) if keys else empty

    def _keep(self, key: CacheKey, values: Values) -> None:
        if key not in self._kept:
            self._kept[key] = values
            self._bytes += values.nbytes
        self._kept.move_to_end(key)
        while self._bytes > self._limit:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes


def _fetched(source: ViewableSource, rank: int, keys: list[CacheKey]) -> dict[CacheKey, Values]:
    layer, tensor, first, *_ = keys[0]
    places = range(first, keys[-1][2] + keys[-1][3])
    part = source.part(rank, layer, tensor, range(source.subject.kv_heads), places)
    values = (part if part.element_size() > 4 else part.float()).numpy()
    return {key: values[:, key[2] - first : key[2] - first + key[3]].copy() for key in keys}


SendInspection = Callable[..., object]

PERIOD_S = 0.1

VIEWS = 8
"""the number of browsers that are remembered, the newest"""


class InspectRequest(NamedTuple):
    """What a browser shows. `head`: None for all; `show`: "a", "b" or "a-b"; `have`: the stamp of its picture;
    `question`: the browser's number for this request, which answers repeat."""

    view: str
    layer: int
    tensor: int
    head: int | None
    a: int
    b: int
    show: str
    scale: Scale
    have: str
    question: int = 0

    @classmethod
    def of(cls, run: InspectableRun, message: Json) -> "InspectRequest":
        """From a browser's message; out-of-range indices are clamped."""
        shape, scale = run.plan.shape, message.get("scale")
        head = message.get("head")
        return cls(
            str(message.get("view")),
            _within(message.get("layer"), shape.layers),
            int(message.get("tensor") == "V"),
            head if isinstance(head, int) else None,
            _within(message.get("a"), run.world_size),
            _within(message.get("b"), run.world_size),
            message["show"] if message.get("show") in ("b", "a-b") else "a",
            scale if isinstance(scale, int | float) else "full" if scale == "full" else "robust",
            str(message.get("have")),
            message["question"] if isinstance(message.get("question"), int) else 0,
        )

    @property
    def call(self) -> str:
        """The Python expression for these values."""
        part = f".{'kv'[self.tensor]}[{':' if self.head is None else self.head}, :]"
        a, b = (f"run.kv(layer={self.layer}, rank={rank}){part}" for rank in (self.a, self.b))
        return {"a": a, "b": b}.get(self.show, f"{a} - {b}")


class Fetched(NamedTuple):
    """The values in a browser's picture."""

    subject: Subject
    a: Values
    b: Values


class Inspector:
    """The inspector of one panel. `send(content, buffers)` sends to all its browsers."""

    def __init__(self, run: InspectableRun, send: SendInspection) -> None:
        self._run, self._send = run, send
        self._painter = Painter(self._serve, "inspector", PERIOD_S)
        self._lock = threading.Lock()
        self._wants: dict[str, InspectRequest] = {}
        self._fetched: dict[str, Fetched] = {}
        self._blocks = BlockCache()
        self._diff = ("", "", True)

    def ask(self, message: Json) -> None:
        """A browser asks for a newer or another picture. Returns at once."""
        want = InspectRequest.of(self._run, message)
        with self._lock:
            self._wants.pop(want.view, None)
            self._wants[want.view] = want
            _limit(self._wants)
        self._painter.touch()

    def touch(self) -> None:
        """Called when the run may have changed."""
        if self._wants:
            self._painter.touch()

    def value(self, message: Json) -> None:
        """Send the exact values at one place."""
        found = self._fetched.get(str(message.get("view")))
        place = [message.get(name) for name in ("head", "token", "dim")]
        if found and all(isinstance(number, int) and number >= 0 for number in place):
            self._send({"value": {**exact(found, *place), "view": message["view"]}})  # type: ignore[arg-type]

    def close(self) -> None:
        """Stop fetching; a fetch under way ends by itself."""
        self._painter.close(wait=False)

    def _serve(self) -> None:
        standing = self._run.standing()
        if standing.state not in ("paused", "done", "failed"):
            return
        stamp = stamp_of(standing)
        for want in list(self._wants.values()):
            if want.have == stamp:
                continue
            with self._lock:
                if self._wants.get(want.view) != want:
                    continue  # there is a newer request, which has touched the painter
                del self._wants[want.view]
            self._answer(want, stamp)

    def _answer(self, want: InspectRequest, stamp: str) -> None:
        to = {"view": want.view, "question": want.question}
        try:
            head, codes = self._picture(want)
            self._send({"kv": {**head, **to, "stamp": stamp}}, [codes])
            text, equal = self._compared(want.layer, stamp)
        except Exception as error:  # nothing else would report it
            self._send({"kv": {**to, "stamp": stamp, "error": str(error)}})
            return
        self._send({"kv_diff": {**to, "text": text, "equal": equal}})

    def _picture(self, want: InspectRequest) -> tuple[Json, bytes]:
        source = self._run.kv(layer=want.layer).source()
        ranks = [want.a] if want.a == want.b else [want.a, want.b]
        arrays = self._blocks.of(source, ranks, want.layer, want.tensor)
        found = Fetched(source.subject, arrays[0], arrays[-1])
        self._fetched.pop(want.view, None)
        self._fetched[want.view] = found
        _limit(self._fetched)
        return picture(want, found)

    def _compared(self, layer: int, stamp: str) -> tuple[str, bool]:
        key = f"{layer} {stamp}"
        if self._diff[0] != key:
            try:
                diff = self._run.kv(layer=layer).diff()
                self._diff = (key, diff.verdict, diff.equal)
            except PlanError as error:  # there is nothing to compare yet
                self._diff = (key, str(error), True)
        return self._diff[1:]


def picture(want: InspectRequest, found: Fetched) -> tuple[Json, bytes]:
    """The description of a picture, and a byte for each value, [heads, tokens, dims]."""
    heads = list(range(len(found.a))) if want.head is None else [min(want.head, len(found.a) - 1)]
    shown = _shown(want.show, found.a[heads], found.b[heads])
    tokens = max(found.a.shape[1], found.b.shape[1])
    made = quantise(shown, want.scale, difference=want.show == "a-b")
    codes = made.codes
    if shown.shape[1] < tokens:
        missing = np.full((len(heads), tokens - shown.shape[1], found.a.shape[2]), MISSING, np.uint8)
        codes = np.concatenate([codes, missing], axis=1)
    special = [[heads[head], token, dim] for head, token, dim in made.special]
    head = {
        **want._asdict(), "tensor": "KV"[want.tensor], "heads": heads, "tokens": tokens, "dims": found.a.shape[2],
        "held": [found.a.shape[1], found.b.shape[1]], "top": made.scale, "nan": made.nan, "inf": made.inf,
        "special": special, "differ": int((shown != 0).sum()) if want.show == "a-b" else 0, "call": want.call,
        "dtype": str(found.subject.dtype).removeprefix("torch."), "all_heads": len(found.a),
        "starts": [span.start for span in found.subject.spans], "summary": _rows(heads, shown),
    }  # fmt: skip
    return head, codes.tobytes()


def exact(found: Fetched, head: int, token: int, dim: int) -> Json:
    """The values of both ranks at one place, with as few digits as identify them."""
    texts = found.subject.texts
    values = [
        float(one[head, token, dim])
        if head < len(one) and token < one.shape[1] and dim < one.shape[2]
        else None
        for one in (found.a, found.b)
    ]
    a, b = values
    return {
        "at": [head, token, dim],
        "a": "not here" if a is None else number_text(a, found.subject.dtype),
        "b": "not here" if b is None else number_text(b, found.subject.dtype),
        "difference": "" if a is None or b is None else f"{a - b:.6g}".replace("-", "−"),
        "text": texts[token] if token < len(texts) else "",
    }


def stamp_of(standing: RunView) -> str:
    """A text that changes whenever KV may have changed."""
    stands = [tuple(stand.positions) for stand in standing.stands]
    return f"{hash((tuple(stands), standing.decoded, tuple(standing.faults), standing.last_call)):x}"


def _shown(show: str, a: Values, b: Values) -> Values:
    if show == "a":
        return a
    if show == "b":
        return b
    both = min(a.shape[1], b.shape[1])
    with np.errstate(invalid="ignore"):  # Inf − Inf is shown as NaN
        return a[:, :both] - b[:, :both]


def _rows(heads: list[int], shown: Values) -> list[list[str]]:
    return [
        [str(head), *(f"{number:.4g}".replace("-", "−") for number in numbers[:3]), *map(_share, numbers[3:])]
        for head, numbers in zip(heads, figures(shown), strict=True)
    ]


def _share(part: float) -> str:
    """In percent; only 0 shows as 0 %, and only 1 as 100 %."""
    if part in (0, 1):
        return f"{100 * part:.0f} %"
    return f"{min(99.9, max(0.1, 100 * part)):.1f} %"


def _within(number: Any, count: int) -> int:
    return max(0, min(count - 1, number)) if isinstance(number, int) else 0


def _limit(found: dict[str, Any]) -> None:
    while len(found) > VIEWS:
        del found[next(iter(found))]
