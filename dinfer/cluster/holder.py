"""Who holds the engines of a cluster: one session at a time, which another one takes only where its user says so."""

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import astuple
from datetime import datetime
from pathlib import Path

from dinfer.cluster.ipyparallel.errors import ClusterError
from dinfer.cluster.ipyparallel.identity import Identity
from dinfer.errors import ipython
from dinfer.messages import Holder
from dinfer.verdict.where import rank_spans_text


class ClusterTaken(ClusterError):
    """The session of another process holds these engines."""


def own_holder() -> Holder:
    """This process, as the holder of a session that begins now."""
    me = Identity.of(os.getpid())
    return Holder(_program(), me.pid, me.host, time.time(), "/".join(map(str, astuple(me))))


def check_free(holders: Mapping[int, Holder | None], me: Holder, cluster: str) -> None:
    """Raises ClusterTaken where another process's session holds ranks. `holders`: by rank, None for nobody."""
    others = {rank: one for rank, one in holders.items() if one and one.key != me.key}
    if not others:
        return
    who = dict.fromkeys(f"{one}, since {_clock(one.since)}" for one in others.values())
    ranks = "its ranks" if len(others) == len(holders) else rank_spans_text(others)
    raise ClusterTaken(
        f"{cluster} is in use: {ranks} are held by the session of {'; and by that of '.join(who)}. "
        "dinfer.connect(…, take=True) takes them over, with model and run: that session ends. "
        "dinfer.connect(…, start=True) starts a cluster of your own; session.close() over there frees this one."
    )


def _clock(since: float) -> str:
    then = datetime.fromtimestamp(since)
    return then.strftime("%H:%M" if then.date() == datetime.now().date() else "%Y-%m-%d %H:%M")


def _program() -> str:
    """What runs in this process, as its user calls it."""
    shell = ipython()
    names = getattr(shell, "user_ns", {})
    if path := os.environ.get("JPY_SESSION_NAME") or names.get("__vsc_ipynb_file__"):
        return f"notebook {Path(path).name}"
    if hasattr(shell, "kernel"):
        return "a notebook"
    script = Path(sys.argv[0]).name if sys.argv and sys.argv[0] not in ("", "-c", "-m") else ""
    return f"program {script}" if script else "a Python program"
