"""When to say that a watched run hangs: once one verdict has stood for a while; never for what ends by itself."""

from dinfer.verdict.verdict import Verdict
from dinfer.watching.evidence import Evidence

CONFIRM_S = 0.6
"""for how long a verdict has to stand: the records of two ranks may be of different moments"""

CONFIRM_UNKNOWN_S = 1.5
"""while a stack may still come, which says where a rank stands, and perhaps that it waits for a request"""

CONFIRM_MISSING_S = 0.2
"""For what a rank has left out that has ended: its record is final, once it has been read after the end."""

_ENDS = frozenset({"exception", "dead", "lost peer"})
_MISSING = frozenset({"never sent", "never received", "never joined"})


def is_end(found: Verdict, evidence: Evidence) -> bool:
    """Whether it is about the end of a rank. A hang that has been told may lead to one, by a time-out or by somebody's
    hand."""
    return found.kind in _ENDS and not _is_handled(found, evidence)


def _is_handled(found: Verdict, evidence: Evidence) -> bool:
    """Whether it is about an exception that the program has caught."""
    raised = (
        evidence.signs[found.ranks[0]].raised if found.ranks and found.ranks[0] in evidence.signs else None
    )
    return found.kind == "exception" and bool(raised and raised.handled)


def _confirm_s(found: Verdict, evidence: Evidence) -> float:
    if found.kind in ("exception", "dead") and not _is_handled(found, evidence):
        return 0.0  # that does not come from comparing records of several ranks
    if found.kind in _MISSING and all(_has_ended(rank, evidence) for rank in found.ranks[:1]):
        return CONFIRM_MISSING_S
    if found.kind == "stuck" and any(_answers_soon(rank, evidence) for rank in found.ranks):
        return CONFIRM_UNKNOWN_S
    return CONFIRM_S


def _answers_soon(rank: int, evidence: Evidence) -> bool:
    """Whether a rank of which no stack has come yet can still write one."""
    its = evidence.signs.get(rank)
    return its is not None and its.answers is True and not its.frames


def _has_ended(rank: int, evidence: Evidence) -> bool:
    return rank in evidence.signs and evidence.signs[rank].phase == "done"


class HangAlarm:
    """`standing`: the verdict that has been told and still holds."""

    def __init__(self) -> None:
        self.standing: Verdict | None = None
        self._is_of_end = False
        self._pending: tuple[tuple[str, tuple[int, ...]], float] | None = None

    @property
    def is_suspicious(self) -> bool:
        """Whether stacks should be asked for."""
        return self._pending is not None

    @property
    def is_deciding(self) -> bool:
        """Whether a verdict may be told soon."""
        return self._pending is not None and self._pending[0] != self._told

    @property
    def _told(self) -> tuple[str, tuple[int, ...]] | None:
        return (self.standing.kind, self.standing.ranks) if self.standing else None

    def consider(self, evidence: Evidence, now: float) -> Verdict | None:
        """The verdict that is to be told now; None if there is none, or it has been told. `now`: seconds."""
        found = evidence.problem
        if found and self.standing and is_end(found, evidence) and not self._is_of_end:
            return None  # a hang is ended by killing it
        if found is None or (found.kind == "dead" and not _is_missed(found, evidence)):
            self.standing = self._pending = None
            return None
        key = (found.kind, found.ranks)
        if self._pending is None or self._pending[0] != key:
            self._pending = (key, now)
        if key == self._told or now - self._pending[1] < _confirm_s(found, evidence):
            return None
        self.standing, self._is_of_end = found, is_end(found, evidence)
        return found


def _is_missed(found: Verdict, evidence: Evidence) -> bool:
    """Whether others wait for a rank that died, or have lost their connection to it. A program may also kill its own
    helpers at its end."""
    others = (its for rank, its in evidence.signs.items() if rank not in found.ranks)
    return bool(found.blocked) or any(its.raised and not its.raised.handled for its in others)
