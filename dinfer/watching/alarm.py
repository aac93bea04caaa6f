"""When to say that a watched run hangs: once one verdict has stood for a while; never for what ends by itself."""

from dinfer.verdict.verdict import Verdict
from dinfer.watching.evidence import Evidence

CONFIRM_S = 0.6
"""for how long a verdict has to stand: the records of two ranks may be of different moments"""

AT_ONCE = frozenset({"exception", "dead"})
"""what does not come from comparing records of several ranks"""


ENDS = frozenset({"exception", "dead", "lost peer"})
"""what follows from a hang that has been told, by a time-out or by somebody's hand"""


class HangAlarm:
    """`standing`: the verdict that has been told and still holds."""

    def __init__(self) -> None:
        self.standing: Verdict | None = None
        self._pending: tuple[tuple[str, tuple[int, ...]], float] | None = None

    @property
    def is_suspicious(self) -> bool:
        """Whether stacks should be asked for."""
        return self._pending is not None

    def consider(self, evidence: Evidence, now: float) -> Verdict | None:
        """The verdict that is to be told now; None if there is none, or it has been told. `now`: seconds."""
        found = evidence.problem
        if found and found.kind in ENDS and self.standing and self.standing.kind not in ENDS:
            return None  # a hang is ended by killing it
        if found is None or (found.kind == "dead" and not _is_missed(found, evidence)):
            self.standing = self._pending = None
            return None
        key = (found.kind, found.ranks)
        if self._pending is None or self._pending[0] != key:
            self._pending = (key, now)
        told = self.standing and (self.standing.kind, self.standing.ranks) == key
        is_due = now - self._pending[1] >= CONFIRM_S or found.kind in AT_ONCE
        if told or not is_due:
            return None
        self.standing = found
        return found


def _is_missed(found: Verdict, evidence: Evidence) -> bool:
    """Whether others wait for a rank that died, or have lost their connection to it. A program may also kill its own
    helpers at its end."""
    others = (its for rank, its in evidence.signs.items() if rank not in found.ranks)
    return bool(found.blocked) or any(its.raised for its in others)
