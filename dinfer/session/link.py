"""Link: the session's end of the lines to all ranks' watchers.

One ROUTER socket, encrypted and authenticated (CurveZMQ): it accepts nobody who does not hold this session's
keys, which ranks get with their job. A thread keeps the newest state of each rank; everything else waits on one
condition.
"""

import itertools
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator

from dinfer.engine.board import Stand
from dinfer.engine.control import Message, stand_of
from dinfer.trace.events import Event
from dinfer.trace.recorder import unpack_records

BEAT_S = 1.0
ASK_S = 0.2
"""how often someone who waits for an answer looks whether the run can still go on"""


@dataclass
class RankState:
    """What is known of one rank. Times are this process's monotonic seconds."""

    stand: Stand | None = None
    phase: str = "starting"
    decoded: int = 0
    process: str | None = None
    cpu_s: float | None = None
    heard: float = 0.0
    progressed: float = field(default_factory=time.monotonic)
    gone: bool = False
    lanes: tuple[str, ...] = ()
    events: list[Event] = field(default_factory=list)
    reports: dict[str, Message] = field(default_factory=dict)


class Link:
    """Opens the socket at once; `job_part(rank)` is what a rank's Control needs to find it."""

    def __init__(self, world_size: int, address: str = "127.0.0.1") -> None:
        self.ranks = [RankState() for _ in range(world_size)]
        self.changed = threading.Condition()
        self._texts: list[str] = []
        self._replies: dict[int, Message] = {}
        self._ids = itertools.count(1)
        self._closing = False
        self._context = zmq.Context()
        self._public, self._secret = zmq.curve_keypair()
        self._rank_public, self._rank_secret = zmq.curve_keypair()
        self._keeper = ThreadAuthenticator(self._context)
        self._keeper.start()
        self._keeper.configure_curve_callback(credentials_provider=self)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.curve_server = True
        self._socket.curve_publickey, self._socket.curve_secretkey = self._public, self._secret
        self.endpoint = f"tcp://{address}:{self._socket.bind_to_random_port(f'tcp://{address}')}"
        self._outbox: zmq.Socket[bytes] = self._context.socket(zmq.PAIR)
        self._outbox.bind("inproc://outbox")
        self._send_lock = threading.Lock()
        self._thread = threading.Thread(target=self._serve, name="dinfer link", daemon=True)
        self._thread.start()

    def callback(self, domain: str, key: bytes) -> bool:  # noqa: ARG002 - zmq calls it so
        """Asked by zmq's authenticator: whether this public key may connect."""
        return key == self._rank_public

    def job_part(self, rank: int, *, launcher: int = 0, joined: bool = False) -> Message:
        """What a rank needs to find this link. `launcher`: the process without which it should not go on;
        `joined`: another launcher looks after the process, but a rank that hears nothing from here ends itself."""
        return {
            "rank": rank,
            "endpoint": self.endpoint,
            "server_key": self._public.decode(),
            "public_key": self._rank_public.decode(),
            "secret_key": self._rank_secret.decode(),
            "launcher": launcher,
            "joined": joined,
        }

    def send(self, rank: int, do: str, **fields: Any) -> int:
        """Command one rank; the id under which its reply will come."""
        number = next(self._ids)
        with self._send_lock:
            self._outbox.send_multipart(
                [f"rank {rank}".encode(), json.dumps({"do": do, "id": number, **fields}).encode()]
            )
        return number

    def ask(
        self, requests: dict[int, Message], timeout: float, check: Callable[[], None] = lambda: None
    ) -> dict[int, Message]:
        """Send one command to each of these ranks, together; their answers.

        `check()` is called while waiting, and may raise. Raises TimeoutError, or RuntimeError for a rank that refuses.
        """
        deadline = time.monotonic() + timeout
        ids = {rank: self.send(rank, **message) for rank, message in requests.items()}
        while not self._answered(ids):
            check()
            if time.monotonic() > deadline:
                silent = [rank for rank, number in ids.items() if number not in self._replies]
                raise TimeoutError(f"no answer from rank {', '.join(map(str, silent))} within {timeout:g} s")
        answers = {rank: self._replies.pop(number) for rank, number in ids.items()}
        for rank, answer in answers.items():
            if "error" in answer:
                raise RuntimeError(f"rank {rank}: {answer['error']}")
        return answers

    def new_texts(self) -> list[str]:
        """The pieces of generated text that have come since the last call."""
        with self.changed:
            texts, self._texts = self._texts, []
            return texts

    def close(self) -> None:
        self._closing = True
        self._thread.join(5)
        self._keeper.stop()
        self._context.destroy(linger=0)

    def _answered(self, ids: dict[int, int]) -> bool:
        """Whether all these replies are there; waits a little for the next message if not."""
        with self.changed:
            return self.changed.wait_for(lambda: all(n in self._replies for n in ids.values()), ASK_S)

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
            if time.monotonic() - beat > BEAT_S:
                beat = time.monotonic()
                for rank in range(len(self.ranks)):
                    self._socket.send_multipart([f"rank {rank}".encode(), b'{"do": "beat"}'])
        inbox.close()

    def _take(self, frames: list[bytes]) -> None:
        message = json.loads(frames[2])
        state = self.ranks[message["rank"]]
        with self.changed:
            state.heard = time.monotonic()
            match message["type"]:
                case "state":
                    _update(state, message)
                case "events":
                    state.events += unpack_records(frames[3], message["rank"], state.lanes)
                case "lanes":
                    state.lanes = tuple(message["lanes"])
                case "reply":
                    self._replies[message["id"]] = message
                case "text":
                    self._texts.append(message["text"])
                case "gone":
                    state.gone = True
                case kind:
                    state.reports[kind] = message
            self.changed.notify_all()


def _update(state: RankState, message: Message) -> None:
    stand = stand_of(message)
    if (stand, message["phase"], message["decoded"]) != (state.stand, state.phase, state.decoded):
        state.progressed = state.heard
    state.stand, state.phase, state.decoded = stand, message["phase"], message["decoded"]
    state.process, state.cpu_s = message["process"], message["cpu_s"]
