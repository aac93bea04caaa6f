"""Frame: a panel as a cell shows it, with a hint that is seen only where the page cannot draw the panel.

A page that knows ipywidgets and lacks anywidget shows an error in place of the panel, which says nothing that helps.
The hint beside it is one of ipywidgets' own widgets, and panel.css, which comes with a panel that is drawn, hides it.
"""

import ipywidgets

INSTALL = "pip install ipywidgets anywidget"

HINT = (
    "An error in place of the panel means that this page could not load anywidget: "
    f"<code>{INSTALL}</code> in the environment of the Jupyter server, then load the page again. "
    "VS Code and Colab load it from the network, and have to be allowed to."
)


def framed(panel: ipywidgets.DOMWidget) -> ipywidgets.VBox:
    """Both; to be closed with the panel."""
    hint = ipywidgets.HTML(HINT)
    hint.add_class("dinfer-hint")
    return ipywidgets.VBox([panel, hint], layout={"overflow": "visible"})


def unframe(frame: ipywidgets.VBox) -> None:
    """Close all but the panel."""
    _, hint = frame.children
    hint.close()
    frame.close()
