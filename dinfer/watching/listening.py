"""A watched job on several hosts: each host sends what its processes record to one, where the verdict is told.

The host that listens (`dinfer watch --listen PORT -- …`) names an address with a key. Each other host joins it
(`dinfer watch --join ADDRESS:PORT/KEY -- …`, see `joining`), runs its part of the job, and sends its files as they grow
(`mirror`) and how its processes live, which only it can see (`signs.ProcessPulse`). It is asked for stacks, and told
the verdicts. Here are the messages, and the side that listens.

What is sent is encrypted (CurveZMQ). Only who knows the key, which is made anew for each job, can join.
"""

import re
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
import zmq
from zmq.utils import z85

from dinfer.errors import DinferError
from dinfer.version import __version__
from dinfer.watch.probe.records import VERSION, WatchedProcess
from dinfer.watching.folder import Folder
from dinfer.watching.mirror import FilePiece, Mirror, MirrorError
from dinfer.watching.signs import ProcessPulse

SILENT_S = 5.0
"""a host of which nothing has been heard for so long may be gone"""

ENDS_S = 10.0
"""for so long the listening host waits for the others to end, once its own part of the job has"""

POLL_MS = 50


class JoinError(DinferError, ValueError):
    """An address that is none, at which nobody listens, or that cannot be listened at."""


# -- messages


class Joins(msgspec.Struct, frozen=True, tag=True):
    """A host joins: its name, the version of its records, and of its dinfer."""

    host: str
    records: int
    version: str


class NewPieces(msgspec.Struct, frozen=True, tag=True):
    """What is new in its files."""

    pieces: list[FilePiece]


class ProcessLife(msgspec.Struct, frozen=True, tag=True):
    """How a process lives, by the name of its files. Seconds are ages: since it was seen to have vanished, to be
    stopped, to run Python. None: not so, or unknown."""

    name: str
    gone_s: float | None
    stopped_s: float | None
    cpu_moves: bool | None
    polls: bool
    beat_s: float | None


class ProcessLives(msgspec.Struct, frozen=True, tag=True):
    lives: list[ProcessLife]


class PartEnded(msgspec.Struct, frozen=True, tag=True):
    """The host's part of the job has ended, and all of its files are sent."""

    status: int


class HostWelcome(msgspec.Struct, frozen=True, tag=True):
    """`refused`: why the host cannot join; "" if it has."""

    refused: str = ""


class StacksWanted(msgspec.Struct, frozen=True, tag=True):
    """Have the process of these files write where its threads stand; `dump`: by a signal, if Python does not answer."""

    name: str
    dump: bool


class VerdictTold(msgspec.Struct, frozen=True, tag=True):
    text: str


class AllSeen(msgspec.Struct, frozen=True, tag=True):
    """The end of the host's part has arrived; `is_whole`: and all before it could be written."""

    is_whole: bool


FromHost = Joins | NewPieces | ProcessLives | PartEnded
ToHost = HostWelcome | StacksWanted | VerdictTold | AllSeen

encode = msgspec.msgpack.Encoder().encode
_from_host: "msgspec.msgpack.Decoder[FromHost]" = msgspec.msgpack.Decoder(FromHost)


# -- the host that listens


@dataclass
class DistantPulse(ProcessPulse):
    """How a process of another host lives, as that host has said it last."""

    said: ProcessLife | None = None
    _gone_at_look: bool = False

    def take(self, said: ProcessLife) -> None:
        now = time.monotonic()
        self.said, self.seen_ns = said, time.time_ns()
        if self.gone is None and said.gone_s is not None:
            self.gone = now - said.gone_s
        self.stopped_since = None if said.stopped_s is None else now - said.stopped_s

    def look(self, now: float) -> None:  # noqa: ARG002 - its own host has looked
        self._gone_at_look = self.gone is not None

    def has_gone(self) -> bool:
        return self.gone is not None and not self._gone_at_look

    @property
    def is_followed(self) -> bool:
        return self.said is not None

    @property
    def cpu_moves(self) -> bool | None:
        return self.said.cpu_moves if self.said else None

    @property
    def polls(self) -> bool:
        return self.said is not None and self.said.polls

    def beat_s(self, watched: WatchedProcess, now_ns: int | None) -> float | None:  # noqa: ARG002 - by its own host's clock
        return self.said.beat_s if self.said and now_ns is not None else None


class HostFolder(Folder):
    """The files of a host that has joined, copied here. `status`: of its part of the job, once that has ended."""

    def __init__(self, host: str, mirror: Mirror, ask: Callable[[StacksWanted], None]) -> None:
        super().__init__(mirror.folder)
        self.host, self.mirror, self._ask = host, mirror, ask
        self.heard = time.monotonic()
        self.status: int | None = None
        self.trouble = ""
        """why a part of its records could not be written, once one could not"""
        self._pulses: dict[str, DistantPulse] = {}

    def take(self, lives: list[ProcessLife]) -> None:
        for one in lives:
            self._pulses.setdefault(one.name, DistantPulse(None)).take(one)

    def pulse_of(self, process: WatchedProcess) -> DistantPulse:
        return self._pulses.setdefault(process.name, DistantPulse(None))

    def ask_stacks(self, process: WatchedProcess) -> None:
        self._ask(StacksWanted(process.name, dump=False))

    def dump(self, process: WatchedProcess) -> bool:
        self._ask(StacksWanted(process.name, dump=True))
        return True

    @property
    def is_silent(self) -> bool:
        return self.status is None and time.monotonic() - self.heard > SILENT_S

    def note(self) -> str:
        if self.trouble:
            return f"records of host {self.host} are missing: {self.trouble}"
        if not self.is_silent:
            return ""
        return f"nothing has been heard of host {self.host} for some seconds: it, or its network, may be down"


class Listener:
    """Listens for the other hosts of a job. `at`: PORT or ADDRESS:PORT, 0 for any free port; `on_join`: called with the
    name of each host that joins."""

    def __init__(self, folder: Path, at: str, on_join: Callable[[str], None] = lambda _: None) -> None:
        """Raises JoinError where that is no address, or cannot be listened at."""
        address, _, given = at.rpartition(":")
        if not (given.isdecimal() and int(given) < 65536):
            raise JoinError(f"--listen is {at!r}; it must be a port, or ADDRESS:PORT with one of this host.")
        address, port = address.strip("[]"), int(given)
        self._folder, self._on_join = folder, on_join
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 1000
        public, secret = zmq.curve_keypair()
        self._socket.curve_server = True
        self._socket.curve_publickey, self._socket.curve_secretkey = public, secret
        try:
            if ":" in address:
                self._socket.ipv6 = True
            self._socket.bind(f"tcp://{f'[{address}]' if ':' in address else address or '*'}:{port or '*'}")
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            where = f"port {port}" + (f" of {address}" if address else "")
            raise JoinError(f"cannot listen at {where}: {error.strerror}. Give a free port.") from None
        found = str(self._socket.getsockopt_string(zmq.LAST_ENDPOINT)).rpartition(":")[2]
        self.address = f"{address or socket.gethostname()}:{found}/{z85.decode(public).hex()}"
        """what the others join"""
        self.hosts: list[HostFolder] = []
        self._by_identity: dict[bytes, HostFolder] = {}
        self._outbox: deque[tuple[bytes, ToHost]] = deque()
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._serve, name="dinfer hosts", daemon=True)
        self._thread.start()

    def tell(self, text: str) -> None:
        """Tell all hosts a verdict."""
        self._outbox += [(identity, VerdictTold(text)) for identity in list(self._by_identity)]

    def wait_for_ends(self, seconds: float = ENDS_S) -> None:
        """Wait until the parts of all hosts have ended, of those that are still heard."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while (left := deadline - time.monotonic()) > 0 and any(
                host.status is None and not host.is_silent for host in self.hosts
            ):
                self._changed.wait(min(left, 0.2))

    def close(self) -> None:
        self._closing = True
        self._thread.join(5)
        self._context.destroy(linger=1000)

    def _serve(self) -> None:
        while not self._closing or self._outbox:
            while self._outbox:
                identity, message = self._outbox.popleft()
                with suppress(zmq.ZMQError):  # that host has gone
                    self._socket.send_multipart([identity, encode(message)], zmq.NOBLOCK)
            if self._socket.poll(POLL_MS):
                identity, *frames = self._socket.recv_multipart()
                try:
                    self._take(identity, _from_host.decode(b"".join(frames)))
                except (msgspec.DecodeError, MirrorError, OSError) as error:
                    if host := self._by_identity.get(identity):
                        host.trouble = str(error)

    def _take(self, identity: bytes, message: FromHost) -> None:
        host = self._by_identity.get(identity)
        if isinstance(message, Joins):
            self._outbox.append((identity, HostWelcome("" if host else self._join(identity, message))))
            return
        if host is None:
            return
        host.heard = time.monotonic()
        match message:
            case NewPieces(pieces):
                for piece in pieces:
                    host.mirror.write(piece)
            case ProcessLives(lives):
                host.take(lives)
            case PartEnded(status):
                self._outbox.append((identity, AllSeen(not host.trouble)))
                with self._changed:
                    host.status = status
                    self._changed.notify_all()

    def _join(self, identity: bytes, message: Joins) -> str:
        """Why the host cannot join; "" once it has."""
        if message.records != VERSION:
            return f"it has dinfer {message.version}, here is {__version__}: their records differ"
        name = re.sub(r"[^\w.-]", "_", message.host, flags=re.ASCII)[:100]
        mirror = Mirror(self._folder / f"host{len(self.hosts) + 1}-{name}")

        def ask(wanted: StacksWanted) -> None:
            self._outbox.append((identity, wanted))

        host = HostFolder(message.host, mirror, ask)
        self._by_identity[identity] = host
        self.hosts.append(host)
        self._on_join(message.host)
        return ""
