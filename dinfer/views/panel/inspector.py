"""Inspector: the KV of a layer as a picture, for browsers that ask for it, and exact values of what the picture shows.

A browser asks for a picture and says which one it has; it is answered once there is a newer one. So only what is on a
screen is fetched, no faster than the browser draws. A thread of its own waits for the ranks. Of a long prompt, a
picture has the chunks around the one that is asked for, and says so.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from dinfer.kv.difference import number_text
from dinfer.kv.source import HeldSpans, Subject, ViewableSource
from dinfer.plan.ops import PlanError
from dinfer.run.state import MOVING, Standing, State
from dinfer.severity import Severity
from dinfer.views.panel.desk import Painter, Wants, keep_newest
from dinfer.views.panel.quantise import MISSING, Scale, Values, figures, quantise
from dinfer.views.protocol import InspectableRun, Json
from dinfer.views.read_only import read_only

VALUES = 1 << 21
"""values in a picture at most, but for one long chunk: 2,048 tokens of 8 heads of 128"""

MOST_TEXTS = 4096
"""tokens of a picture whose texts are sent with it: those of more have no room beside it"""

CacheKey = tuple[int, int, int, int, int]
"""(layer, K or V, first token, tokens, digest)"""


class BlockCache:
    """Cached blocks of one run, up to 96 MiB. Used by one thread."""

    def __init__(self) -> None:
        self._bytes = 0
        self._kept: OrderedDict[CacheKey, Values] = OrderedDict()

    def of(
        self, source: ViewableSource, held: dict[int, HeldSpans], layer: int, tensor: int, window: range
    ) -> list[Values]:
        """K (0) or V (1) of these spans of a layer as each rank holds it now, [heads, tokens, dims], from their first
        token on. `held`: what each of the ranks holds."""
        subject = source.subject
        spans = subject.spans[window.start : window.stop]
        found = []
        digests = source.digests(list(held), [layer], spans)
        for (rank, has), numbers in zip(held.items(), digests, strict=True):
            here = spans[: max(0, has.spans[layer] - window.start)]
            keys = [
                (layer, tensor, span.start, len(span), int(number))
                for span, number in zip(here, numbers[0, :, tensor], strict=False)
            ]
            blocks = self._blocks(source, rank, keys)
            empty = np.zeros((subject.kv_heads, 0, subject.head_dim), np.float32)
            found.append(np.concatenate(blocks, axis=1) if blocks else empty)
        return found

    def _blocks(self, source: ViewableSource, rank: int, keys: Sequence[CacheKey]) -> list[Values]:
        here = {key: self._kept[key] for key in keys if key in self._kept}
        for missing, some in groupby(keys, {key for key in keys if key not in here}.__contains__):
            if missing:  # neighbouring blocks are fetched together
                absent = list(some)
                layer, tensor, first, *_ = absent[0]
                _, _, last, size, _ = absent[-1]
                values = fetched(source, rank, layer, tensor, range(first, last + size))
                for key in absent:
                    here[key] = values[:, key[2] - first : key[2] - first + key[3]].copy()
        for key in keys:
            if key not in self._kept:
                self._kept[key] = here[key]
                self._bytes += here[key].nbytes
            self._kept.move_to_end(key)
            while self._bytes > 96 << 20:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return [here[key] for key in keys]


def fetched(source: ViewableSource, rank: int, layer: int, tensor: int, places: range) -> Values:
    """K (0) or V (1) at these tokens as that rank holds it, [heads, tokens, dims]; of at least 32 bits a number."""
    part = source.part(rank, layer, tensor, range(source.subject.kv_heads), places)
    values: Values = (part if part.element_size() > 4 else part.float()).numpy()
    return values


class InspectRequest(NamedTuple):
    """What a browser shows. `head`: None for all; `show`: "a", "b" or "a-b"; `have`: the stamp of its picture;
    `question`: the browser's number for this request, which answers repeat; `chunk`: a chunk that it shows."""

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
    chunk: int = 0

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
            _within(message.get("chunk"), len(shape.chunks)),
        )

    def call(self, tokens: str = ":") -> str:
        """The Python expression for these values, at the tokens of that slice."""
        part = f".{'kv'[self.tensor]}[{':' if self.head is None else self.head}, {tokens}]"
        a, b = (f"run.kv(layer={self.layer}, rank={rank}){part}" for rank in (self.a, self.b))
        return {"a": a, "b": b}.get(self.show, f"{a} - {b}")


class Fetched(NamedTuple):
    """The values in a browser's picture. `window`: which of the subject's spans, None for all; `rows`: how many tokens
    each rank holds, None for those here."""

    subject: Subject
    a: Values
    b: Values
    window: range | None = None
    rows: tuple[int, int] | None = None

    @property
    def tokens(self) -> range:
        """The tokens of its spans, also those that no rank holds."""
        spans = self.subject.spans
        seen = spans[self.window.start : self.window.stop] if self.window else spans
        return range(seen[0].start, seen[-1].stop)


def window(spans: Sequence[range], chunk: int, tokens: int) -> range:
    """The spans around that chunk that have at most so many tokens together, and at least that chunk."""
    first, end, before = chunk, chunk + 1, (-1, -1)
    while (first, end) != before:
        before = first, end
        if end < len(spans) and spans[end].stop - spans[first].start <= tokens:
            end += 1
        if first and spans[end - 1].stop - spans[first - 1].start <= tokens:
            first -= 1
    return range(first, end)


class Inspector:
    """The inspector of one panel. `send(content, buffers)` sends to all its browsers."""

    def __init__(self, run: InspectableRun, send: Callable[..., object]) -> None:
        self._run, self._send = run, send
        self._painter = Painter(self._serve, "inspector", period=0.1)
        self._wants = Wants[InspectRequest]()
        self._fetched: dict[str, Fetched] = {}
        self._blocks = BlockCache()
        self._diff = ("", "", Severity.NOTE)

    def ask(self, message: Json) -> None:
        """A browser asks for a newer or another picture. Returns at once."""
        want = InspectRequest.of(self._run, message)
        self._wants[want.view] = want
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
        if standing.state in (*MOVING, State.HUNG, State.CLOSED) and not read_only(self._run):
            return
        stamp = stamp_of(standing)
        for want in self._wants.taken(stamp):
            self._answer(want, stamp)

    def _answer(self, want: InspectRequest, stamp: str) -> None:
        to = {"view": want.view, "question": want.question}
        try:
            source = self._run.kv(layer=want.layer).source()
            ranks = [want.a] if want.a == want.b else [want.a, want.b]
            held = dict(zip(ranks, source.held(ranks), strict=True))
            subject = source.subject
            spans = window(subject.spans, want.chunk, VALUES // (subject.kv_heads * subject.head_dim))
            arrays = self._blocks.of(source, held, want.layer, want.tensor, spans)
            rows = held[want.a].rows[want.layer], held[want.b].rows[want.layer]
            found = Fetched(subject, arrays[0], arrays[-1], spans, rows)
            keep_newest(self._fetched, want.view, found)
            head, codes = picture(want, found)
            self._send({"kv": {**head, **to, "stamp": stamp}}, [codes])
            text, severity = self._compared(want.layer, stamp)
        except Exception as error:  # nothing else would report it
            word = getattr(error, "severity", Severity.ERROR).word
            self._send({"kv": {**to, "stamp": stamp, "error": str(error), "severity": word}})
            return
        self._send({"kv_diff": {**to, "text": text, "severity": severity.word}})

    def _compared(self, layer: int, stamp: str) -> tuple[str, Severity]:
        key = f"{layer} {stamp}"
        if self._diff[0] != key:
            try:
                diff = self._run.kv(layer=layer).diff()
                self._diff = (key, diff.verdict, diff.severity)
            except PlanError as error:  # there is nothing to compare yet
                self._diff = (key, str(error), error.severity)
        return self._diff[1:]


def picture(want: InspectRequest, found: Fetched) -> tuple[Json, bytes]:
    """The description of a picture, and a byte for each value, [heads, tokens, dims]."""
    heads = list(range(len(found.a))) if want.head is None else [min(want.head, len(found.a) - 1)]
    a, b = found.a[heads], found.b[heads]
    shown = a if want.show == "a" else b
    if want.show == "a-b":
        both = min(a.shape[1], b.shape[1])
        with np.errstate(invalid="ignore"):  # Inf − Inf is shown as NaN
            shown = a[:, :both] - b[:, :both]
    tokens = max(found.a.shape[1], found.b.shape[1])
    made = quantise(shown, want.scale, difference=want.show == "a-b")
    codes = made.codes
    if shown.shape[1] < tokens:
        missing = np.full((len(heads), tokens - shown.shape[1], found.a.shape[2]), MISSING, np.uint8)
        codes = np.concatenate([codes, missing], axis=1)
    first, seen, spans = found.tokens.start, found.tokens, found.subject.spans
    is_whole = (seen.start, seen.stop) == (0, spans[-1].stop)
    special = [[heads[head], token + first, dim] for head, token, dim in made.special]
    head = {
        **want._asdict(), "tensor": "KV"[want.tensor], "heads": heads, "tokens": tokens, "dims": found.a.shape[2],
        "held": list(found.rows or (found.a.shape[1], found.b.shape[1])), "top": made.scale, "nan": made.nan,
        "inf": made.inf, "special": special, "differ": int((shown != 0).sum()) if want.show == "a-b" else 0,
        "call": want.call() if is_whole else want.call(f"{seen.start}:{seen.stop}"), "first": first,
        "dtype": str(found.subject.dtype).removeprefix("torch."), "all_heads": len(found.a),
        "texts": list(found.subject.texts[seen.start : seen.stop]) if len(seen) <= MOST_TEXTS else [],
        "starts": [span.start for span in spans], "seen": None if is_whole else [seen.start, seen.stop], "summary": [
            [str(head), *(_signed(f"{number:.4g}") for number in numbers[:3]), *map(_share, numbers[3:])]
            for head, numbers in zip(heads, figures(shown), strict=True)
        ],
    }  # fmt: skip
    return head, codes.tobytes()


def exact(found: Fetched, head: int, token: int, dim: int) -> Json:
    """The values of both ranks at one place, with as few digits as identify them."""
    place = (head, token - found.tokens.start, dim)
    numbers, texts = [], ["not here", "not here"]
    for n, values in enumerate((found.a, found.b)):
        if all(0 <= at < size for at, size in zip(place, values.shape, strict=True)):
            numbers.append(float(values[place]))
            texts[n] = number_text(numbers[-1], found.subject.dtype)
    words = found.subject.texts
    return {
        "at": [head, token, dim],
        "a": texts[0],
        "b": texts[1],
        "difference": _signed(f"{numbers[0] - numbers[1]:.6g}") if len(numbers) == 2 else "",
        "text": words[token] if token < len(words) else "",
    }


def stamp_of(standing: Standing) -> str:
    """A text that changes whenever KV may have changed."""
    stands = [tuple(stand.positions) for stand in standing.stands]
    return f"{hash((tuple(stands), standing.decoded, tuple(standing.faults), standing.last_call)):x}"


def _signed(number: str) -> str:
    """With a minus sign for the hyphen."""
    return number.replace("-", "−")


def _share(part: float) -> str:
    """In percent; only 0 shows as 0 %, and only 1 as 100 %."""
    if part in (0, 1):
        return f"{100 * part:.0f} %"
    return f"{min(99.9, max(0.1, 100 * part)):.1f} %"


def _within(number: Any, count: int) -> int:
    return max(0, min(count - 1, number)) if isinstance(number, int) else 0
