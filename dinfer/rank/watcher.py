"""Watcher: a small process beside each rank that says where the rank stands when the rank itself cannot.

It reads the rank's board and recorder from shared memory and publishes them, passes commands in and reports
out, and goes on while the rank is busy in C code, stopped, or killed. It ends with its rank; a rank whose client
is gone it ends too, or pauses, as the client has asked. No torch here: it starts in a fraction of a second.
"""

import contextlib
import json
import os
import signal
import socket
import sys
from time import monotonic
from typing import Any, NamedTuple

import zmq
from zmq.utils.monitor import recv_monitor_message

from dinfer.engine.board import BOARD_BYTES, Board, Stand, map_file
from dinfer.rank import pyspy
from dinfer.rank.runnable import Wanting
from dinfer.rank.stacks import dump_of, named
from dinfer.trace.recorder import Recorder

TICK_MS = 80
"""A tick costs about as much CPU as a small op, on every rank."""

FAST_TICK_MS = 1

FAST_FOR_S = 0.1
"""For so long after a command somebody waits for what it does: ticks are fast."""

BEAT_S = 0.07
"""At least ten times a second it is heard, whatever the rank does."""

RECORDER_BYTES = 4 << 20

MEMORY_BYTES = BOARD_BYTES + RECORDER_BYTES

ORPHAN_S = 10.0

LIFE_S = 0.5
"""How often the system is asked how the rank's process is, which takes longer than all the rest of a tick."""

DUMP_S = 1.0
"""How long a rank may take to write its stacks; meanwhile the watcher publishes nothing."""

Message = dict[str, Any]


class Life(NamedTuple):
    """A process's state letter, CPU seconds and bytes in memory."""

    state: str
    cpu_s: float
    memory: int


def sign_of_life(pid: int) -> Life | None:
    """From /proc (Linux); None where there is no telling."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            words = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    cpu_s = (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
    return Life(words[0], cpu_s, int(words[21]) * os.sysconf("SC_PAGE_SIZE"))


class Watcher:
    """`rank_end` is a socket to the rank, `client` one to the session. Both carry JSON objects."""

    def __init__(
        self,
        rank: int,
        memory: memoryview,
        rank_end: socket.socket,
        client: "zmq.Socket[bytes]",
        link: Message,
    ) -> None:
        self._rank, self._memory, self._rank_end, self._client = rank, memory, rank_end, client
        self._rank_pid = os.getppid()
        self._launcher, self._joined = link["launcher"], link["joined"]
        self._orphan = link.get("orphan")
        self._dump: int | None = link["dump"]
        self._lost_client_at: float | None = monotonic()  # it may be gone before it was ever reached
        self._connection = client.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self._board = Board(memory)
        self._recorder: Recorder | None = None
        self._cursor: list[int] = []
        self._lanes = 0
        self._threads: list[tuple[int, str]] = []
        self._looks: list[tuple[int, pyspy.Look]] = []
        self._last_state: object = None
        self._life_at = 0.0
        self._life: Life | None = None
        self._under_way = set[tuple[int, int]]()
        self._wanting, self._wants_cpu = Wanting(self._rank_pid), 0.0
        self._last_beat = 0.0
        self._unread = bytearray()
        self._client_heard = self._commanded = monotonic()

    def run(self) -> None:
        """Until the rank is gone."""
        poller = zmq.Poller()
        poller.register(self._client, zmq.POLLIN)
        poller.register(self._rank_end, zmq.POLLIN)
        alive = True
        while alive:
            fast = monotonic() - self._commanded < FAST_FOR_S
            ready = dict(poller.poll(FAST_TICK_MS if fast else TICK_MS))
            if self._client in ready:
                self._commands()
            if self._rank_end.fileno() in ready:
                alive = self._reports()
            alive = alive and os.getppid() == self._rank_pid
            self._publish(last=not alive)
            self._tell_seen()
            self._look_after_orphan()
        for _, look in self._looks:
            look.end()
        self._say({"type": "gone"})
        self._connection.close()

    def _commands(self) -> None:
        while self._client.poll(0):
            command = self._client.recv()
            self._client_heard = monotonic()
            message = json.loads(command)
            if message["do"] == "kill":
                self._kill()
            elif message["do"] == "dump":
                text = "" if self._dump is None else dump_of(self._rank_pid, self._dump, DUMP_S)
                self._say({"type": "reply", "id": message["id"], "text": named(text, self._threads)})
            elif message["do"] == "spy":
                self._spy(message["id"])
            elif message["do"] != "beat":
                self._commanded = monotonic()
                self._pass_on(command)

    def _spy(self, number: int) -> None:
        """Have py-spy look, if it is there; what it sees is told once it has ended."""
        life = sign_of_life(self._rank_pid)
        if spy := pyspy.program():
            stopped = life is not None and life.state in "Tt"
            self._looks.append((number, pyspy.Look(spy, self._rank_pid, stopped=stopped)))
        else:
            self._say({"type": "reply", "id": number, "threads": []})

    def _tell_seen(self) -> None:
        for one in list(self._looks):
            number, look = one
            if (threads := look.threads()) is not None:
                self._looks.remove(one)
                self._say({"type": "reply", "id": number, "threads": threads})

    def _pass_on(self, command: bytes) -> None:
        with contextlib.suppress(OSError):
            self._rank_end.sendall(command + b"\n")

    def _reports(self) -> bool:
        """Pass on what the rank says; False once it is gone."""
        try:
            data = self._rank_end.recv(1 << 16)
        except OSError:
            return False
        self._unread += data
        for line in self._whole_lines(since=len(self._unread) - len(data)):
            message = json.loads(line)
            if message["type"] == "lanes":
                self._publish(last=False)  # what the lanes before have left behind
                self._lanes = len(message["lanes"]) - 1
                self._threads = [(ident, name) for ident, name in message["threads"]]
                self._recorder, self._cursor = (
                    Recorder.over(self._rank, message["lanes"], self._memory[BOARD_BYTES:]),
                    [],
                )
            else:
                self._publish(last=True)  # events and positions before the report that builds on them
            self._say(message)
        return bool(data)

    def _whole_lines(self, since: int) -> list[bytes]:
        """Those that have come to their end. Nothing ends before `since`: a long line is not read again and again."""
        end = self._unread.rfind(b"\n", since) + 1
        lines = bytes(self._unread[:end]).split(b"\n")[:-1]
        del self._unread[:end]
        return lines

    def _publish(self, *, last: bool) -> None:
        """What is new, as one message: each costs the rank's core, and wakes the session's process."""
        records = b""
        if self._recorder:
            records, self._cursor = self._recorder.read_records(self._cursor)
        stand = self._board.stand(self._lanes)
        state = (stand, self._board.phase, self._board.decoded)
        beat = monotonic() - self._last_beat > BEAT_S
        if last or beat or records or state != self._last_state:
            self._last_state = state
            if last or beat:
                self._last_beat = monotonic()
            life = self._sign_of_life(stand)
            message = {
                "type": "state",
                "phase": self._board.phase,
                "decoded": self._board.decoded,
                "positions": stand.positions,
                "started": stand.started,
                "limits": stand.limits,
                "process": life and life.state,
                "cpu_s": life and life.cpu_s,
                "wants_cpu": self._wants_cpu,
                "memory": life and life.memory,
                "device_memory": self._board.device_memory,
            }
            self._say(message, *[records] if records else ())

    def _sign_of_life(self, stand: Stand) -> Life | None:
        if monotonic() - self._life_at > LIFE_S:
            before, self._life_at, self._life = self._life, monotonic(), sign_of_life(self._rank_pid)
            # What its threads want counts while something takes long, and takes as long to ask as all the rest.
            under_way = self._under_way_at(stand)
            is_long = bool(under_way & self._under_way)
            self._wanting = self._wanting if is_long else Wanting(self._rank_pid)
            self._wants_cpu = self._wanting.look() if is_long else 0.0
            self._under_way = under_way
            if self._life and before and self._looks and self._life.state == "t":  # py-spy's doing
                self._life = self._life._replace(state=before.state)
        return self._life

    def _under_way_at(self, stand: Stand) -> set[tuple[int, int]]:
        """The ops that have begun, by lane and index, and the token that is being made."""
        lanes = zip(stand.positions, stand.started, strict=True)
        ops = {(lane, position) for lane, (position, started) in enumerate(lanes) if started}
        return ops | ({(-1, self._board.decoded)} if self._board.phase == "decode" else set())

    def _look_after_orphan(self) -> None:
        """A rank that nobody can command or hear any more is ended, or paused, as its client has asked.

        A session's client is gone when its connection is closed and stays so: one that sleeps, a laptop say, keeps it.
        """
        if self._orphan:
            self._note_connection()
            lost_at = self._lost_client_at
            if lost_at is not None and monotonic() - lost_at > self._orphan["patience_s"]:
                self._lost_client_at = None
                self._leave(self._orphan)
            return
        silent = monotonic() - self._client_heard > ORPHAN_S
        if silent and (self._joined or not exists(self._launcher)):
            self._kill()

    def _note_connection(self) -> None:
        while self._connection.poll(0):
            event = recv_monitor_message(self._connection)["event"]
            self._lost_client_at = monotonic() if event == zmq.EVENT_DISCONNECTED else None

    def _leave(self, orphan: Message) -> None:
        if orphan["do"] == "pause":
            self._pass_on(b'{"do": "freeze", "id": 0}')
            return
        for pid in orphan["ends"]:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGTERM)
        self._kill()

    def _kill(self) -> None:
        if os.getppid() == self._rank_pid:
            os.kill(self._rank_pid, signal.SIGKILL)

    def _say(self, message: Message, *frames: bytes) -> None:
        self._client.send_multipart([b"", json.dumps({**message, "rank": self._rank}).encode(), *frames])


def exists(pid: int) -> bool:
    """Whether that process runs; one that has ended and that nobody has waited for does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    life = sign_of_life(pid)
    return life is None or life.state not in "ZX"


def main() -> None:
    """`python -m dinfer.rank.watcher MEMORY_FD SOCKET_FD`; the socket's first line says where."""
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # may go to the whole process group; the watcher ends with its rank
        signal.signal(number, signal.SIG_IGN)
    memory = map_file(int(sys.argv[1]), MEMORY_BYTES)
    rank_end = socket.socket(fileno=int(sys.argv[2]))
    link = json.loads(rank_end.makefile("rb", buffering=0).readline())
    with zmq.Context() as context:
        client: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        client.setsockopt(zmq.LINGER, 2000)
        client.setsockopt(
            zmq.SNDHWM, 0
        )  # never block in send: a watcher whose client is gone must end its rank
        client.setsockopt(zmq.IDENTITY, f"rank {link['rank']}".encode())
        client.curve_serverkey = link["server_key"].encode()
        client.curve_publickey, client.curve_secretkey = (
            link["public_key"].encode(),
            link["secret_key"].encode(),
        )
        client.connect(link["endpoint"])
        Watcher(link["rank"], memory, rank_end, client, link).run()
        client.close()


if __name__ == "__main__":
    main()
