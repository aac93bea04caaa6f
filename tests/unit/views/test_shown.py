"""A figure under a cell: small, drawn by the front end, and nothing in it that could send data anywhere."""

from __future__ import annotations

import json
import re
from base64 import b64decode

from dinfer.views.figures.latency import latency
from dinfer.views.figures.picture import svg
from dinfer.views.figures.shown import MIME, Shown
from tests.unit.views.converted import converted
from tests.unit.views.traces import on_paper


def test_a_figure_is_data_without_script_or_upload() -> None:
    figure = latency(on_paper(6, 4))
    bundle = Shown(figure)._repr_mimebundle_()
    assert set(bundle) == {MIME, "image/svg+xml", "text/plain"}
    assert bundle[MIME]["config"]["showSendToCloud"] is False
    assert bundle[MIME]["config"]["plotlyServerURL"] == ""
    assert len(bundle[MIME]["data"]) == len(figure.data) > 0
    assert len(json.dumps(bundle)) < 500_000
    assert "<script" not in json.dumps(bundle)


def test_a_converted_notebook_shows_the_figure_as_a_picture() -> None:
    figure = latency(on_paper(6, 4))
    page = converted(Shown(figure)._repr_mimebundle_())
    [picture] = re.findall(r'src="data:image/svg\+xml;base64,([^"]*)"', page)
    assert b64decode(picture).decode() == svg(figure)
