"""A run of real ranks, each a process, under a stepper in the test's own process. Not a test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from dinfer.cluster.link import Link
from dinfer.cluster.ranks import Ranks
from dinfer.cluster.recovery import meet
from dinfer.config import Config
from dinfer.engine.board import Stand
from dinfer.job import Job, prepare
from dinfer.launch.watch import ProcessWatch
from dinfer.messages import (
    Answer,
    Command,
    HashKv,
    LimitDecode,
    LoadModel,
    PreparePrompt,
    StartDecode,
    StoreAddress,
)
from dinfer.rank.batch import device_of
from dinfer.run.stepper import Fleet, Stepper
from tests.support.bare_ranks import BareRanks
from tests.support.runs import wait_for

START_S = 120
RANK = """
import json, sys
from dinfer.rank.kernel import start
start(json.loads(sys.stdin.readline()), int(sys.argv[1]))
sys.stdin.read()  # until the test is over
"""


class ProcessRanks(Link, BareRanks):
    """The ranks of a session as processes of their own, without a cluster around them."""

    def __init__(self, world_size: int, threads: int) -> None:
        super().__init__(world_size)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        # The marker has a Fault break these ranks.
        command = [sys.executable, "-c", RANK, str(world_size), "stepped rank"]
        self.processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, text=True)
            for _ in range(world_size)
        ]
        for rank, process in enumerate(self.processes):
            assert process.stdin
            part = msgspec.to_builtins(self.job_part(rank, launcher=os.getpid()))
            process.stdin.write(f"{json.dumps(part)}\n")
            process.stdin.flush()
        wait_for(lambda: all(state.heard for state in self.ranks), "all ranks are heard")

    def exits(self) -> list[int | None]:
        return [process.poll() for process in self.processes]

    def meeting(self) -> StoreAddress:
        return StoreAddress("127.0.0.1", 0)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            assert process.stdin
            process.stdin.close()
        with self.changed:
            self.changed.wait_for(lambda: all(state.gone for state in self.ranks if state.heard), 5)
        super().close()


@dataclass(frozen=True)
class Stepped:
    """Ranks that stand before their first op, and what moves them."""

    job: Job
    ranks: ProcessRanks
    fleet: Fleet
    stepper: Stepper

    @property
    def stands(self) -> Sequence[Stand]:
        return self.fleet.stands()

    def assert_stands(self) -> None:
        """No lane is in an op or may go on, and what has been done makes a consistent cut."""
        stands = self.stands
        assert all(stand.at_limits and not any(stand.started) for stand in stands)
        assert self.stepper.cuts.is_consistent(tuple(stand.positions for stand in stands))

    def decode(self) -> list[dict[str, Any]]:
        """Let the ranks, whose prefill must be done, decode to their end; each one's KV and tokens."""
        hashes = on_all(self.ranks, HashKv(len(self.job.ids)))
        on_all(self.ranks, LimitDecode(self.job.config.max_new_tokens))
        new = on_all(self.ranks, StartDecode())
        return [
            {"kv_sha256": kv.sha256, "tokens": list(its.tokens)} for kv, its in zip(hashes, new, strict=True)
        ]


A = TypeVar("A", bound=Answer)


def on_all(ranks: Ranks, command: Command[A]) -> list[A]:
    """Every rank's answer."""
    answers = ranks.ask(dict.fromkeys(range(ranks.world_size), command), START_S)
    return [answers[rank] for rank in range(ranks.world_size)]


@contextmanager
def stepped(model: Path, ids: Sequence[int], log_dir: Path, **config: object) -> Iterator[Stepped]:
    """Start the ranks of a run, paused."""
    values = {"model_path": model, "prompt_ids": ",".join(map(str, ids)), "log_dir": log_dir, "threads": 1}
    job = prepare(Config.of({**values, **config}))
    given = job.config
    ranks = ProcessRanks(given.world_size, given.threads)
    try:
        meet(ranks, given.backend)
        loads = {
            rank: LoadModel(
                given.model_path, given.dtype, device_of(rank, given), job.spec.fingerprint, given.threads
            )
            for rank in range(given.world_size)
        }
        ranks.ask(loads, START_S)
        on_all(ranks, PreparePrompt(asdict(given), tuple(job.ids)))
        fleet = Fleet(job.plan, ranks, ProcessWatch(job, ranks, ranks.exits).check)
        yield Stepped(job, ranks, fleet, Stepper(fleet))
    finally:
        ranks.close()
