"""RemoteFleet: ranks in processes of their own, on any host, reached through their watchers."""

import time
from collections.abc import Callable, Sequence

from dinfer.engine.hosting.commands import Message, stand_of
from dinfer.plan.cut import Cut
from dinfer.plan.graph import channel_of
from dinfer.plan.plan import Place, Plan
from dinfer.session.runs.fleet import RankFailed, Stands
from dinfer.session.states import States

POLL_S = 0.05


class RemoteFleet:
    """`check()` is called while waiting; it raises RankFailed when the run cannot go on. `patience` is the number of
    seconds in which a rank must answer a command."""

    def __init__(self, plan: Plan, line: States, check: Callable[[], None], patience: float = 30.0) -> None:
        self.plan, self._line = plan, line
        self._check, self._patience = check, patience

    def stands(self) -> Stands:
        with self._line.changed:
            found = [state.stand for state in self._line.ranks]
        stands = [stand for stand in found if stand is not None]
        if len(stands) < len(found):
            raise RankFailed("not all ranks have said where they stand yet: wait until they are ready.")
        return stands

    def freeze(self) -> Stands:
        answers = self._ask({rank: {"do": "freeze"} for rank in range(self.plan.world_size)})
        return [stand_of(answers[rank]) for rank in sorted(answers)]

    def set_limits(self, limits: Cut, *, order: int = 0, stopping: bool = False) -> None:
        message: Message = {"do": "limits", "cut": limits, "order": order, "stopping": stopping}
        self._ask(dict.fromkeys(range(len(limits)), message))

    def release(self, recvs: Sequence[Place]) -> None:
        for place in recvs:
            op = self.plan.op(place)
            self._ask({op.peer: {"do": "release", "channels": [channel_of(place.rank, op)]}})

    def rewind(self, cut: Cut) -> None:
        self._ask({rank: {"do": "rewind", "cut": cut} for rank in range(len(cut))})

    def wait(self, until: Callable[[Stands], bool], timeout: float | None) -> bool:
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            with self._line.changed:  # held while looking, so that no news between look and wait is missed
                if self._line.changed.wait_for(lambda: until(self.stands()), POLL_S):
                    return True
            if deadline is not None and time.monotonic() > deadline:
                return False
            self._check()

    def _ask(self, requests: dict[int, Message]) -> dict[int, Message]:
        return self._line.ask(requests, self._patience, self._check)
