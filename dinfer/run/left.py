"""What the ranks hold of a run whose session has gone, with which another session goes on."""

from typing import Any, NamedTuple


class LeftRun(NamedTuple):
    """`plan`: the text of a plan of the user's own, "" for that of the config; `breakpoints`: each a
    `Breakpoint.as_dict()`; `faults`: each a `Fault.as_dict()`; `lost_events`: how many the ranks have overwritten."""

    plan_ids: dict[int, int]
    plan: str
    breakpoints: tuple[dict[str, Any], ...]
    faults: tuple[dict[str, Any], ...]
    lost_events: int
