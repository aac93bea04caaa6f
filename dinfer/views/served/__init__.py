"""The panel in a browser without Jupyter: a page of its own, which a small server gives out, read-only.

Start at `app`, the server; `model` is the widget's model over a websocket, page.js its other end.
"""
