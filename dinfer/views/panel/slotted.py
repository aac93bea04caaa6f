"""A widget whose cell keeps a still picture: what the panels of runs and of watched programs have in common."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import anywidget
import ipywidgets
from traitlets import Unicode

from dinfer.errors import ipython
from dinfer.severity import style_variables
from dinfer.views.protocol import Json

VIEW = "application/vnd.jupyter.widget-view+json"

HINT = (
    "An error in place of the panel means that this page could not load anywidget: VS Code and Colab load it from the "
    "network, and have to be allowed to."
)
"""A page that has ipywidgets but not anywidget shows an unhelpful error in place of the panel. The hint is a plain
ipywidget below it, and panel.css, which comes with a panel that is drawn, hides it."""

ONLY_WIDGETS = ("VSCODE_PID", "PYCHARM_HOSTED")
"""environment variables of editors that start kernels themselves"""


def texts_of(files: Sequence[str]) -> str:
    """What files of js/ hold, one after the other."""
    folder = Path(__file__).parent / "js"
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in files)


class SlottedWidget(anywidget.AnyWidget):
    """Display it as the last line of a cell. Its script has slots.js in it."""

    _css = "\n".join(
        [
            f".dinfer-panel {{ {style_variables(dark=False)} }}",
            f".dinfer-panel.dinfer-dark {{ {style_variables(dark=True)} }}",
            texts_of(["panel.css"]),
        ]
    )

    slot = Unicode().tag(sync=True)
    """the model's id, which a browser does not know of itself: it draws in outputs that carry it"""

    def __init__(self, **traits: Any) -> None:
        slot = uuid4().hex
        self._frame: ipywidgets.VBox | None = None
        """the widget and HINT"""
        super().__init__(slot=slot, model_id=slot, **traits)

    def still(self) -> str:
        """The still picture, as HTML without scripts. Must not raise."""
        raise NotImplementedError

    def close(self) -> None:
        """Remove it from the page."""
        if self._frame:
            self._frame.children[1].close()
            self._frame.close()
        super().close()

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[Json, Json]:
        """The still picture, in a slot in which a page that has the widget's model draws the live one (slots.js).

        Not the widget itself: Jupyter would show an error in its place, and not the picture, once a notebook is opened
        again. Pages that draw widgets in no other way are given both.
        """
        if not draws_only_widgets():
            slot = f'<div class="dinfer-slot {self.slot}">{self.still()}</div>'
            return {"text/html": slot, "text/plain": repr(self)}, {}
        data, metadata = super()._repr_mimebundle_(**kwargs) or ({}, {})
        if VIEW in data:
            if not self._frame:
                hint = ipywidgets.HTML(HINT)
                hint.add_class("dinfer-hint")
                self._frame = ipywidgets.VBox([self, hint], layout={"overflow": "visible"})
            data = {**data, VIEW: {**data[VIEW], "model_id": self._frame.model_id}}
        return {**data, "text/html": self.still()}, metadata


def draws_only_widgets() -> bool:
    """Whether the page draws a widget only as an output of the widgets' own type: VS Code, PyCharm and Colab."""
    own = getattr(ipython(), "user_ns", {})
    by_editor = any(name in os.environ for name in ONLY_WIDGETS) and "JPY_SESSION_NAME" not in os.environ
    return by_editor or "__vsc_ipynb_file__" in own or "google.colab.output" in sys.modules
