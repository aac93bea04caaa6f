"""What has to be said of each program in `programs/defects.py`: the table fault → verdict → named line. Not a test."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from tests.support.watched import PROGRAMS

TOLD_S, DEAD_S = 5.0, 1.0
"""seconds within which a hang is told, and a death"""

TABLE = os.environ.get("DINFER_DEFECTS_TABLE", "")
"""the file in which a table of what was told is to be kept; whoever asks for one has the machine for themselves"""


class Defect(NamedTuple):
    """`kind`: of the verdict, or of the finding where the program ends; `ranks`: those of which one is to be blamed
    first; `words`: what is said too; `n`: how many ranks it takes; `is_finding`: the program ends as if all were
    right; `within_s`: of a verdict."""

    kind: str
    ranks: tuple[int, ...]
    words: tuple[str, ...] = ()
    n: int = 2
    is_finding: bool = False
    within_s: float = TOLD_S


def _finding(kind: str, rank: int, *words: str) -> Defect:
    return Defect(kind, (rank,), words, is_finding=True)


_FOLLOWS = {"rows repeated": ("rows shifted",)}
"""what is found beside it: the rows after those that were added twice"""

_VALUE_ERROR = "ValueError: a shape that does not fit"

DEFECTS: Mapping[str, Defect] = {
    "gather_against_recv": Defect("cycle", (0,), ("`all_gather` ([8, 2] float32)", "`recv <- 0`")),
    "one_send_for_two_recvs": Defect("cycle", (0,), ("`barrier`", "`recv <- 0` ([8, 2] float32)"), n=3),
    "exception_then_barrier": Defect("exception", (1,), (_VALUE_ERROR, "`barrier`")),
    "exception_then_barrier_of_all": Defect("exception", (1,), (_VALUE_ERROR,)),
    "both_send_first": Defect("cycle", (0, 1), ("`send -> 1` ([8, 2] float32)", "`send -> 0`")),
    "wrong_group_rank": Defect("never received", (2,), ("`send -> 2`", "rank 0"), n=3),
    "to_itself": Defect("exception", (1, 2), ("ValueError: Invalid destination rank",), within_s=DEAD_S),
    "micro_batches": Defect("cycle", (0,), ("`all_reduce`", "`recv <- 0`")),
    "group_on_one_rank": Defect("cycle", (1,), ("`new_group`", "`all_reduce`")),
    "too_long": Defect("other size", (0,), ("[16, 2] float32", "[8, 2] float32"), within_s=DEAD_S),
    "other_size_of_collective": Defect("other size", (0, 1), ("[4096] float32", "[8192] float32")),
    "other_collective": Defect("out of order", (0, 1), ("`broadcast`", "`all_reduce`")),
    "other_order_of_groups": Defect("cycle", (0, 1), ("`all_reduce`", "group default")),
    "stops_in_python": Defect("stuck in Python", (1,), ("`time.sleep(1000)", "`all_reduce`")),
    "stops_in_a_lock": Defect("stuck in Python", (1,), ("`lock.acquire()", "`all_reduce`")),
    "stops_in_c": Defect("stuck in C", (1,), ("the GIL", "`all_reduce`")),
    "stops_by_signal": Defect("stopped", (1,), ("stopped by a signal", "`all_reduce`")),
    "dies": Defect("dead", (1,), ("a signal killed it",), within_s=DEAD_S),
    "leaves": Defect("never joined", (1,), ("has ended", "`all_reduce`")),
    "raises": Defect("exception", (1,), (_VALUE_ERROR,), within_s=DEAD_S),
    "other_size": _finding("other size", 0, "[4, 2] float32"),
    "other_dtype": _finding("other size", 0, "int32"),
    "crossed": _finding("crossed", 1, "messages crossed"),
    "crossed_k_and_v": _finding("crossed", 1, "messages crossed", "[2, 8] float32"),
    "never_waited_but_kept": _finding("never waited", 0, "`send -> 1`"),
    "appended_twice": _finding("rows repeated", 1, "of layer 0"),
    "appended_twice_to_a_cache": _finding("rows repeated", 1, "of layer 0"),
    "stale_cache": _finding("rows repeated", 0, "of layer 0"),
    "stale_rows": _finding("rows differ", 1, "4 of 16 rows of layer 1", "token 8"),
    "slow": _finding("slow rank", 1, "is slow"),
}
"""`cut_link`, which takes two hosts, and `never_waited`, which is a race, are not among them"""


@cache
def named_lines(name: str) -> tuple[int, ...]:
    """The lines of a defect of which one has to be named; none where no line is at fault."""
    lines = (PROGRAMS / "defects.py").read_text(encoding="utf-8").splitlines()
    first = lines.index(f"def {name}() -> None:")
    found = []
    for number, line in enumerate(lines[first + 1 :], first + 2):
        if re.match(r"\S", line):
            break
        if line.endswith("# named"):
            found.append(number)
    return tuple(found)


class Told(NamedTuple):
    """What was said of a defect."""

    kind: str
    ranks: list[int]
    text: str


def told_of(verdict: Mapping[str, Any] | None, findings: Sequence[Mapping[str, Any]], name: str) -> Told:
    """The verdict, or the first finding, as `--json` has them, where one is due and there is no other verdict."""
    said = DEFECTS[name]
    if said.is_finding:
        assert verdict is None, verdict
        kinds = [found["kind"] for found in findings]
        assert kinds[:1] == [said.kind], findings
        assert set(kinds) <= {said.kind, *_FOLLOWS.get(said.kind, ())}, findings
    found = findings[0] if said.is_finding else verdict
    assert found, (name, findings)
    return Told(found["kind"], list(found["ranks"]), found["text"])


def named_line(told: Told, name: str, file: str = "defects.py") -> str:
    """The line that it names, of those to be named; "" if it names none of them."""
    places = (f"{file}:{line}" for line in named_lines(name))
    return next((place for place in places if re.search(rf"{re.escape(place)}\b", told.text)), "")


def assert_in_time(seconds: float | None, within_s: float) -> None:
    """It was told before the program ended, and, where nothing else runs, as soon as promised."""
    assert seconds is not None
    assert not TABLE or seconds < within_s


def assert_right(told: Told, name: str, file: str = "defects.py") -> None:
    """Kind, rank, line and words are those of the table."""
    said = DEFECTS[name]
    assert (told.kind, told.ranks[:1]) in [(said.kind, [rank]) for rank in said.ranks], told
    for word in said.words:
        assert word in told.text, (word, told.text)
    assert bool(named_line(told, name, file)) == bool(named_lines(name)), (named_lines(name), told.text)
