"""Comparing: a run beside transformers' own forward. Ranks compute and compare; only numbers come here."""

import contextlib
from typing import Any

from dinfer.engine.hosting.commands import Message
from dinfer.model.text import texts_of
from dinfer.plan.ops import PlanError
from dinfer.session.reference.compare import Comparison
from dinfer.session.reference.judging import Case
from dinfer.session.reference.told import Examined, Held, Measure, holds_most, to_be_examined
from dinfer.session.runs.action import action
from dinfer.session.runs.holding import Holding
from dinfer.session.runs.lent import RunOver
from dinfer.session.said import Where

DTYPES = ("float32", "bfloat16", "float16")


class Comparing(Holding):
    """Part of a run."""

    def wait(self, timeout: float | None = None) -> Where:
        """Wait until the run stands."""
        raise NotImplementedError

    @action
    def compare(
        self, what: str = "reference", *, chunked: bool = True, dtype: str | None = None
    ) -> Comparison:
        """Compare what the ranks hold with transformers' own forward of the same checkpoint, at the ranks' thread
        count: K, V and hidden states of every layer and chunk, and every new token fed as the run fed it.

        As it is, in the run's chunks and dtype, every bit must be the same (on a CPU). `chunked=False` feeds the prompt
        at once, and `dtype` has the checkpoint loaded in another one; then differences up to a stated tolerance are
        rounding (`dinfer.model.tolerance`). One rank runs the reference; others only if they hold other bytes. Hidden
        states that no rank keeps are computed anew from the run's KV, in memory of their own. A run that stands
        half-way is compared as far as it has come. Raises PlanError where nothing is computed yet or a word is not
        known, and RankRefused where a second KV, or the weights in `dtype`, do not fit into memory.
        """
        _check(what, dtype)
        self.wait()
        with self.hold():  # it may have been sent on since
            self.check()
            helds = self._held()
            own = helds[0].dtype
            wanted = dtype or own
            examined = self._examined(helds, chunked=chunked, dtype=wanted)
        spec, shape = self.job.spec, self.plan.shape
        width = max(spec.hidden_size, spec.intermediate_size, shape.tokens)
        case = Case(self.plan, Measure(examined[0].exact, own, wanted, width), helds, examined)
        return Comparison(case, chunked=chunked, edited=self.edited, texts=self._token_texts(helds))

    def _held(self) -> list[Held]:
        said = self._pages({rank: {"do": "reference_held"} for rank in range(self.world_size)})
        helds = [Held.of(rank, said[rank]) for rank in range(self.world_size)]
        if not any(one.now for one in helds):
            raise PlanError(
                "nothing to compare: prefill has not begun, no block is computed yet. run.step(), run.run_to(…) or "
                "run.resume() first."
            )
        return helds

    def _examined(self, helds: list[Held], *, chunked: bool, dtype: str) -> list[Examined]:
        """By one rank, and by those that hold other bytes than it."""
        chunks = 1 + max(
            chunk for one in helds for chunk, _ in one.now if chunk < len(self.plan.shape.chunks)
        )
        message = {"do": "reference", "chunked": chunked, "dtype": dtype, "chunks": chunks}
        rank = holds_most(helds)
        first = Examined.of(rank, self._pages({rank: message})[rank])
        others = self._pages(dict.fromkeys(to_be_examined(helds, first), message))
        return [first, *(Examined.of(other, said) for other, said in others.items())]

    def _pages(self, requests: dict[int, Message]) -> dict[int, Message]:
        """The answers, each with all its items; however long they take, as long as the ranks live."""
        try:
            answers = self._line.ask(requests, float("inf"), self._check_goes_on)
        except (KeyboardInterrupt, RunOver):
            with contextlib.suppress(Exception):
                self._ask_all("reference_stop")
            raise
        for rank, said in answers.items():
            while len(said["items"]) < said["count"]:
                page = {rank: {"do": "reference_page", "start": len(said["items"])}}
                said["items"] += self._line.ask(page, 30.0, self._check_goes_on)[rank]["items"]
        return answers

    def _check_goes_on(self) -> None:
        self.check_looking()
        self.check()

    def _token_texts(self, helds: list[Held]) -> list[str]:
        ids = [*self.job.ids, *max((one.tokens for one in helds), key=len)]
        return texts_of(self._tokenizer, ids, [range(at, at + 1) for at in range(len(ids))])


def _check(what: Any, dtype: Any) -> None:
    if what != "reference":
        raise PlanError(f'{what!r} cannot be compared with; run.compare("reference") is what there is.')
    if dtype is not None and dtype not in DTYPES:
        raise PlanError(
            f"dtype {dtype!r} is not known; give one of {', '.join(DTYPES)}, or none for the run's own."
        )
