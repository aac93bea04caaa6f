"""Explaining: why a run does not move, told unasked by its watch, and asked for by `run.verdict()`."""

from dataclasses import replace

from dinfer.monitor.signs import HangEvidence
from dinfer.monitor.watch import HangWatch
from dinfer.run.failure import ending
from dinfer.run.state import RunState
from dinfer.run.stepper import NoProgress
from dinfer.verdict.verdict import Verdict
from dinfer.verdict.waits import HangKind

ABOUT_MESSAGES: tuple[HangKind, ...] = (
    "another plan", "other size", "wrong peer", "sent twice", "out of order", "never sent", "never received",
)  # fmt: skip
"""what an exception that a message has caused is told as: whoever raised it is not to blame"""

STUCK: tuple[HangKind, ...] = ("stuck in Python", "stuck in C", "stuck")


class Hung(NoProgress):
    """The run does not go on by itself. `verdict` says why."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(str(verdict))
        self.verdict = verdict


class Explaining(RunState):
    """A run whose standing still is explained. `watch` is called often, on the session's thread."""

    _watch: HangWatch

    def _look_anew(self) -> None:
        super()._look_anew()
        self._watch = HangWatch(self.job, self._line)

    def verdict(self) -> Verdict:
        """Why the run does not move: who waits for whom, for what, and who is to blame; or that it moves, and whether a
        rank is slow. Its first sentence is what `where()`, the panel and the log say."""
        is_moving = not self.failure and self._state() in ("running", "decoding")
        found = self._judge(is_moving=is_moving)
        told = (self.failure or self.silence).partition("\n")[0]
        return replace(found, sentence=told) if told else found

    def evidence(self) -> HangEvidence:
        """What the verdict is made of now."""
        told = self.verdict().sentence
        return self._watch.evidence(decoding=self._is_decoding(), ended=self._ended(), told=told)

    @property
    def told(self) -> Verdict | None:
        """The verdict that was told unasked, while it holds."""
        return self._watch.found

    @property
    def hang(self) -> str:
        """Its sentence."""
        return self.told.sentence if self.told else ""

    def why(self) -> str:
        """All of it, as text."""
        return str(self.told) if self.told else ""

    def stuck_ranks(self) -> tuple[int, ...]:
        """Those that were told to be in an op that does not end."""
        return self.told.ranks if self.told and self.told.kind in STUCK else ()

    def watch(self) -> None:
        """Look whether the run has stopped moving; `hang` says so."""
        if self.failure or self.silence or self._state() not in ("running", "decoding"):
            self._watch.rest(decoding=self._is_decoding())
        else:
            self._watch.look(decoding=self._is_decoding(), ended=self._ended())

    def check_moving(self) -> None:
        """Raises Hung where the watch has found that the run does not go on by itself."""
        found = self._watch.found
        if found and found.is_hung and self._state() in ("running", "decoding"):
            raise Hung(found)

    def _judge(self, *, is_moving: bool) -> Verdict:
        return self._watch.judge(decoding=self._is_decoding(), ended=self._ended(), is_moving=is_moving)

    def _is_decoding(self) -> bool:
        """Whether the ranks are to make tokens, or were when the run failed: those that wait for one still do."""
        return self._generation.under_way or bool(self.failure and self._generation.unfinished)

    def _failed(self, found: str) -> str:
        """What to say of a failure: of one that a message has caused, first who has sent that."""
        verdict = self._judge(is_moving=False)
        return f"{verdict.sentence}\n{found}" if verdict.kind in ABOUT_MESSAGES else found

    def _ended(self) -> dict[int, str]:
        """How the processes of those have ended that have, or seem to have."""
        found = {
            rank: ending(code, self.config)
            for rank, code in enumerate(self._line.exits())
            if code is not None
        }
        for rank in self._line.silent():
            if self._line.ranks[rank].stopped is None:
                found.setdefault(rank, "does not answer: its host or the network to it may be down")
        return found
