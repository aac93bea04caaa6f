"""Watcher: a small process beside each rank that says where the rank stands when the rank itself cannot.

It reads the rank's board and recorder from shared memory and publishes them, passes commands in and reports
out, and goes on while the rank is busy in C code, stopped, or killed. It ends with its rank; a rank whose session
is gone it ends too, or pauses, as the session has asked. No torch here: it starts in a fraction of a second.
"""

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Sequence
from time import monotonic

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from dinfer.engine.board import BOARD_BYTES, Board, Stand, map_file
from dinfer.messages import (
    Beat,
    DumpStacks,
    Freeze,
    Gone,
    KillRank,
    Lanes,
    OrphanRule,
    RankLink,
    RankReport,
    Reply,
    SpiedThreads,
    SpyOnRank,
    StackDump,
    Status,
    pack_command,
    pack_report,
    tag_of,
    unpack_report,
    unpack_request,
)
from dinfer.rank import pyspy
from dinfer.rank.frames import FrameReader, recv_frames, send_frames
from dinfer.rank.process import Life, Wanting, exists, sign_of_life
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


class Watcher:
    """`rank_end` is a socket to the rank, `client` one to the session."""

    def __init__(
        self, memory: memoryview, rank_end: socket.socket, client: "zmq.Socket[bytes]", link: RankLink
    ) -> None:
        self._link, self._memory, self._client = link, memory, client
        self._rank_end, self._reader = rank_end, FrameReader(rank_end)
        self._rank_pid = os.getppid()
        self._lost_client_at: float | None = monotonic()  # it may be gone before it was ever reached
        self._connection = client.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self._board = Board(memory)
        self._recorder: Recorder | None = None
        self._cursor: list[int] = []
        self._lanes = 0
        self._threads: tuple[tuple[int | None, str], ...] = ()
        self._looks: list[tuple[int, pyspy.Look]] = []
        self._last_state: object = None
        self._life_at = 0.0
        self._life: Life | None = None
        self._under_way = set[tuple[int, int]]()
        self._wanting, self._wants_cpu = Wanting(self._rank_pid), 0.0
        self._last_beat = 0.0
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
        self._say(Gone())
        self._connection.close()

    def _commands(self) -> None:
        while self._client.poll(0):
            frame = self._client.recv()
            self._client_heard = monotonic()
            request = unpack_request(frame)
            match tag_of(request.command):
                case Beat.__name__:
                    pass
                case KillRank.__name__:
                    self._kill()
                case DumpStacks.__name__:
                    text = "" if self._link.dump is None else dump_of(self._rank_pid, self._link.dump, DUMP_S)
                    self._say(Reply(request.number, StackDump(named(text, self._threads))))
                case SpyOnRank.__name__:
                    self._spy(request.number)
                case _:
                    self._commanded = monotonic()
                    self._pass_on(frame)

    def _spy(self, number: int) -> None:
        """Have py-spy look, if it is there; request `number` is answered once it has ended."""
        life = sign_of_life(self._rank_pid)
        if spy := pyspy.program():
            stopped = life is not None and life.state in "Tt"
            self._looks.append((number, pyspy.Look(spy, self._rank_pid, stopped=stopped)))
        else:
            self._say(Reply(number, SpiedThreads(())))

    def _tell_seen(self) -> None:
        for one in list(self._looks):
            number, look = one
            if (threads := look.threads()) is not None:
                self._looks.remove(one)
                self._say(Reply(number, SpiedThreads(tuple(threads))))

    def _pass_on(self, frame: bytes) -> None:
        with contextlib.suppress(OSError):
            send_frames(self._rank_end, [frame])

    def _reports(self) -> bool:
        """Pass on what the rank reports; False once it is gone."""
        messages = self._reader.read()
        for frames in messages or ():
            if tag_of(frames[0]) == Lanes.__name__:
                self._publish(last=False)  # what the lanes before have left behind
                self._begin_lanes(frames)
            else:
                self._publish(last=True)  # events and positions before the report that builds on them
            self._pass_back(frames)
        return messages is not None

    def _begin_lanes(self, frames: list[bytes]) -> None:
        report = unpack_report(frames)
        assert isinstance(report, Lanes)
        self._lanes, self._threads = len(report.lanes) - 1, report.threads
        recorder = Recorder.over(self._link.rank, report.lanes, self._memory[BOARD_BYTES:])
        self._recorder, self._cursor = recorder, []

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
            status = Status(
                phase=self._board.phase,
                decoded=self._board.decoded,
                stand=stand,
                process=life and life.state,
                cpu_s=life and life.cpu_s,
                wants_cpu=self._wants_cpu,
                memory=life and life.memory,
                device_memory=self._board.device_memory,
                records=records,
            )
            self._say(status)

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
        if self._link.orphan:
            self._note_connection()
            lost_at = self._lost_client_at
            if lost_at is not None and monotonic() - lost_at > self._link.orphan.patience_s:
                self._lost_client_at = None
                self._leave(self._link.orphan)
            return
        silent = monotonic() - self._client_heard > ORPHAN_S
        if silent and (self._link.joined or not exists(self._link.launcher)):
            self._kill()

    def _note_connection(self) -> None:
        while self._connection.poll(0):
            event = recv_monitor_message(self._connection)["event"]
            self._lost_client_at = monotonic() if event == zmq.EVENT_DISCONNECTED else None

    def _leave(self, rule: OrphanRule) -> None:
        if rule.do == "pause":
            self._pass_on(pack_command(Freeze(), 0))
            return
        for pid in rule.ends:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGTERM)
        self._kill()

    def _kill(self) -> None:
        if os.getppid() == self._rank_pid:
            os.kill(self._rank_pid, signal.SIGKILL)

    def _say(self, report: RankReport) -> None:
        self._pass_back(pack_report(report))

    def _pass_back(self, frames: Sequence[bytes]) -> None:
        self._client.send_multipart(frames, copy=len(frames) == 1)  # a tensor is not copied


def main() -> None:
    """`python -m dinfer.rank.watcher MEMORY_FD SOCKET_FD`; the socket's first message is a RankLink."""
    # These may go to the whole process group; the watcher ends with its rank.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    memory = map_file(int(sys.argv[1]), MEMORY_BYTES)
    rank_end = socket.socket(fileno=int(sys.argv[2]))
    first = recv_frames(rank_end)
    if first is None:
        return
    link = msgspec.msgpack.decode(first[0], type=RankLink)
    with zmq.Context() as context:
        client: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        client.setsockopt(zmq.LINGER, 2000)
        # Never block in send: a watcher whose client is gone must end its rank.
        client.setsockopt(zmq.SNDHWM, 0)
        client.setsockopt(zmq.IDENTITY, f"rank {link.rank}".encode())
        client.curve_serverkey = link.server_key.encode()
        client.curve_publickey, client.curve_secretkey = link.public_key.encode(), link.secret_key.encode()
        client.connect(link.endpoint)
        Watcher(memory, rank_end, client, link).run()
        client.close()


if __name__ == "__main__":
    main()
