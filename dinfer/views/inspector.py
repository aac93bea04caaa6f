"""Inspector: the KV of a layer as a picture, for browsers that ask for it; exact values from what was fetched for that.

A browser asks for a picture and says which one it has; it is answered once there is another. So nothing is fetched that
nobody looks at, and never more than the browser can draw. Ranks are waited for on a thread of its own.
"""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from dinfer.plan.ops import PlanError
from dinfer.session.kv.difference import number_text
from dinfer.session.kv.source import Subject
from dinfer.views.blocks import Blocks
from dinfer.views.desk import Painter
from dinfer.views.protocol import Run, Standing
from dinfer.views.quantise import MISSING, Scale, Values, figures, quantise

Json = dict[str, Any]
Send = Callable[..., object]
PERIOD_S = 0.1
VIEWS = 8
"""browsers that are remembered; of more, the oldest are forgotten"""


class Want(NamedTuple):
    """What one browser looks at. `head` None: all; `show`: "a", "b" or "a-b"; `have`: the stamp of what it shows;
    `question`: the browser's number of what it asks for, by which it knows the answers."""

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
    def of(cls, run: Run, message: Json) -> "Want":
        """Numbers that there are not become the nearest that there are."""
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
        """The Python that fetches it."""
        part = f".{'kv'[self.tensor]}[{':' if self.head is None else self.head}, :]"
        a, b = (f"run.kv(layer={self.layer}, rank={rank}){part}" for rank in (self.a, self.b))
        return {"a": a, "b": b}.get(self.show, f"{a} - {b}")


class Fetched(NamedTuple):
    """What the picture of a browser was made of."""

    subject: Subject
    a: Values
    b: Values


class Inspector:
    """Of one panel. `send(content, buffers)` speaks to all its browsers."""

    def __init__(self, run: Run, send: Send) -> None:
        self._run, self._send = run, send
        self._painter = Painter(self._serve, "inspector", PERIOD_S)
        self._lock = threading.Lock()
        self._wants: dict[str, Want] = {}
        self._fetched: dict[str, Fetched] = {}
        self._blocks = Blocks()
        self._diff = ("", "", True)

    def ask(self, message: Json) -> None:
        """A browser wants another picture than it has. Returns at once."""
        want = Want.of(self._run, message)
        with self._lock:
            self._wants.pop(want.view, None)
            self._wants[want.view] = want
            _limit(self._wants)
        self._painter.touch()

    def touch(self) -> None:
        """The run may have changed."""
        if self._wants:
            self._painter.touch()

    def value(self, message: Json) -> None:
        """Tell the exact values at one place."""
        found = self._fetched.get(str(message.get("view")))
        place = [message.get(name) for name in ("head", "token", "dim")]
        if found and all(isinstance(number, int) and number >= 0 for number in place):
            self._send({"value": {**exact(found, *place), "view": message["view"]}})  # type: ignore[arg-type]

    def close(self) -> None:
        """Fetch no more; what is being fetched ends by itself."""
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
                    continue  # a newer one has come: it has touched the painter
                del self._wants[want.view]
            self._answer(want, stamp)

    def _answer(self, want: Want, stamp: str) -> None:
        to = {"view": want.view, "question": want.question}
        try:
            head, codes = self._picture(want)
            self._send({"kv": {**head, **to, "stamp": stamp}}, [codes])
            text, equal = self._compared(want.layer, stamp)
        except Exception as error:  # there is nobody else to tell
            self._send({"kv": {**to, "stamp": stamp, "error": str(error)}})
            return
        self._send({"kv_diff": {**to, "text": text, "equal": equal}})

    def _picture(self, want: Want) -> tuple[Json, bytes]:
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


def picture(want: Want, found: Fetched) -> tuple[Json, bytes]:
    """What the browser needs to know, and a byte for each value, [heads, tokens, dims]."""
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
    """The values of both ranks at one place, as few digits as tell them from all others."""
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


def stamp_of(standing: Standing) -> str:
    """What tells one moment's KV from another's."""
    stands = [tuple(stand.positions) for stand in standing.stands]
    return f"{hash((tuple(stands), standing.decoded, tuple(standing.faults), standing.last_call)):x}"


def _shown(show: str, a: Values, b: Values) -> Values:
    if show == "a":
        return a
    if show == "b":
        return b
    both = min(a.shape[1], b.shape[1])
    with np.errstate(invalid="ignore"):  # Inf − Inf is NaN, and is shown as that
        return a[:, :both] - b[:, :both]


def _rows(heads: list[int], shown: Values) -> list[list[str]]:
    return [
        [str(head), *(f"{number:.4g}".replace("-", "−") for number in numbers[:3]), *map(_share, numbers[3:])]
        for head, numbers in zip(heads, figures(shown), strict=True)
    ]


def _share(part: float) -> str:
    """At least what is not nothing is not told as nothing, and what is not all not as all."""
    if part in (0, 1):
        return f"{100 * part:.0f} %"
    return f"{min(99.9, max(0.1, 100 * part)):.1f} %"


def _within(number: Any, count: int) -> int:
    return max(0, min(count - 1, number)) if isinstance(number, int) else 0


def _limit(found: dict[str, Any]) -> None:
    while len(found) > VIEWS:
        del found[next(iter(found))]
