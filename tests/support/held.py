"""What processes hold while prefills follow one another in one session. Not a test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import psutil

from dinfer.session.session import Session
from tests.support.runs import wait_for
from tests.support.twin import prompt

PREFILLS, SETTLED, EVERY = 200, 60, 10
"""how many; after how many pools and caches have the size that they keep; how often to look"""

TOKENS, CHUNK = 240, 16


class ProcessHolds(NamedTuple):
    """What one process has."""

    threads: int
    files: int
    memory: int


def of(pid: int) -> ProcessHolds:
    process = psutil.Process(pid)
    return ProcessHolds(process.num_threads(), process.num_fds(), process.memory_info().rss)


def check_prefills(session: Session, pids: Sequence[int], kv_bytes: int) -> list[list[int]]:
    """Run them. No process may end with more threads or files than it had once it had settled, nor with more memory
    than a quarter of the KV, of `kv_bytes` each, that these prefills have had. Returns the memory seen, by process."""
    ids = list(prompt(TOKENS))
    seen: list[list[int]] = [[] for _ in pids]
    base: list[ProcessHolds] = []
    for number in range(1, PREFILLS + 1):
        run = session.prefill(ids, chunk_size=CHUNK, max_new_tokens=2, paused=False)
        assert len(run.decode(2).tokens) == 2
        if number == SETTLED:
            base = [of(pid) for pid in pids]
        if number % EVERY == 0:
            for memory, pid in zip(seen, pids, strict=True):
                memory.append(of(pid).memory)

    def is_within() -> bool:
        now = zip(map(of, pids), base, strict=True)
        return all(one.threads <= then.threads and one.files <= then.files for one, then in now)

    wait_for(is_within, f"no more threads and files than {base}")
    most = (PREFILLS - SETTLED) * kv_bytes / 4
    for memory, then in zip(seen, base, strict=True):
        assert memory[-1] - then.memory < most, memory
    return seen
