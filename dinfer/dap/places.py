"""Breakpoints as an editor gives them, in words of `break_at`: the name of a function breakpoint, a line of a plan."""

import re
from typing import Any, NamedTuple, get_args

from dinfer.dap.listing import RankListing
from dinfer.errors import excerpt
from dinfer.plan.breakpoints import parse_when
from dinfer.plan.cut import count_of
from dinfer.plan.ops import OpKind, PlanError

FORMS = (
    "'layer 5', 'chunk 1 layer 3', 'c1 l3', 'layer 5 rank 2 if absmax > 100', 'recv chunk 1', 'layer if nan'"
)

_WORD = re.compile(r"(layer|chunk|rank)\s*=?\s*(\d{1,9})\b|([lcr])(\d{1,9})\b|([a-z]+)\b", re.IGNORECASE)
_LONG = {"l": "layer", "c": "chunk", "r": "rank"}


class BreakpointWords(NamedTuple):
    """The arguments of `run.break_at`."""

    layer: int | None = None
    chunk: int | None = None
    rank: int | None = None
    op: OpKind | None = None
    when: str | None = None
    hit: int | None = None


def breakpoint_words(name: str, condition: str = "", hit: str = "") -> BreakpointWords:
    """From the name of a function breakpoint, such as `chunk 1 layer 3 rank 2 if absmax > 100`, and a condition and the
    number of a hit that the editor keeps beside it. Raises PlanError."""
    place, has_if, when = _parts(name)
    if has_if and not when:
        raise PlanError(f"{excerpt(name)} has no condition after 'if': 'nan', 'absmax > 100', …")
    if when and condition:
        raise PlanError(f"{excerpt(name)} has a condition, and {excerpt(condition)} is another: give one.")
    parse_when(when := when or condition.strip())
    given = _place_words(name, place)
    if not given and not when:
        raise PlanError(f"{excerpt(name)} names no place; {_takes()}")
    return BreakpointWords(**given, when=when or None, hit=_hit(hit))


def line_words(
    listing: RankListing, rank: int, line: int, condition: str = "", hit: str = ""
) -> BreakpointWords:
    """From a line of a rank's plan. Raises PlanError for a line without an op."""
    found = listing.op_at(line)
    if found is None:
        raise PlanError("no op is on this line: a breakpoint of a plan stands on a line with an op.")
    _, op = found
    parse_when(condition.strip())
    return BreakpointWords(
        op.layer if op.layer >= 0 else None,
        op.chunk if op.chunk >= 0 else None,
        rank,
        op.kind,
        condition.strip() or None,
        _hit(hit),
    )


def _hit(text: str) -> int | None:
    """The number of a hit, as `3` or `= 3`; None where there is none. Raises PlanError."""
    if not text.strip():
        return None
    match = re.fullmatch(r"\s*={0,3}\s*(\d{1,9})\s*", text)
    if match is None:
        raise PlanError(
            f"{excerpt(text)} is no hit: give its number, from 1, such as '3': the run stops at that only."
        )
    return count_of(int(match[1]), "hit")


def _parts(name: str) -> tuple[str, bool, str]:
    """The place, whether there is an `if` or `when`, and the condition."""
    place, *rest = re.split(r"\b(?:if|when)\b", name, maxsplit=1, flags=re.IGNORECASE)
    return place.replace("`", " ").strip(" ,"), bool(rest), rest[0].strip() if rest else ""


def _place_words(name: str, place: str) -> dict[str, Any]:
    given, at = dict[str, Any](), 0
    while rest := place[at:].lstrip(" ,;:."):
        match = _WORD.match(rest)
        if match is None:
            raise PlanError(_not_understood(name, rest))
        at = len(place) - len(rest) + match.end()
        if word := match[5]:
            if word.lower() in ("each", "every", "op", "on", "at", "after", "kv", "hidden"):
                continue
            if word.lower() not in get_args(OpKind):
                raise PlanError(_not_understood(name, word))
            key, value = "op", word.lower()
        else:
            key = (match[1] or _LONG[match[3].lower()]).lower()
            value = int(match[2] or match[4])
        if key in given:
            raise PlanError(f"{excerpt(name)} names the {key} twice; name it once.")
        given[key] = value
    return given


def _not_understood(name: str, part: str) -> str:
    where = f" in {excerpt(name)}" * (part != name)
    return f"{excerpt(part)}{where} is not understood; {_takes()}"


def _takes() -> str:
    return (
        f"a breakpoint names layer, chunk, rank, in any order, a kind of op ({', '.join(get_args(OpKind))}), and a "
        f"condition after 'if': {FORMS}."
    )
