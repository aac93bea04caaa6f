"""Armed: the faults of one run that are to strike, and what those that have struck have done."""

from collections.abc import Callable, Iterator
from typing import Any

from dinfer.display import Displayable
from dinfer.errors import NoSuch
from dinfer.messages import FaultStruck
from dinfer.plan.faults import Fault


class Injected(Displayable):
    """A fault that is armed, and its strikes: (rank, how many values it has changed, in words)."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.strikes: list[tuple[int, int, str]] = []

    @property
    def number(self) -> int:
        return self.fault.number

    @property
    def has_struck(self) -> bool:
        return bool(self.strikes)

    def __str__(self) -> str:
        """For example `hit: #1 zero in K of block c1 l7 on rank 2, head 3, token 141, in memory: 16 of 512 …`."""
        if not self.strikes:
            return f"armed: {self.fault}"
        rank, _, found = self.strikes[-1]
        times = sum(one[0] == rank for one in self.strikes)
        return f"hit: {self.fault}: {found}" + (f" ({times} times)" if times > 1 else "")


class Armed(Displayable):
    """Those of a run, by number: what changes here changes on the ranks. `tell` gives the ranks the full list, `say` is
    told what a user should know."""

    def __init__(self, tell: Callable[[list[dict[str, Any]]], object], say: Callable[[str], None]) -> None:
        self._tell, self._say = tell, say
        self._found: dict[int, Injected] = {}
        self._count = 0

    def __iter__(self) -> Iterator[Injected]:
        return iter(list(self._found.values()))

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, number: int) -> Injected:
        if number not in self._found:
            raise NoSuch(f"there is no fault #{number}; there are: {self}")
        return self._found[number]

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or 'no faults: run.inject("bitflip", layer=0, chunk=0) arms one'

    def remove(self, number: int) -> None:
        """Disarm one; bytes that it has changed stay so. Raises KeyError."""
        self._disarm([self[number]])

    def clear(self) -> None:
        """Disarm all; bytes that they have changed stay so."""
        self._disarm(list(self))

    # -- for the run

    @property
    def next_number(self) -> int:
        return self._count + 1

    def add(self, fault: Fault) -> Injected:
        """Have it strike from now on; it is forgotten where a rank refuses it."""
        self._count = fault.number
        found = self._found[fault.number] = Injected(fault)
        try:
            self.arm()
        except BaseException:
            del self._found[fault.number]
            raise
        return found

    def arm(self) -> None:
        """Have the ranks break what is armed now, and nothing else."""
        self._tell([one.fault.as_dict() for one in self])

    def begin_anew(self) -> None:
        """The run begins again on clean ranks: nothing has struck."""
        for one in self:
            one.strikes = []

    def struck(self, rank: int, note: FaultStruck) -> list[str]:
        """What to say of a fault that a rank reports; nothing if it is no longer armed."""
        if note.number not in self._found:
            return []
        one = self._found[note.number]
        one.strikes.append((rank, note.changed, note.found))
        return [f"fault {one.fault}: {note.found}"]

    def _disarm(self, gone: list[Injected]) -> None:
        before, numbers = self._found, {one.number for one in gone}
        self._found = {number: one for number, one in before.items() if number not in numbers}
        try:
            self.arm()
        except BaseException:  # of a run that is over, say
            self._found = before
            raise
        if changed := [f"#{one.number}" for one in gone if any(strike[1] for strike in one.strikes)]:
            self._say(
                f"disarmed; what {', '.join(changed)} changed stays changed until run.restart(), or until the run goes "
                "back before it"
            )
