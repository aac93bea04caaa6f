"""Still KV: K or V of one layer as a picture without a kernel, which the inspector leaves in a saved notebook.

It shows the difference between ranks at the first block known to differ, else the deepest computed layer. Of a long
prompt, only a window of tokens is fetched, so that the panel appears quickly.
"""

import struct
import zlib
from base64 import b64encode
from html import escape

import numpy as np
from numpy.typing import NDArray

from dinfer.kv.source import ViewableSource
from dinfer.run.state import Standing
from dinfer.views.panel.inspector import Fetched, InspectRequest, fetched, picture
from dinfer.views.panel.quantise import MINUS_INF, MISSING, NAN, PLUS_INF, STEPS, ZERO
from dinfer.views.protocol import InspectableRun, Json

TOKENS = 512
"""consecutive tokens that are shown, at most"""

COARSE = 8
"""steps that are merged into one colour, invisibly, to make the file smaller"""

LOW_END, MIDDLE, HIGH_END = (33, 102, 172), (247, 247, 247), (179, 88, 6)

NOT_FINITE, NOT_HERE = (0, 0, 0), (214, 218, 223)
"""colours as in heatmap.js, on white"""

Codes = NDArray[np.uint8]

PRIORITY: Codes = (1 + np.abs(np.arange(256) - ZERO)).astype(np.uint8)
"""for each byte of quantise, its priority among values that share a pixel; 0 for missing values, 255 for no numbers"""

PRIORITY[[NAN, PLUS_INF, MINUS_INF]] = 255

PRIORITY[MISSING] = 0


def png(pixels: Codes, palette: Codes) -> bytes:
    """A PNG file. `pixels`, [rows, columns]: indices into `palette`, [colours, 3]. See the PNG specification, W3C
    2003."""
    rows, columns = pixels.shape
    # Each row starts with its filter: 0, none.
    unfiltered = np.concatenate([np.zeros((rows, 1), np.uint8), pixels], axis=1)
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0),  # 8 bits, with a palette
        b"PLTE": palette.tobytes(),
        b"IDAT": zlib.compress(unfiltered.tobytes(), 9),
        b"IEND": b"",
    }
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts.items()
    )


def data_uri(picture: bytes) -> str:
    """A picture as the `src` of an `<img>`."""
    return f"data:image/png;base64,{b64encode(picture).decode()}"


def still_kv(run: InspectableRun, standing: Standing) -> str:
    """The picture as HTML; "" while the run is moving or if nothing is computed."""
    if standing.state not in ("paused", "done"):
        return ""
    is_computed = any(
        op.kind == "layer"
        for lanes, stand in zip(run.plan.lanes, standing.stands, strict=True)
        for lane, position in zip(lanes, stand.positions, strict=True)
        for op in lane.ops[:position]
    )
    if not is_computed:
        return ""
    source = run.kv().source()
    layer, a, b, near = _chosen(run, standing, source)
    ranks = list(dict.fromkeys((a, b)))
    held = [held.rows[layer] for held in source.held(ranks)]
    rows = max(held)
    window = around(near, rows)
    made = []
    for tensor in (0, 1) if a != b else (0,):
        values = [
            fetched(source, rank, layer, tensor, range(window.start, min(window.stop, count)))
            for rank, count in zip(ranks, held, strict=True)
        ]
        want = InspectRequest("", layer, tensor, None, a, b, "a-b" if a != b else "a", "robust", "")
        made.append(picture(want, Fetched(source.subject, values[0], values[-1])))
    head, drawn = max(made, key=lambda one: one[0]["differ"])  # of K and V, the one that differs more
    codes = np.frombuffer(drawn, np.uint8).reshape(len(head["heads"]), head["tokens"], head["dims"])
    text = escape(_caption(head, window, rows))
    size = "width:720px;max-width:100%;height:300px;image-rendering:pixelated;border:1px solid #bdbdbd"
    return (
        f'<div style="margin-top:8px"><div>{text}</div><img class="kv" alt="{text}" style="{size}" '
        f'src="{data_uri(png(coarse(shrunk(codes)), palette()))}"><div><code>{escape(head["call"])}</code></div></div>'
    )


def _chosen(run: InspectableRun, standing: Standing, source: ViewableSource) -> tuple[int, int, int, int]:
    """What to show: a layer, a rank, a rank to compare it with or the same, and a token to include. It is the first
    block known to differ, else the newest tokens of the deepest layer that its owner holds."""
    shape = run.plan.shape
    for mark in standing.marks:
        if mark.kind in ("differs", "corrupt"):
            owner = shape.owners[mark.layer]
            other = owner if owner != mark.rank else (owner + 1) % shape.world_size
            return mark.layer, other, mark.rank, shape.chunks[mark.chunk].start
    held = source.held(range(shape.world_size))
    layer = max(n for n, owner in enumerate(shape.owners) if held[owner].rows[n])
    owner = shape.owners[layer]
    return layer, owner, owner, held[owner].rows[layer]


def around(token: int, rows: int) -> range:
    """At most TOKENS consecutive tokens that include `token`."""
    start = max(0, min(token - TOKENS // 2, rows - TOKENS))
    return range(start, min(rows, start + TOKENS))


def shrunk(codes: Codes, rows: int = 256) -> Codes:
    """As pixels: tokens from left to right, the dims of all heads from top to bottom in about `rows` rows. Of values
    that share a pixel, the one furthest from zero counts."""
    heads, tokens, dims = codes.shape
    every = min(dims, -(-heads * dims // rows))
    missing = -dims % every
    keys = PRIORITY[codes].astype(np.uint16) << 8 | codes
    keys = np.pad(keys, ((0, 0), (0, 0), (0, missing)), constant_values=MISSING)
    most: Codes = (keys.reshape(heads, tokens, -1, every).max(axis=3) & 0xFF).astype(np.uint8)
    return most.transpose(0, 2, 1).reshape(-1, tokens)


def coarse(codes: Codes) -> Codes:
    """Codes with fewer colours; a visible value does not become zero."""
    steps = np.rint((codes.astype(np.int16) - ZERO) / COARSE) * COARSE
    is_value = (PRIORITY[codes] > 0) & (PRIORITY[codes] < 255)
    kept: Codes = np.where(is_value, ZERO + np.clip(steps, -STEPS, STEPS), codes).astype(np.uint8)
    return kept


def palette() -> Codes:
    """A colour for each byte of quantise, [256, 3]."""
    part = np.clip((np.arange(256)[:, None] - ZERO) / STEPS, -1, 1)
    ends = np.where(part < 0, LOW_END, HIGH_END)
    found: Codes = np.rint(MIDDLE + (ends - np.array(MIDDLE)) * np.abs(part)).astype(np.uint8)
    found[[NAN, PLUS_INF, MINUS_INF]] = NOT_FINITE
    found[MISSING] = NOT_HERE
    return found


def _caption(head: Json, window: range, rows: int) -> str:
    is_difference, heads = head["show"] == "a-b", head["heads"]
    what = f"rank {head['a']} − rank {head['b']}" if is_difference else f"rank {head['a']}"
    top, differ = f"{head['top']:.3g}", head["differ"]
    parts = [
        f"{head['tensor']} of layer {head['layer']}, {what}, {head['dtype']}",
        f"tokens {window.start}–{window.stop - 1} of {rows} from left to right",
        f"the {head['dims']} dims of {'head 0' if len(heads) == 1 else f'heads 0–{len(heads) - 1}'} from top to bottom",
        f"−{top} is blue, 0 white, +{top} brown",
    ]
    parts += [f"{differ:,} of these values {'differs' if differ == 1 else 'differ'}"] * is_difference
    parts += [f"black: {head['nan']} NaN, {head['inf']} Inf"] * bool(head["nan"] or head["inf"])
    return "; ".join(parts)
