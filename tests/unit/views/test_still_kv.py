"""KV in a saved notebook: a small picture of what ranks hold, with the inspector's colours, read back from its file."""

from __future__ import annotations

import re
import struct
import zlib
from base64 import b64decode
from html import unescape
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinfer.bench.views import inspected
from dinfer.run.run import Run
from dinfer.run.state import State
from dinfer.session.session import Session
from dinfer.views.panel import still_kv
from dinfer.views.panel.inspector import Fetched, picture
from dinfer.views.panel.panel import Panel
from dinfer.views.panel.quantise import MINUS_INF, MISSING, NAN, PLUS_INF, ZERO
from dinfer.views.panel.slotted import texts_of
from dinfer.views.panel.still_kv import data_uri, png
from tests.support.converted import converted
from tests.support.traces import PROMPT

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
SCRIPT = texts_of(["heatmap.js"])


MODEL = "demo"


@pytest.fixture
def run(session: Session) -> Run:
    return session.prefill(PROMPT, chunk_size=4, paused=True)


def test_there_is_no_picture_before_all_ranks_have_reported(run: Run) -> None:
    preparing = run.standing()._replace(state=State.PREPARING, stands=())
    assert still_kv.still_kv(run, preparing) == ""


def read_png(data: bytes) -> tuple[Bytes, Bytes]:
    """Its pixels and its palette; checks what a reader would."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    parts, at = {}, 8
    while at < len(data):
        (size,), name = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        parts[name] = data[at + 8 : at + 8 + size]
        (crc,) = struct.unpack(">I", data[at + 8 + size : at + 12 + size])
        assert crc == zlib.crc32(name + parts[name])
        at += 12 + size
    assert list(parts) == [b"IHDR", b"PLTE", b"IDAT", b"IEND"]
    columns, rows, *kind = struct.unpack(">IIBBBBB", parts[b"IHDR"])
    assert kind == [8, 3, 0, 0, 0]
    lines = np.frombuffer(zlib.decompress(parts[b"IDAT"]), np.uint8).reshape(rows, columns + 1)
    assert not lines[:, 0].any()
    return lines[:, 1:], np.frombuffer(parts[b"PLTE"], np.uint8).reshape(-1, 3)


def shown(run: Run) -> tuple[str, Bytes]:
    """The caption of the picture in the panel's still, and its pixels as bytes of quantise."""
    panel = Panel(run)
    html = panel._repr_mimebundle_()[0]["text/html"]
    panel.close()
    [(caption, source)] = re.findall(
        r'<img class="kv" alt="([^"]*)".* src="data:image/png;base64,([^"]*)">', html
    )
    return unescape(caption), read_png(b64decode(source))[0]


def colours(name: str) -> list[int]:
    """A colour of the live heatmap in light."""
    [found] = re.findall(rf"light: {{.*?\b{name}: \[([\d, ]+)\]", SCRIPT)
    return [int(number) for number in found.split(",")]


def test_a_file_is_read_back() -> None:
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3)
    read, palette = read_png(png(pixels, still_kv.palette()))
    assert (read == pixels).all()
    assert (palette == still_kv.palette()).all()
    assert data_uri(b"abc") == "data:image/png;base64,YWJj"


def test_colours_are_those_of_the_live_heatmap() -> None:
    found = still_kv.palette().tolist()
    assert (found[1], found[ZERO], found[251]) == (colours("low"), colours("zero"), colours("high"))
    assert found[NAN] == found[PLUS_INF] == found[MINUS_INF] == colours("nan")
    assert found[MISSING] == colours("missing")


@given(st.data())
def test_what_stands_out_is_never_lost(data: st.DataObject) -> None:
    shape = (data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9)))
    codes = np.full(shape, ZERO, np.uint8)
    place = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
    codes[place] = data.draw(st.sampled_from([ZERO - 20, ZERO + 20, 1, 251, NAN, PLUS_INF, MINUS_INF]))
    rows = data.draw(st.integers(1, 30))
    found = still_kv.coarse(still_kv.shrunk(codes, rows))
    assert len(found) <= rows + shape[0]
    assert (found != ZERO).sum() == 1
    assert (found != ZERO).any(axis=0).argmax() == place[1]


def test_bytes_that_are_no_values_stay_what_they_are() -> None:
    codes = np.array([[NAN, PLUS_INF, MINUS_INF, MISSING, ZERO, 1, 251]], np.uint8)
    found = still_kv.coarse(codes)
    assert found[0, :5].tolist() == codes[0, :5].tolist()
    assert found[0, 5] < ZERO - 110
    assert ZERO + 110 < found[0, 6] <= 251


def test_a_large_layer_is_a_small_picture() -> None:
    want, whole = inspected()
    window = still_kv.around(1000, whole.a.shape[1])
    assert (len(window), 1000 in window) == (still_kv.TOKENS, True)
    part = whole.a[:, window.start : window.stop]
    _, drawn = picture(want, Fetched(whole.subject, part, part))
    codes = np.frombuffer(drawn, np.uint8).reshape(8, len(window), 128)
    made = data_uri(png(still_kv.coarse(still_kv.shrunk(codes)), still_kv.palette()))
    assert len(made) < 200_000


@pytest.mark.parametrize(
    ("token", "rows", "expected"),
    [(0, 10, range(10)), (10, 10, range(10)), (0, 2000, range(512)), (1999, 2000, range(1488, 2000))],
)
def test_only_some_tokens_of_many_are_shown(token: int, rows: int, expected: range) -> None:
    assert still_kv.around(token, rows) == expected


def test_the_panel_leaves_the_deepest_layer_that_is_computed(run: Run) -> None:
    run.run_to(chunk=0, layer=3)
    caption, pixels = shown(run)
    k = run.kv(layer=3, rank=1).k[:].numpy()
    assert caption.startswith(
        "K of layer 3, rank 1, float32; tokens 0–3 of 4 from left to right; the 32 dims of "
    )
    assert pixels.shape == (2 * 32, 4)
    top = float(re.findall(r"\+([\d.]+) brown", caption)[0])
    back = (pixels.astype(float) - ZERO) / 125 * top
    expected = np.clip(k.transpose(0, 2, 1).reshape(64, 4), -top, top)
    assert np.abs(back - expected).max() < top * (still_kv.COARSE / 2 + 1) / 125


def test_where_ranks_differ_their_difference_is_left(run: Run) -> None:
    run.run_to(chunk=2, layer=5)
    run.inject("bitflip", rank=2, layer=3, chunk=1, tensor="V", head=1, token=5, dim=7, where="memory")
    run.kv().diff()
    caption, pixels = shown(run)
    assert caption.startswith("V of layer 3, rank 1 − rank 2, float32")
    assert caption.endswith("; 1 of these values differs")
    assert np.argwhere(pixels != ZERO).tolist() == [[32 + 7, 5]]


def test_nan_is_black_and_counted(run: Run) -> None:
    run.run_to(chunk=1, layer=5)
    run.inject("nan", rank=2, layer=5, chunk=1, head=1, token=6, dim=2, where="memory")
    caption, pixels = shown(run)
    assert caption.endswith("black: 1 NaN, 0 Inf")
    assert pixels[32 + 2, 6] == NAN


def test_nothing_is_fetched_before_the_first_layer_or_while_the_run_moves(run: Run) -> None:
    assert still_kv.still_kv(run, run.standing()) == ""
    run.run_to(chunk=0, layer=0)
    assert still_kv.still_kv(run, run.standing()._replace(state=State.RUNNING)) == ""
    assert still_kv.still_kv(run, run.standing()) != ""


def test_ranks_that_do_not_answer_leave_the_rest_of_the_picture(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(**_: object) -> None:
        raise RuntimeError("rank 1 is gone: its <KV> is lost")

    run.run_to(chunk=0, layer=0)
    monkeypatch.setattr(run, "kv", lost)
    panel = Panel(run)
    html = panel._repr_mimebundle_()[0]["text/html"]
    panel.close()
    assert "KV cannot be shown: rank 1 is gone: its &lt;KV&gt; is lost" in html
    assert "<title>blocks by layer and chunk" in html


def test_a_converted_notebook_shows_it_and_what_run_kv_says(run: Run) -> None:
    run.run_to(chunk=2, layer=5)
    panel = Panel(run)
    page = converted(*panel._repr_mimebundle_())
    panel.close()
    assert 'alt="K of layer 5, rank 2' in page
    assert 'src="data:image/png;base64,' in page
    kv = converted({"text/html": run.kv(layer=5)._repr_html_(), "text/plain": "text"})
    for word in str(run.kv(layer=5)).split():
        assert word in unescape(kv)
