"""Link: a session's socket to the watchers of all its ranks.

One ROUTER socket, encrypted and authenticated by CurveZMQ: it accepts only who holds this session's keys, which each
rank gets with its job. ZeroMQ knows a rank's watcher as `rank N`. One thread receives all reports; whoever waits for
one waits on the condition `changed`.
"""

import threading
import time
from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator

from dinfer.cluster.ranks import RankRefused, RankStates, taken_over
from dinfer.messages import (
    Beat,
    ClockAnswer,
    Command,
    Failed,
    OrphanRule,
    RankLink,
    Status,
    UnknownMessage,
    pack_command,
    unpack_report,
)
from dinfer.rank.process import clock_name
from dinfer.trace.clocks import HostClock
from dinfer.trace.recorder import unpack_records

BEAT_S = 1.0

QUICK_BEAT_S = 0.05

READINGS = 8
"""how often a clock that is not this process's is read at once, so that a short run finds it known"""


class Link(RankStates):
    """Opens the socket at once. `job_part(rank)` is what a rank needs to reach it."""

    def __init__(self, world_size: int, address: str = "127.0.0.1") -> None:
        super().__init__(world_size)
        self._closing = False
        self._clocks: dict[str, HostClock] = {}
        """those of other hosts, by name"""
        self._quick_beats = 0
        """how often they are still to be read at once"""
        self._context = zmq.Context()
        self._public, self._secret = zmq.curve_keypair()
        self._rank_public, self._rank_secret = zmq.curve_keypair()
        self._keeper = ThreadAuthenticator(self._context)
        self._keeper.start()
        self._keeper.configure_curve_callback(credentials_provider=self)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a rank that is started again keeps its name
        self._socket.curve_server = True
        self._socket.curve_publickey, self._socket.curve_secretkey = self._public, self._secret
        try:
            self.endpoint = f"tcp://{address}:{self._socket.bind_to_random_port(f'tcp://{address}')}"
        except BaseException:
            self._keeper.stop()
            self._context.destroy(linger=0)
            raise
        self._outbox: zmq.Socket[bytes] = self._context.socket(zmq.PAIR)
        self._outbox.bind("inproc://outbox")
        self._send_lock = threading.Lock()
        self._thread = threading.Thread(target=self._serve, name="dinfer link", daemon=True)
        self._thread.start()

    def callback(self, domain: str, key: bytes) -> bool:  # noqa: ARG002 - zmq calls it so
        """Whether this public key may connect; zmq's authenticator asks."""
        return key == self._rank_public

    def job_part(
        self, rank: int, *, launcher: int = 0, joined: bool = False, orphan: OrphanRule | None = None
    ) -> RankLink:
        """What a rank needs to find this link; the parameters are RankLink's."""
        keys = self._public.decode(), self._rank_public.decode(), self._rank_secret.decode()
        clock = clock_name()
        return RankLink(
            rank, self.endpoint, *keys, launcher=launcher, joined=joined, orphan=orphan, clock=clock
        )

    def _send(self, rank: int, command: Command[Any], number: int) -> None:
        frames = [b"rank %d" % rank, pack_command(command, number)]
        with self._send_lock:
            if self._closing:
                raise RankRefused(taken_over(self.ranks) or "the session has left its ranks: it is closed")
            self._outbox.send_multipart(frames)

    def close(self) -> None:
        """End the thread and free the sockets. No error where that is done already."""
        with self._send_lock:
            if self._closing:
                return
            self._closing = True
        self._thread.join(5)
        self._keeper.stop()
        self._context.destroy(linger=0)

    def _serve(self) -> None:
        inbox: zmq.Socket[bytes] = self._context.socket(zmq.PAIR)
        inbox.connect("inproc://outbox")
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(inbox, zmq.POLLIN)
        beat = 0.0
        while not self._closing:
            ready = dict(poller.poll(50))
            if inbox in ready:
                self._socket.send_multipart(inbox.recv_multipart())
            if self._socket in ready:
                self._take(self._socket.recv_multipart())
            if time.monotonic() - beat > (QUICK_BEAT_S if self._quick_beats else BEAT_S):
                beat, self._quick_beats = time.monotonic(), max(0, self._quick_beats - 1)
                for rank in range(len(self.ranks)):
                    beating = pack_command(Beat(time.monotonic_ns()), 0)
                    self._socket.send_multipart([b"rank %d" % rank, beating])
        inbox.close()

    def _take(self, frames: list[bytes]) -> None:
        came = time.monotonic_ns()
        sender, *message = frames
        rank = int(sender.removeprefix(b"rank "))
        try:
            report = unpack_report(message)
        except UnknownMessage as unknown:
            report = Failed(f"rank {rank} has another version of dinfer than this session: unknown {unknown}")
        if isinstance(report, ClockAnswer):
            if report.clock not in self._clocks:
                self._clocks[report.clock], self._quick_beats = HostClock(), READINGS
            clock = self._clocks[report.clock]
            clock.note(report.sent, report.received, report.answered, came)
            self.ranks[rank].clock = clock
        records = report.records if isinstance(report, Status) else b""
        self.take(rank, report, unpack_records(records, rank, self.ranks[rank].lanes) if records else ())
