"""The panel: a run, live, with its pages, in a notebook or a browser's tab; and the panel of a watched program.

A `.py` file here is the kernel's side of a page; `js/` has the browser's side and the styles, which are concatenated
into one module and one sheet. Start at `panel`, then `desk`.
"""
