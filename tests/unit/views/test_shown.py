"""A figure under a cell: small, drawn by the front end, and nothing in it that could send data anywhere."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from base64 import b64decode
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

from dinfer.errors import NotPossible
from dinfer.views.figures.latency import latency
from dinfer.views.figures.shown import MIME, Shown
from dinfer.views.figures.style import EITHER, template
from dinfer.views.figures.svg import svg
from tests.support.converted import converted
from tests.support.traces import on_paper


def test_a_figure_is_data_without_script_or_upload() -> None:
    figure = latency(on_paper(6, 4))
    bundle = Shown(figure)._repr_mimebundle_()
    assert set(bundle) == {MIME, "image/svg+xml", "text/plain"}
    assert bundle[MIME]["config"]["showSendToCloud"] is False
    assert bundle[MIME]["config"]["plotlyServerURL"] == ""
    assert len(bundle[MIME]["data"]) == len(figure.data) > 0
    assert len(json.dumps(bundle)) < 500_000
    assert "<script" not in json.dumps(bundle)


def test_the_next_figure_is_the_same_once_one_was_written_to_a_page(tmp_path: Path) -> None:
    shown = Shown(latency(on_paper(6, 4)))
    before = dict(shown._repr_mimebundle_()[MIME]["config"])
    shown.save(tmp_path / "figure.html")
    assert shown._repr_mimebundle_()[MIME]["config"] == before


def test_a_converted_notebook_shows_the_figure_as_a_picture() -> None:
    figure = latency(on_paper(6, 4))
    page = converted(Shown(figure)._repr_mimebundle_())
    [picture] = re.findall(r'src="data:image/svg\+xml;base64,([^"]*)"', page)
    assert b64decode(picture).decode() == svg(figure)


IN_PICTURE = {
    "exposure": ["rank 0", "rank 2", "bubble", "%"],
    "lanes": ["rank 0 compute", "rank 2 kv-in:0", "wait", "seconds since the run began"],
    "latency": ["0→1", "1→2", "on the wire", "waiting"],
    "distribution": ["0→1", "1→2", "%"],
    "links": ["MB/s on wire", "median, ms", "to rank", "from rank"],
    "by_layer": ["0→1", "l5", "p99", "transfers"],
}
"""what a reader of the still picture finds in it"""


@pytest.mark.parametrize("name", list(IN_PICTURE))
def test_every_plot_of_a_trace_survives_nbconvert(name: str) -> None:
    page = converted(getattr(on_paper(6, 4), name)()._repr_mimebundle_())
    [picture] = re.findall(r'src="data:image/svg\+xml;base64,([^"]*)"', page)
    text = re.sub(r"<[^>]*>", "\n", b64decode(picture).decode())
    assert [one for one in IN_PICTURE[name] if one not in text] == []
    assert "NaN" not in text


def layout_of(figure: go.Figure) -> dict[str, Any]:
    """What a front end is told of its looks."""
    layout: dict[str, Any] = Shown(figure)._repr_mimebundle_()[MIME]["layout"]
    return layout


def test_a_figure_lets_the_page_s_own_background_show() -> None:
    figure = latency(on_paper(6, 4))
    looks = layout_of(figure)["template"]["layout"]
    assert looks["paper_bgcolor"] == looks["plot_bgcolor"] == "rgba(0, 0, 0, 0)"
    assert figure.layout.paper_bgcolor is None
    picture = svg(figure)
    assert not re.search(r'<rect width="\d+" height="\d+"', picture)
    assert f'fill="{EITHER[0]}"' in picture


def test_looks_that_the_user_chose_stay() -> None:
    assert layout_of(latency(on_paper(6, 4), dark=True))["template"] == template(dark=True)
    assert layout_of(go.Figure(layout={"template": {"layout": {"title": {"text": "mine"}}}}))["template"] == {
        "layout": {"title": {"text": "mine"}}
    }
    figure = latency(on_paper(6, 4)).update_layout(paper_bgcolor="#abcdef")
    assert layout_of(figure)["paper_bgcolor"] == "#abcdef"


def luminance(colour: str) -> float:
    """Relative, as WCAG has it."""
    parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("back", ["#ffffff", "#111111"], ids=["light", "dark"])
def test_text_is_read_on_jupyterlab_s_backgrounds(back: str) -> None:
    low, high = sorted((luminance(EITHER[0]), luminance(back)))
    assert (high + 0.05) / (low + 0.05) > 4


@pytest.mark.parametrize(
    "name", ["plot", "exposure", "lanes", "latency", "distribution", "links", "by_layer"]
)
def test_a_trace_draws_its_figures_in_one_call(name: str) -> None:
    shown = getattr(on_paper(6, 4), name)()
    data = shown._repr_mimebundle_()[MIME]
    assert data["data"]
    assert data["config"]["showSendToCloud"] is False
    assert shown.figure.layout.height == data["layout"]["height"]


def test_a_figure_is_written_to_a_file_that_can_upload_nothing(tmp_path: Path) -> None:
    shown = on_paper(6, 4).latency()
    page = shown.save(tmp_path / "figure.html").read_text(encoding="utf-8")
    assert '"showSendToCloud": false' in page
    assert "0\\u2192" in page or "0→1" in page
    assert (shown.save(str(tmp_path / "figure.svg"))).read_text(encoding="utf-8") == svg(shown.figure)
    with pytest.raises(NotPossible, match=r"figure\.doc.*\.html or \.svg"):
        shown.save(tmp_path / "figure.doc")
    assert {path.name for path in tmp_path.iterdir()} == {"figure.html", "figure.svg"}


def test_without_plotly_a_trace_is_read_and_says_what_its_figures_need() -> None:
    """The package that reads traces knows no views: they are handed in where dinfer is imported."""
    program = """
import sys
sys.modules["plotly"] = None
from dinfer.errors import NotPossible
from dinfer.trace.trace import Trace
assert "dinfer.views" not in sys.modules
try:
    Trace(()).plot()
except NotPossible as error:
    assert "pip install plotly" in str(error), error
else:
    raise AssertionError("it drew without plotly")
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=200)
