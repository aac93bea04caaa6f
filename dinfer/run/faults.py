"""The faults that a user injects into one run: arming them, what they have done, disarming them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from dinfer.display import Displayable, Tidy, listed
from dinfer.engine.board import Stand
from dinfer.errors import NoSuch
from dinfer.history import History
from dinfer.messages import FaultStruck, SetFaults
from dinfer.plan.faults import KINDS, SLOW, Fault, TokenSizes, fault_of
from dinfer.plan.ops import PlanError, Value
from dinfer.plan.plan import Plan
from dinfer.plan.slowness import slow_fault
from dinfer.run.state import Mark, RunState, State, state_of_lanes
from dinfer.severity import Severity


class Injected(Tidy, Displayable):
    """An armed `fault` and its `strikes`: (rank, number of values changed, description)."""

    severity = Severity.WARNING

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.strikes: list[tuple[int, int, str]] = []

    @property
    def number(self) -> int:
        """Its number among the run's faults."""
        return self.fault.number

    @property
    def has_struck(self) -> bool:
        """Whether it has changed something yet."""
        return bool(self.strikes)

    def __str__(self) -> str:
        """For example `hit: #1 zero in K of block c1 l7 on rank 2, head 3, token 141, in memory: 16 of 512 …`."""
        if not self.strikes:
            return f"armed: {self.fault}"
        rank, _, found = self.strikes[-1]
        if self.fault.kind in SLOW:
            return f"hit: {self.fault}"
        times = sum(one[0] == rank for one in self.strikes)
        return f"hit: {self.fault}: {found}" + (f" ({times} times)" if times > 1 else "")


class Armed(Tidy, Displayable, called="run.faults"):
    """The armed faults of a run, by number: `run.faults[1]`. Removing one here disarms it on the ranks, to which `tell`
    gives the list."""

    INTERNAL = frozenset({"arm", "begin", "inject", "marks", "struck"})

    def __init__(self, state: RunState, tell: Callable[[SetFaults], object], history: History) -> None:
        self._state, self._tell, self._history = state, tell, history
        self._found: dict[int, Injected] = {}
        self._count = 0

    def __iter__(self) -> Iterator[Injected]:
        return iter(list(self._found.values()))

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, number: int) -> Injected:
        if number not in self._found:
            raise NoSuch(f"there is no fault #{number}; there are{':' * bool(self)} {self}")
        return self._found[number]

    @property
    def severity(self) -> Severity:
        return Severity.WARNING if self._found else Severity.NOTE

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or 'no faults: run.inject("bitflip", layer=0, chunk=0) arms one'

    def remove(self, number: int) -> None:
        """Disarm one; bytes that it has changed stay changed. Raises KeyError."""
        self._disarm([self[number]], f"run.faults.remove({number})")

    def clear(self) -> None:
        """Disarm all; bytes that they have changed stay changed."""
        self._disarm(list(self), "run.faults.clear()")

    # -- for the run

    def inject(self, stands: Sequence[Stand], kind: str, **chosen: Any) -> Injected:
        """Arm a fault of a run whose ranks stand there; it is forgotten if a rank refuses it. Raises PlanError for a
        run that moves, and for a fault that is not possible."""
        plan, spec, dtype = self._state.plan, self._state.job.spec, self._state.job.config.dtype
        if state_of_lanes(plan, stands) == State.RUNNING:
            raise PlanError(
                "the run is moving, so what a fault meets would be luck: run.pause() first, then run.inject(…)."
            )
        sizes = TokenSizes(spec.kv_heads, spec.head_dim, spec.dtype if dtype == "auto" else dtype)
        number = self._count + 1
        if kind in SLOW:
            fault = slow_fault(number, kind, plan, **chosen)
            self._check_can_wait(fault)
        else:
            fault = fault_of(number, kind, plan.shape, sizes, **chosen)
        _check_in_time(fault, plan, stands)
        self._count = fault.number
        injected = Injected(fault)
        self._replace({**self._found, fault.number: injected}, fault.call)
        return injected

    def marks(self) -> Iterator[Mark]:
        """One for each armed fault that has a block."""
        for one in self:
            if one.fault.rank is not None and one.fault.kind not in SLOW:
                yield Mark(one.fault.rank, one.fault.chunk, one.fault.layer, "armed", str(one))

    def arm(self) -> None:
        """Have the ranks break what is armed now, and nothing else."""
        self._tell(SetFaults(tuple(one.fault.as_dict() for one in self)))

    def take_over(self, faults: Sequence[dict[str, Any]]) -> None:
        """Take over those that the ranks have kept of an earlier session; they repeat their strikes."""
        found = [Fault(**one) for one in faults]
        self._found.update({one.number: Injected(one) for one in found})
        self._count = max(self._found, default=0)

    def begin(self) -> None:
        """The run begins again on clean ranks: no fault has struck."""
        for one in self:
            one.strikes = []

    def struck(self, rank: int, note: FaultStruck) -> None:
        """A rank reports a strike. That of a fault which is no longer armed is ignored."""
        if one := self._found.get(note.number):
            one.strikes.append((rank, note.changed, note.found))
            found = "" if one.fault.kind in SLOW else f": {note.found}"
            self._state.said.append(f"fault {one.fault}{found}")

    def _check_can_wait(self, fault: Fault) -> None:
        """Raises PlanError where a fault would wait on the host while a GPU goes on."""
        if self._state.job.config.uses_streams:
            raise PlanError(
                f"{fault.kind} works where a thread of the host carries out each op. The ops of this run are issued to "
                f'streams (backend {self._state.job.config.backend}): session.load(…, backend="gloo").'
            )
        if fault.factor is not None and self._state.devices[fault.rank or 0].startswith("cuda"):
            raise PlanError(
                "factor is known for ranks on CPUs only, since a GPU computes behind its ops: give ms=…."
            )

    def _replace(self, found: dict[int, Injected], call: str = "") -> None:
        """Arm these instead; the run may be over, or a rank refuse: then all stays as it was. `call`: the one that asks
        for it, if it can be undone."""
        before, self._found = self._found, found
        try:
            self.arm()
        except BaseException:
            self._found = before
            raise
        if call and found != before:
            self._history.add(call, partial(self._restore, before))

    def _disarm(self, gone: list[Injected], call: str) -> None:
        self._state.note_call(call)
        self._replace({number: one for number, one in self._found.items() if one not in gone}, call)
        if left := self._left_by(gone):
            self._state.say(f"disarmed; {left}")

    def _restore(self, before: dict[int, Injected]) -> str:
        """Arm those of `before` and no others; what that changed."""
        gone = [one for number, one in self._found.items() if number not in before]
        back = [one for number, one in before.items() if number not in self._found]
        self._replace(before)
        texts = [f"disarmed {one.fault}" for one in gone] + [f"armed {one.fault} again" for one in back]
        return "; ".join([listed(texts), *filter(None, [self._left_by(gone)])])

    def _left_by(self, gone: Iterable[Injected]) -> str:
        """What these faults have changed, is there still, and their disarming does not mend; empty if nothing."""
        changed = [one.fault for one in gone if any(strike[1] for strike in one.strikes)]
        left = [f"#{fault.number}" for fault in changed if self._is_there(fault)]
        until = "stays changed until run.restart(), or until the run goes back before it"
        return f"what {', '.join(left)} changed {until}" if left else ""

    def _is_there(self, fault: Fault) -> bool:
        """Whether its rank holds the block of a fault; of one in decode, whether there are new tokens."""
        if fault.rank is None:
            return bool(self._state.tokens)
        return _is_made(fault, self._state.plan, self._state.stands())


def _is_made(fault: Fault, plan: Plan, stands: Sequence[Stand]) -> bool:
    """Whether the block of a fault is complete on its rank; True where positions are not known."""
    if fault.rank is None or not stands:
        return True
    lanes = zip(plan.lanes[fault.rank], stands[fault.rank].positions, strict=True)
    done = (op for lane, position in lanes for op in lane.ops[:position])
    return any(Value("kv", fault.chunk, fault.layer) in op.makes() for op in done)


def _check_in_time(fault: Fault, plan: Plan, stands: Sequence[Stand]) -> None:
    """Raises PlanError for a fault that strikes before a block is complete, if it is complete already."""
    if fault.where == "memory" or fault.rank is None:
        return
    if _is_made(fault, plan, stands):
        block = f"block c{fault.chunk} l{fault.layer}"
        came = "been computed" if fault.where == "compute" else f"arrived on rank {fault.rank}"
        also = ", or use where='memory'" if "memory" in KINDS[fault.kind].wheres else ""
        raise PlanError(
            f"{block} has {came} already: go back before it (run.step_back(…), or run.run_to(…) to a block before it)"
            f"{also}."
        )
