"""Ranks that do nothing: tests derive theirs from them, with what matters there. Not a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dinfer.cluster.ranks import Ranks
from dinfer.messages import Command


def _unexpected(*_: object) -> Any:
    raise AssertionError("a test that asks its ranks this gives them an answer")


class BareRanks(Ranks):
    """Nobody receives what these ranks are sent, and nothing else may be asked of them."""

    describe: Callable[..., Any] = _unexpected
    cores: Callable[..., Any] = _unexpected
    meeting: Callable[..., Any] = _unexpected
    kill: Callable[..., Any] = _unexpected
    revive: Callable[..., Any] = _unexpected
    listen_for_debugger: Callable[..., Any] = _unexpected
    close: Callable[..., Any] = _unexpected

    def _send(self, rank: int, command: Command[Any], number: int) -> None:
        """Nobody receives it."""
