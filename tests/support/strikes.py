"""Breaks an engine on purpose from inside: kills or stops it in one op, or before one token. Not a test.

What stands in the message about it can then be compared with what was struck, to the op.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dinfer.plan.ops import Op
from dinfer.session.session import Session

Signal = Literal["SIGKILL", "SIGSTOP"]

_COMMON = """
def strike():
    import os, pathlib, signal, time
    path = pathlib.Path({path!r})
    path.with_suffix(".part").write_text(str(time.monotonic()))
    path.with_suffix(".part").rename(path)
    os.kill(os.getpid(), signal.{signal})
    while True:  # a signal may take effect a little after kill has returned; the op must not go on meanwhile
        time.sleep(60)
"""
_IN_OP = """
from dinfer.engine import ops
def broken(state, op, comm, unbroken=ops.HANDLERS[{kind!r}]):
    if str(op) == {op!r}:
        strike()
    return unbroken(state, op, comm)
ops.HANDLERS[{kind!r}] = broken
"""
_BEFORE_TOKEN = """
from dinfer.engine.decoding import Decoding
def broken(self, unbroken=Decoding.step):
    if len(self.tokens) == {token}:
        strike()
    return unbroken(self)
Decoding.step = broken
"""


@dataclass(frozen=True)
class Strike:
    """A fault that waits on one rank: in that op, or before that new token."""

    session: Session
    rank: int
    kind: Signal
    path: Path

    def in_op(self, op: Op) -> Strike:
        self._arm(_IN_OP.format(kind=op.kind, op=str(op)))
        return self

    def before_token(self, token: int) -> Strike:
        self._arm(_BEFORE_TOKEN.format(token=token))
        return self

    def from_outside(self) -> Strike:
        self.path.write_text(str(time.monotonic()), encoding="ascii")
        cluster = self.session.ranks.cluster  # type: ignore[attr-defined]  # its ranks are engines
        os.kill(cluster.facts[self.rank].pid, getattr(signal, self.kind))
        return self

    def has_struck(self) -> bool:
        return self.path.exists()

    def seconds_ago(self) -> float:
        """On the clock of `time.monotonic`, which on one machine is one clock."""
        return time.monotonic() - float(self.path.read_text(encoding="ascii"))

    def _arm(self, text: str) -> None:
        """In a process that recovery ends: nothing has to be mended."""
        cluster = self.session.ranks.cluster  # type: ignore[attr-defined]  # its ranks are engines
        source = _COMMON.format(path=str(self.path), signal=self.kind) + text
        cluster.call(self.rank, "builtins:exec", source, {}, timeout=60)
