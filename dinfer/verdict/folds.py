"""Folds: a fold for each rank, as HTML without scripts: what it waits for, and the lines in which it is held up.

A line is a link that opens it in VS Code. In a page of Jupyter, whose folder only the page knows, why.js adds one that
opens the file there: that is what `data-file` is for. All texts are escaped.
"""

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import PurePath
from urllib.parse import quote

from dinfer.trace.events import is_cell, place_of
from dinfer.verdict.blocked import BlockedFrame, blocked_threads

OWN = "font-weight:600"

_ONE = re.compile(r"rank (\d+)\b")

MOST_FRAMES = 30
"""of a thread"""


def folds_html(lines: Sequence[str], stacks: Mapping[int, str], blamed: Sequence[int] = ()) -> str:
    """`lines`: one for each rank, or for several that do the same, as `Verdict.lines` has them; `stacks`: by rank, as
    text; the folds of those that are `blamed` are open. "" where there is neither."""
    of_one = {int(head[1]): line for line in lines if (head := _ONE.match(line))}
    several = [f"<div>{escape(line)}</div>" for line in lines if line not in of_one.values()]
    folds = [
        _fold(rank, of_one.get(rank, f"rank {rank}"), stacks.get(rank, ""), rank in blamed)
        for rank in sorted({*of_one, *stacks})
    ]
    found = "".join([*several, *folds])
    return f'<div class="dinfer-folds">{found}</div>' if found else ""


def _fold(rank: int, line: str, stack: str, is_blamed: bool) -> str:
    mark = "✖ " if is_blamed else ""
    threads = blocked_threads(stack)
    if not threads:
        return f'<div data-rank="{rank}">{mark}{escape(line)}</div>'
    inner = "".join(
        f"<div>{escape(thread.name)}</div><ol>{''.join(map(_item, thread.frames[:MOST_FRAMES]))}</ol>"
        for thread in threads
    )
    opened = " open" if is_blamed else ""
    return f'<details data-rank="{rank}"{opened}><summary>{mark}{escape(line)}</summary>{inner}</details>'


def _item(frame: BlockedFrame) -> str:
    style = f' style="{OWN}"' if frame.is_own else ""
    text = f" <code>{escape(frame.text)}</code>" if frame.text else ""
    return f"<li{style}>{source_link(frame.file, frame.line)} in {escape(frame.function)}{text}</li>"


def source_link(file: str, line: int) -> str:
    """A place in the source, as a link where the file is one that an editor can open."""
    place = escape(place_of(file, line) if line else file)
    is_file = line and PurePath(file).is_absolute() and not is_cell(file)
    if not is_file:
        return place
    path = quote(file.replace("\\", "/"))
    slash = "" if path.startswith("/") else "/"
    return (
        f'<a href="vscode://file{slash}{path}:{line}" data-file="{escape(file)}" data-line="{line}" '
        f'title="{escape(file)}:{line}: open in VS Code">{place}</a>'
    )
