"""Still KV: K or V of one layer as a picture without a kernel, which the inspector leaves in a saved notebook.

It shows the difference between ranks at the first block known to differ, else the deepest computed layer. Of a long
prompt, only a window of tokens is fetched, so that the panel appears quickly.
"""

import struct
import zlib
from base64 import b64encode
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dinfer.kv.source import ViewableSource
from dinfer.views.inspector import Fetched, InspectRequest, picture
from dinfer.views.protocol import InspectableRun, Json, RunView
from dinfer.views.quantise import MINUS_INF, MISSING, NAN, PLUS_INF, STEPS, ZERO

SIGNATURE = b"\x89PNG\r\n\x1a\n"

BITS, WITH_PALETTE = 8, 3


def png(pixels: NDArray[np.uint8], palette: NDArray[np.uint8]) -> bytes:
    """A PNG file. `pixels`, [rows, columns]: indices into `palette`, [colours, 3]. See the PNG specification, W3C
    2003."""
    rows, columns = pixels.shape
    # Each row starts with its filter: 0, none.
    unfiltered = np.concatenate([np.zeros((rows, 1), np.uint8), pixels], axis=1)
    head = struct.pack(">IIBBBBB", columns, rows, BITS, WITH_PALETTE, 0, 0, 0)
    parts = ((b"IHDR", head), (b"PLTE", palette.tobytes()), (b"IDAT", zlib.compress(unfiltered.tobytes(), 9)))
    return SIGNATURE + b"".join(_part(*part) for part in (*parts, (b"IEND", b"")))


def data_uri(picture: bytes) -> str:
    """A picture as the `src` of an `<img>`."""
    return f"data:image/png;base64,{b64encode(picture).decode()}"


def _part(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


TOKENS = 512
"""consecutive tokens that are shown, at most"""

ROWS = 256

COARSE = 8
"""steps that are merged into one colour, invisibly, to make the file smaller"""

NO_NUMBER = 255

WIDE, HIGH = 720, 300

LOW_END, MIDDLE, HIGH_END = (33, 102, 172), (247, 247, 247), (179, 88, 6)

NOT_FINITE, NOT_HERE = (0, 0, 0), (214, 218, 223)
"""colours as in heatmap.js, on white"""

Codes = NDArray[np.uint8]


class StillChoice(NamedTuple):
    """What to show: a layer of rank `a`, or its difference from rank `b`; `near`: a token to include."""

    layer: int
    a: int
    b: int
    near: int

    @property
    def show(self) -> str:
        return "a" if self.a == self.b else "a-b"


def still_kv(run: InspectableRun, standing: RunView) -> str:
    """The picture as HTML; "" while the run is moving or if nothing is computed."""
    if standing.state not in ("paused", "done") or not _computed(run, standing):
        return ""
    source = run.kv().source()
    choice = chosen(run, standing, source)
    rows = max(held.rows[choice.layer] for held in source.held([choice.a, choice.b]))
    window = around(choice.near, rows)
    made = [_picture(source, choice, tensor, window) for tensor in ((0, 1) if choice.show == "a-b" else (0,))]
    head, codes = max(made, key=lambda one: one[0]["differ"])  # of K and V, the one that differs more
    return _html(head, codes, choice, window, rows)


def chosen(run: InspectableRun, standing: RunView, source: ViewableSource) -> StillChoice:
    """The first block known to differ, else the newest tokens of the deepest layer that its owner holds."""
    shape = run.plan.shape
    for mark in standing.marks:
        if mark.kind != "armed":
            owner = shape.owners[mark.layer]
            other = owner if owner != mark.rank else (owner + 1) % shape.world_size
            return StillChoice(mark.layer, other, mark.rank, shape.chunks[mark.chunk].start)
    held = source.held(range(shape.world_size))
    layer = max(n for n, owner in enumerate(shape.owners) if held[owner].rows[n])
    return StillChoice(layer, shape.owners[layer], shape.owners[layer], held[shape.owners[layer]].rows[layer])


def around(token: int, rows: int) -> range:
    """At most TOKENS consecutive tokens that include `token`."""
    start = max(0, min(token - TOKENS // 2, rows - TOKENS))
    return range(start, min(rows, start + TOKENS))


def _computed(run: InspectableRun, standing: RunView) -> bool:
    """Whether any layer of any chunk is computed."""
    return any(
        op.kind == "layer"
        for lanes, stand in zip(run.plan.lanes, standing.stands, strict=True)
        for lane, position in zip(lanes, stand.positions, strict=True)
        for op in lane.ops[:position]
    )


def _picture(source: ViewableSource, choice: StillChoice, tensor: int, window: range) -> tuple[Json, Codes]:
    """What the inspector would show: its description and bytes, [heads, tokens, dims]."""
    ranks = list(dict.fromkeys((choice.a, choice.b)))
    values = [_values(source, rank, choice.layer, tensor, window) for rank in ranks]
    want = InspectRequest("", choice.layer, tensor, None, choice.a, choice.b, choice.show, "robust", "")
    head, drawn = picture(want, Fetched(source.subject, values[0], values[-1]))
    shape = (len(head["heads"]), head["tokens"], head["dims"])
    return head, np.frombuffer(drawn, np.uint8).reshape(shape)


def _values(
    source: ViewableSource, rank: int, layer: int, tensor: int, window: range
) -> NDArray[np.floating]:
    places = range(window.start, min(window.stop, source.held([rank])[0].rows[layer]))
    heads = range(source.subject.kv_heads)
    part = source.part(rank, layer, tensor, heads, places)
    found: NDArray[np.floating] = (part if part.element_size() > 4 else part.float()).numpy()
    return found


def shrunk(codes: Codes, rows: int = ROWS) -> Codes:
    """As pixels: tokens from left to right, the dims of all heads from top to bottom in about `rows` rows. Of values
    that share a pixel, the one furthest from zero counts."""
    heads, tokens, dims = codes.shape
    every = min(dims, -(-heads * dims // rows))
    missing = -dims % every
    keys = _order()[codes].astype(np.uint16) << 8 | codes
    keys = np.pad(keys, ((0, 0), (0, 0), (0, missing)), constant_values=MISSING)
    most: Codes = (keys.reshape(heads, tokens, -1, every).max(axis=3) & 0xFF).astype(np.uint8)
    return most.transpose(0, 2, 1).reshape(-1, tokens)


def coarse(codes: Codes) -> Codes:
    """Codes with fewer colours; a visible value does not become zero."""
    order = _order()[codes]
    steps = np.rint((codes.astype(np.int16) - ZERO) / COARSE) * COARSE
    is_value = (order > 0) & (order < NO_NUMBER)
    kept: Codes = np.where(is_value, ZERO + np.clip(steps, -STEPS, STEPS), codes).astype(np.uint8)
    return kept


def palette() -> Codes:
    """A colour for each byte of quantise, [256, 3]."""
    found = np.empty((256, 3), np.uint8)
    for code in range(256):
        part = max(-1.0, min(1.0, (code - ZERO) / STEPS))
        end = LOW_END if part < 0 else HIGH_END
        found[code] = [round(zero + (far - zero) * abs(part)) for zero, far in zip(MIDDLE, end, strict=True)]
    found[[NAN, PLUS_INF, MINUS_INF]] = NOT_FINITE
    found[MISSING] = NOT_HERE
    return found


def _order() -> Codes:
    """For each byte, its priority among values that share a pixel; 0 for missing values."""
    found = 1 + np.abs(np.arange(256) - ZERO)
    found[[NAN, PLUS_INF, MINUS_INF]] = NO_NUMBER
    found[MISSING] = 0
    return found.astype(np.uint8)


def _html(head: Json, codes: Codes, choice: StillChoice, window: range, rows: int) -> str:
    source = data_uri(png(coarse(shrunk(codes)), palette()))
    text = escape(_caption(head, choice, window, rows))
    size = f"width:{WIDE}px;max-width:100%;height:{HIGH}px;image-rendering:pixelated;border:1px solid #bdbdbd"
    return (
        f'<div style="margin-top:8px"><div>{text}</div><img class="kv" alt="{text}" style="{size}" src="{source}">'
        f"<div><code>{escape(head['call'])}</code></div></div>"
    )


def _caption(head: Json, choice: StillChoice, window: range, rows: int) -> str:
    what = {"a": f"rank {choice.a}", "a-b": f"rank {choice.a} − rank {choice.b}"}[choice.show]
    top = f"{head['top']:.3g}"
    parts = [
        f"{head['tensor']} of layer {choice.layer}, {what}, {head['dtype']}",
        f"tokens {window.start}–{window.stop - 1} of {rows} from left to right",
        f"the {head['dims']} dims of {_heads(head['heads'])} from top to bottom",
        f"−{top} is blue, 0 white, +{top} brown",
    ]
    parts += [_values_text(head["differ"])] * (choice.show == "a-b")
    parts += [f"black: {head['nan']} NaN, {head['inf']} Inf"] * bool(head["nan"] or head["inf"])
    return "; ".join(parts)


def _values_text(count: int) -> str:
    return "1 value differs" if count == 1 else f"{count:,} values differ"


def _heads(heads: Sequence[int]) -> str:
    return "head 0" if len(heads) == 1 else f"heads 0–{len(heads) - 1}"
