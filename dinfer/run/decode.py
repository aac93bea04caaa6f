"""Generation: the new tokens of a run, made by all ranks together, so many at a time; stopped, and taken back."""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from dinfer.cluster.ranks import Pending, RankRefused, RankStates
from dinfer.messages import Answer, Command, LimitDecode, NewTokens, StartDecode, StepBackDecode
from dinfer.model.text import TextStream
from dinfer.results import Decoded

A = TypeVar("A", bound=Answer)

ANSWER_S = 30.0


class Generation:
    """`check()` raises where the run cannot go on. `tokens` are those that all ranks have."""

    def __init__(self, line: RankStates, check: Callable[[], None], tokenizer: Any | None) -> None:
        self.tokens: list[int] = []
        self.by_rank: dict[int, list[int]] = {}
        """what each rank said that it has, after the last decode"""
        self.text = ""
        self.ended = self.under_way = self.unfinished = False
        """`unfinished`: a call was broken off by an error, and ranks may still wait for a token"""
        self._line, self._check, self._tokenizer = line, check, tokenizer
        self._remark = ""
        self._telling = threading.Lock()
        """held while the ranks are told how far to go: what two threads tell must not mix"""

    def go(self, limit: int, on_text: Callable[[str], None] | None) -> Decoded:
        """Decode until there are `limit` new tokens or the text ends; a keyboard interrupt stops it after a token."""
        before, seen = len(self.tokens), len(self.text)
        with self._telling:
            self._ask(LimitDecode(limit))
        begun = self._line.begin(dict.fromkeys(range(len(self._line.ranks)), StartDecode()))
        self.under_way = self.unfinished = True
        try:
            self._finish(begun, on_text)
        except KeyboardInterrupt:
            self.stop()
            self._finish(begun, on_text)
            raise
        finally:
            self.under_way = False
            self._line.forget(begun)
        return Decoded(
            tuple(self.tokens[before:]), self.text[seen:], self.ended, len(self.tokens), self._remark
        )

    def stop(self) -> None:
        """Let every rank come to the token that the furthest has begun: all are needed for it."""
        with self._telling:
            held = self._ask(LimitDecode(None))
            self._ask(LimitDecode(max(answer.begun for answer in held.values())))

    def back_to(self, tokens: int) -> Decoded:
        """Forget all but the first that many new tokens."""
        self.stop()  # an interrupted call may have left ranks held
        self._ask(StepBackDecode(tokens))
        self._take(self.tokens[:tokens], ended=False)
        return Decoded((), "", False, tokens)

    def forget(self) -> None:
        """The run has gone back into prefill, where the ranks have forgotten the tokens already."""
        self._take([], ended=False)

    def hear(self) -> None:
        """Take in text that has come meanwhile."""
        self.text += "".join(self._line.new_texts())

    def _finish(self, begun: Pending[NewTokens], on_text: Callable[[str], None] | None) -> None:
        shown = len(self.text)

        def meanwhile() -> None:
            nonlocal shown
            self._check()
            self.hear()
            if on_text and len(self.text) > shown:
                piece, shown = self.text[shown:], len(self.text)
                on_text(piece)

        try:
            answers = self._line.finish(begun, float("inf"), meanwhile)
        except RankRefused:
            self._check()  # it says so better where this is the run's failure
            raise
        meanwhile()
        self._take(list(answers[0].tokens), ended=answers[0].ended)
        self.unfinished, self._remark = False, answers[0].remark
        self.by_rank = {rank: list(answer.tokens) for rank, answer in answers.items()}

    def _take(self, tokens: list[int], *, ended: bool) -> None:
        """These are the tokens now, with their text in whole characters."""
        self._line.new_texts()
        self.tokens, self.ended, self.by_rank = list(tokens), ended, {}
        stream = TextStream(self._tokenizer) if self._tokenizer else None
        pieces = [stream.push(token) if stream else f"{token} " for token in self.tokens]
        self.text = "".join(pieces) + (stream.flush() if stream and ended else "")

    def _ask(self, command: Command[A]) -> dict[int, A]:
        requests = dict.fromkeys(range(len(self._line.ranks)), command)
        return self._line.ask(requests, ANSWER_S, self._check)
