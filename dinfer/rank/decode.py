"""Decode under a session's control: so many tokens, stop, go on, go back."""

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import torch

from dinfer.engine.corruption import Corrupted
from dinfer.engine.decode_start import DecodeStart, GivenUp
from dinfer.engine.decoding import Decoding
from dinfer.engine.engine import Engine
from dinfer.engine.lanes import OpFailed
from dinfer.errors import NotPossible
from dinfer.messages import NewTokens
from dinfer.model.text import TextStream, load_tokenizer

log = logging.getLogger("dinfer")

GIVE_UP_S = 5.0
"""how long a start of decode that was given up may take to end the layer that it computes"""

OnToken = Callable[[int, int, str], None]
"""Called with the number of new tokens, the token, and the text that it completes."""


class TokenFailed(RuntimeError):
    """One rank has failed at a token, for which the others wait. The original error is the cause."""

    def __init__(self, rank: int, token: int, error: BaseException) -> None:
        super().__init__(f"rank {rank} failed at new token {token}: {type(error).__name__}: {error}")
        self.__cause__ = error


class Tokens:
    """The new tokens of one prompt on one rank. All ranks must be given the same limits."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._decoding: Decoding | None = None
        self._tokenizer = load_tokenizer(engine.decoder.spec.path)
        self._changed = threading.Condition()
        self._limit = self._begun = 0
        self._held = False
        self._stream, self.characters = self._new_stream(), 0
        """what makes text of tokens, and how many characters it has made"""
        self._early: _EarlyStart | None = None

    @property
    def tokens(self) -> list[int]:
        """The new tokens so far."""
        return list(self._decoding.tokens) if self._decoding else []

    @property
    def rows(self) -> int:
        """Rows of KV, with those of new tokens; 0 if there are no new tokens."""
        return self._decoding.rows if self._decoding and self._decoding.tokens else 0

    @property
    def begun(self) -> int:
        """How many new tokens have been begun, the one under way with them."""
        return self._begun

    def limit_to(self, limit: int | None) -> int:
        """Stop at that many tokens; None: begin no further one until there is a limit. Returns how many were begun.

        To stop, a session first holds all ranks, then lets them go to what the furthest has begun: all are needed for
        that token.
        """
        with self._changed:
            self._held = limit is None
            self._limit = self._limit if limit is None else limit
            self._changed.notify_all()
            return self._begun

    def expect(self, limit: int, on_text: Callable[[str], None]) -> None:
        """Prefill is on its way to its end, and decode follows: begin while blocks arrive, where that is possible.
        `on_text` is called with the text of the first token; `run` tells it once more, when it counts. Limit 0: decode
        does not follow. Raises as `give_up_start` does."""
        self.give_up_start()
        start = self._engine.decode_start(limit) if limit and not self.tokens else None
        if start is not None:
            self._early = _EarlyStart(start, on_text, self._engine.rank, self._new_stream())

    def give_up_start(self) -> None:
        """What `expect` has begun is not wanted any more: whoever changes KV calls this first. Raises NotPossible if it
        still computes after some seconds."""
        if self._early is not None and not self._early.give_up():
            raise NotPossible(
                f"rank {self._engine.rank} still computes for the first new tokens: session.recover() frees it."
            )
        self._early = None

    def run(self, on_token: OnToken) -> NewTokens:
        """Decode up to the limit or the end of the text. Does not begin if the run is to pause for changed bytes; then
        `remark` says so."""
        self._engine.board.set_phase("decode", len(self.tokens))  # from now on others may wait for this rank
        config = self._engine.config
        early, self._early = self._early, None
        start = early.taken() if early else None
        if self._decoding is None:
            room = max(self._limit, config.max_new_tokens)
            begun = self._engine.decoding(max_new_tokens=room, start=start)
            try:
                self._engine.recheck()
            except Corrupted as found:
                if config.on_corruption == "fail":
                    raise
                return NewTokens((), remark=str(found))
            self._decoding = begun
        decoding = self._decoding
        self._engine.extend(decoding, self._limit)
        decoding.begin(self._limit)
        try:
            while self._begin(decoding):
                token = decoding.step()
                on_token(len(decoding.tokens), token, self._text_of(token))
        finally:
            decoding.end()
        return NewTokens(tuple(decoding.tokens), decoding.stopped)

    def back_to(self, tokens: int) -> None:
        """Forget all but the first that many."""
        self.give_up_start()
        if self._decoding is None:
            return
        self._decoding.back_to(tokens)
        self._begun = self._limit = len(self._decoding.tokens)
        self._stream, self.characters = self._new_stream(), 0
        for token in self._decoding.tokens:
            self._text_of(token)

    def _begin(self, decoding: Decoding) -> bool:
        """Whether to decode one more, which then counts as begun: all other ranks must come as far."""
        with self._changed:
            self._changed.wait_for(lambda: not self._held)
            if len(decoding.tokens) >= self._limit or decoding.stopped:
                return False
            self._begun = len(decoding.tokens) + 1
            return True

    def _text_of(self, token: int) -> str:
        """The text that the next token completes."""
        text = _text_of(token, self._stream)
        self.characters += len(text)
        return text

    def _new_stream(self) -> TextStream | None:
        return TextStream(self._tokenizer) if self._tokenizer else None


def _text_of(token: int, stream: TextStream | None) -> str:
    return stream.push(token) if stream else f"{token} "


class _EarlyStart:
    """A start of decode, on a thread of its own until decode begins or it is given up."""

    def __init__(
        self, start: DecodeStart, on_text: Callable[[str], None], rank: int, stream: TextStream | None
    ) -> None:
        self._start, self._on_text, self._stream = start, on_text, stream
        self._is_whole = False
        self._thread = threading.Thread(target=self._run, name=f"rank {rank} start of decode", daemon=True)
        self._thread.start()

    def give_up(self) -> bool:
        """Whether nothing of it computes any more; waits for that some seconds."""
        self._start.give_up()
        self._thread.join(GIVE_UP_S)
        return not self._thread.is_alive()

    def taken(self) -> DecodeStart | None:
        """What it has computed, now that prefill has ended; None if it was given up or has failed."""
        self._thread.join()
        return self._start if self._is_whole else None

    def _run(self) -> None:
        torch.get_num_threads()  # a new thread adopts the number of threads only when torch is first asked for it
        try:
            with suppress(GivenUp, OpFailed):  # the lanes report what has failed
                self._start.run(lambda token: self._on_text(_text_of(token, self._stream)))
                self._is_whole = True
        except Exception:  # whatever it is, decode meets it again and tells of it
            log.exception("decode could not be begun early")


class PromptOnRank(NamedTuple):
    """The prompt that a rank runs: its engine, and its new tokens."""

    engine: Engine
    tokens: Tokens
