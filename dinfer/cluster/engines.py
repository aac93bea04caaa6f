"""Ranks that are ipyparallel engines: processes of a cluster, each with a watcher beside it."""

import socket
import time
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from dinfer.cluster.holder import check_free, own_holder
from dinfer.cluster.ipyparallel.calls import wait_until
from dinfer.cluster.ipyparallel.cluster import Cluster
from dinfer.cluster.ipyparallel.facts import own_loopback
from dinfer.cluster.link import Link
from dinfer.cluster.ranks import LOST, STOPPED_S, Ranks, answers, taken_over
from dinfer.errors import NoAnswer, NotPossible
from dinfer.messages import EndPrompt, Holder, OrphanRule, StoreAddress
from dinfer.transport.interface import LOOPBACK, own_address_towards
from dinfer.verdict.where import rank_spans_text

START_S = 60.0

PAUSE_S = 2.0
"""In a cluster that was joined: how long the session may be gone before the run pauses."""

END_S = 2.0
"""how long a session that is closed waits for its ranks to give up the run"""

SILENT_S = 3.0
"""A rank whose watcher has not been heard for so long does not answer; watchers report ten times a second."""


class EngineRanks(Link, Ranks):
    """`patience`: seconds without a session after which engines of a cluster that dinfer started end themselves;
    `take`: also take engines that another process's session holds. Raises ClusterTaken."""

    def __init__(self, cluster: Cluster, patience: float, *, take: bool = False) -> None:
        self.cluster = cluster
        self._patience = patience
        self._me, self._take_held = own_holder(), take
        if not take:
            found = cluster.call(None, "dinfer.rank.kernel:holder", timeout=START_S)
            holders = {rank: one and msgspec.convert(one, Holder) for rank, one in enumerate(found)}
            check_free(holders, self._me, cluster.known.name)
        here = own_loopback()
        away = [facts.address for facts in cluster.facts if facts.loopback != here]
        super().__init__(cluster.n, own_address_towards(away[0]) if away else LOOPBACK)
        try:
            self._start(range(cluster.n))
            self._meet_at = self._address_for_all()
        except BaseException:
            super().close()
            raise

    def describe(self) -> str:
        gpus = sum({facts.host: facts.cuda for facts in self.cluster.facts}.values())
        return f"{self.cluster.describe()}; {f'{gpus} GPUs' if gpus else 'no GPU, so CPUs'}"

    def exits(self) -> list[int | None]:
        gone = [state.gone or not self.cluster.alive(rank) for rank, state in enumerate(self.ranks)]
        return [LOST if is_gone else None for is_gone in gone]

    def cores(self) -> list[int]:
        hosts = [facts.host for facts in self.cluster.facts]
        return [hosts.count(host) for host in hosts]

    def meeting(self) -> StoreAddress:
        return StoreAddress(self._meet_at, 0)

    def silent(self) -> list[int]:
        """Ranks whose process has been stopped for a while, or whose watcher has not been heard lately."""
        now = time.monotonic()
        return [
            rank
            for rank, state in enumerate(self.ranks)
            if now - (state.stopped or now) > STOPPED_S or now - state.heard > SILENT_S
        ]

    def in_cells(self, among: Sequence[int], patience: float) -> list[int]:
        calls = {rank: self.cluster.call_async(rank, "dinfer.rank.kernel:holder") for rank in among}
        wait_until(lambda: all(call.done() for call in calls.values()), patience)
        return [rank for rank, call in calls.items() if not call.done()]

    def interrupt(self, rank: int) -> None:
        self.cluster.interrupt(rank)

    def kill(self, rank: int) -> None:
        self.cluster.kill(rank)

    def revive(self, rank: int) -> None:
        self.cluster.respawn(rank)
        self.reset(rank)
        self._start([rank])

    def listen_for_debugger(self, rank: int, port: int) -> tuple[str, int]:
        call = "dinfer.rank.kernel:listen_for_debugger"
        return self.cluster.facts[rank].host, self.cluster.call(rank, call, port, timeout=START_S)[0]

    def identities(self) -> frozenset[Any]:
        return frozenset(facts.process for facts in self.cluster.facts)

    def leave(self) -> None:
        super().close()
        self.cluster.leave()

    def watch(self, folder: str, *, compare: bool = False) -> None:
        if len(hosts := {facts.host for facts in self.cluster.facts}) > 1:
            raise NotPossible(
                f"the engines are on {len(hosts)} hosts, and records are read on one: start programs there with "
                "DINFER_WATCH=folder, and give `dinfer explain` the folders."
            )
        self.cluster.call(None, "dinfer.rank.kernel:watch", folder, compare, timeout=START_S)

    def close(self) -> None:
        if taken_over(self.ranks):
            self.leave()
            return
        if not self.cluster.started_by_us:
            living = [rank for rank, code in enumerate(self.exits()) if code is None]
            answers(self, dict.fromkeys(living, EndPrompt()), END_S)  # the weights stay
        super().close()
        self.cluster.close()

    def _address_for_all(self) -> str:
        """Rank 0's address, as the others reach it."""
        first, *others = self.cluster.facts
        away = [facts.address for facts in others if facts.loopback != first.loopback]
        if not away:
            return LOOPBACK
        # An engine beside the controller may know it by its loopback address, which no other host reaches.
        outside = [address for address in away if not address.startswith("127.")]
        call = "dinfer.transport.interface:own_address_towards"
        return str(self.cluster.call(0, call, outside[0], timeout=START_S)[0]) if outside else first.address

    def _start(self, ranks: Iterable[int]) -> None:
        # Its number means another process to a rank on another machine.
        controller = self.cluster.controller_pid if self.cluster.facts[0].process.is_here else None
        calls = {}
        for rank in ranks:
            rule = OrphanRule("pause", PAUSE_S)  # what its watcher does once this process is gone
            if self.cluster.started_by_us:
                rule = OrphanRule("end", self._patience, (controller,) if rank == 0 and controller else ())
            link = msgspec.structs.replace(self.job_part(rank, orphan=rule), holder=self._me)
            calls[rank] = self.cluster.call_async(
                rank, "dinfer.rank.kernel:start", msgspec.to_builtins(link), self.world_size, self._take_held
            )
        for call in calls.values():
            call.result(START_S)
        with self.changed:
            if not self.changed.wait_for(lambda: all(self.ranks[rank].heard for rank in calls), START_S):
                silent = [rank for rank in calls if not self.ranks[rank].heard]
                raise NoAnswer(
                    f"nothing came from {rank_spans_text(silent)} within {START_S:g} s: can its host reach "
                    f"{self.endpoint} on {socket.gethostname()}?"
                )
