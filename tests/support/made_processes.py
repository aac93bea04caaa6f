"""Watched processes, made by hand, as the probe's reader returns them."""

from typing import Any

from dinfer.watch.probe.records import RaisedError, WatchedGroup, WatchedOp, WatchedProcess

SECOND = 1_000_000_000


def process(rank: int | None, *ops: WatchedOp, started: float = 0.0, **given: Any) -> WatchedProcess:
    """A process of that rank of two, with these ops; times in seconds."""
    made = WatchedProcess(
        host="elsewhere",
        pid=100 + (rank or 0),
        argv=("python", "infer.py"),
        name=f"elsewhere-{100 + (rank or 0)}-{started}",
        hook="kernels",
        clock=0,
        started_ns=int(started * SECOND),
        rank=rank,
        world_size=2,
        ops=list(ops),
        groups={"0": WatchedGroup("0", (0, 1), "gloo", "default_pg")},
    )
    for name, value in given.items():
        setattr(made, name, value)
    return made


def op(seq: int, kind: str, at: float, done: float = 0.0, **given: Any) -> WatchedOp:
    """An op that somebody waits for; `done` 0: still."""
    fields: dict[str, Any] = {
        "group": "0",
        "peer": None,
        "tag": None,
        "shape": (4,),
        "dtype": "float32",
        "nbytes": 16,
        "is_async": False,
        "waited_ns": int(at * SECOND),
        "state": "done" if done else "waiting",
        "file": "/code/infer.py",
        "line": 10 + seq,
        "function": "main",
        "layer": None,
        "chunk": None,
        "thread": "MainThread",
    }
    fields |= given
    return WatchedOp(seq, kind, issued_ns=int(at * SECOND), done_ns=int(done * SECOND), **fields)


def raised(text: str, at: float, kind: str = "ValueError", seq: int = 1) -> RaisedError:
    """An exception that ended a process."""
    return RaisedError(kind, text, "/code/infer.py", 99, "MainThread", int(at * SECOND), seq)
