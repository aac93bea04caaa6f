"""Runs this host's part of a job that is watched on another host; see `listening`."""

import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import msgspec
import zmq
from zmq.utils import z85

from dinfer.version import __version__
from dinfer.watch.probe.records import VERSION, RecordsError, WatchedProcess
from dinfer.watching.command import exit_status, start
from dinfer.watching.folder import FolderHere
from dinfer.watching.listening import (
    ENDS_S,
    AllSeen,
    FromHost,
    HostWelcome,
    JoinError,
    Joins,
    NewPieces,
    PartEnded,
    ProcessLife,
    ProcessLives,
    StacksWanted,
    ToHost,
    VerdictTold,
    encode,
)
from dinfer.watching.mirror import Changes
from dinfer.watching.signs import ProcessPulse, pulse_of

TICK_S, SHARE, MOST_S = 0.25, 0.05, 1.0
"""seconds between two looks; the part of the time that they may take, and the longest rest"""

PATIENCE_S = 60.0
"""for so long the other host may still be starting to listen"""

_to_host: "msgspec.msgpack.Decoder[ToHost]" = msgspec.msgpack.Decoder(ToHost)


class JoinedCommand:
    """A command whose processes are judged on the host at `address`. `on_verdict`: called with each verdict that is
    told there."""

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        address: str,
        *,
        on_verdict: Callable[[str], None],
        environment: Mapping[str, str] | None = None,
        starting: AbstractContextManager[object] | None = None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """Joins, then starts it. Raises JoinError, OSError."""
        self._joined = Joined(address, folder, on_verdict, patience_s)
        try:
            self.process: subprocess.Popen[bytes] = start(command, folder, environment, starting=starting)
        except BaseException:
            self._joined.end(1)
            raise

    def wait(self) -> tuple[int, bool]:
        """Its exit status, as a shell has it, and whether all that was recorded has arrived at the other host."""
        status = exit_status(self.process.wait())
        return status, self._joined.end(status)


def parsed_address(text: str) -> tuple[str, bytes]:
    """The endpoint and key of ADDRESS:PORT/KEY. Raises JoinError."""
    place, slash, key = text.rpartition("/")
    host, colon, port = place.rpartition(":")
    if not (slash and colon and host and port.isdecimal() and 0 < int(port) < 65536):
        raise JoinError(
            f"--join is {text!r}; it must be ADDRESS:PORT/KEY, as `dinfer watch --listen PORT` prints it on the "
            "host that listens."
        )
    try:
        public = z85.encode(bytes.fromhex(key))
    except ValueError:
        public = b""
    if len(public) != 40:
        raise JoinError(
            f"the key in --join has {len(key)} characters, {key[:8]}…; it has 64, 0–9 and a–f: copy it whole from "
            "what `dinfer watch --listen PORT` prints."
        )
    return f"tcp://{host}:{port}", public


class Joined:
    """The connection of a host that joins; `on_verdict` is called with each verdict that is told there."""

    def __init__(
        self, address: str, folder: Path, on_verdict: Callable[[str], None], patience_s: float
    ) -> None:
        """Raises JoinError where nobody welcomes this host within `patience_s` seconds."""
        endpoint, public = parsed_address(address)
        self._folder, self._on_verdict = FolderHere(folder), on_verdict
        self._changes = Changes(folder)
        self._pulses: dict[str, ProcessPulse] = {}
        self._closing, self._all_seen, self._is_whole = threading.Event(), False, False
        self._flags = int(zmq.NOBLOCK)
        """of what is sent: while the job runs, what does not go at once is sent later"""
        self._context = zmq.Context()
        self._socket: Any = self._context.socket(zmq.DEALER)
        self._socket.linger, self._socket.sndhwm = 2000, 100
        self._socket.ipv6 = True
        own_public, own_secret = zmq.curve_keypair()
        self._socket.curve_serverkey = public
        self._socket.curve_publickey, self._socket.curve_secretkey = own_public, own_secret
        try:
            self._socket.connect(endpoint)
            self._meet(endpoint, patience_s)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise JoinError(f"cannot connect to {endpoint}: {error.strerror}.") from None
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self._thread = threading.Thread(target=self._serve, name="dinfer host", daemon=True)
        self._thread.start()

    def _meet(self, endpoint: str, patience_s: float) -> None:
        self._send(Joins(socket.gethostname(), VERSION, __version__))
        if not self._socket.poll(int(patience_s * 1000)):
            raise JoinError(
                f"nobody has answered at {endpoint.removeprefix('tcp://')} for {patience_s:.0f} s: start "
                "`dinfer watch --listen PORT -- …` there, and check address, port, key and firewall."
            )
        answer = _to_host.decode(self._socket.recv())
        if isinstance(answer, HostWelcome) and answer.refused:
            raise JoinError(f"{endpoint.removeprefix('tcp://')} refuses this host: {answer.refused}.")

    def end(self, status: int, seconds: float = ENDS_S) -> bool:
        """The part of the job here has ended: send the rest. Whether all has arrived."""
        self._closing.set()
        self._thread.join(5)
        self._flags, self._socket.sndtimeo = 0, int(seconds * 1000)
        try:
            with suppress(zmq.ZMQError):
                self._look()
                self._send(PartEnded(status))
                deadline = time.monotonic() + seconds
                while not self._all_seen and (left := deadline - time.monotonic()) > 0:
                    self._hear(min(left, 0.2))
        finally:
            self._context.destroy(linger=0)
        return self._all_seen and self._is_whole

    def _serve(self) -> None:
        rest = TICK_S
        while not self._closing.is_set():
            self._hear(rest)
            began = time.monotonic()
            with suppress(zmq.ZMQError):  # what could not be sent is sent by the next look
                self._look()
            rest = min(MOST_S, max(TICK_S, (time.monotonic() - began) / SHARE))

    def _hear(self, seconds: float) -> None:
        """What the listening host says within so many seconds; returns at the first."""
        if not self._socket.poll(int(seconds * 1000)):
            return
        while self._socket.poll(0):
            match _to_host.decode(self._socket.recv()):
                case StacksWanted(name, dump):
                    for process in self._processes():
                        if process.name == name:
                            self._write_stacks(process, dump=dump)
                case VerdictTold(text):
                    self._on_verdict(text)
                case AllSeen(is_whole):
                    self._all_seen, self._is_whole = True, is_whole

    def _processes(self) -> list[WatchedProcess]:
        """Those that can be read; none where the folder cannot be."""
        try:
            return self._folder.read()
        except RecordsError:
            return []

    def _write_stacks(self, process: WatchedProcess, *, dump: bool) -> None:
        with suppress(RecordsError):  # it is just ending
            if dump:
                self._folder.dump(process)
            else:
                self._folder.ask_stacks(process)

    def _look(self) -> None:
        """Send what is new in the files, and how the processes live."""
        for piece in self._changes.pieces():
            self._send(NewPieces([piece]))
        lives = list(self._lives())
        if lives or not self._pulses:
            self._send(ProcessLives(lives))

    def _lives(self) -> Iterator[ProcessLife]:
        now, now_ns = time.monotonic(), time.time_ns()
        for process in self._processes():
            pulse = self._pulses.get(process.name)
            if pulse is None:
                pulse = self._pulses[process.name] = pulse_of(process)
            pulse.look(now)
            yield ProcessLife(
                process.name,
                None if pulse.gone is None else max(0.0, now - pulse.gone),
                None if pulse.stopped_since is None else now - pulse.stopped_since,
                pulse.cpu_moves,
                pulse.polls,
                pulse.beat_s(process, now_ns),
            )

    def _send(self, message: FromHost) -> None:
        self._socket.send(encode(message), self._flags)
