"""Watcher: a small process beside each rank that says where the rank stands when the rank itself cannot.

It reads the rank's board and recorder from shared memory and publishes them, passes commands in and reports
out, and goes on while the rank is busy in C code, stopped, or killed. It ends with its rank; a rank whose session
is gone it ends too, or pauses, as the session has asked. No torch here: it starts in a fraction of a second.
"""

import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from time import monotonic, monotonic_ns

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from dinfer import messages
from dinfer.engine.board import BOARD_BYTES, Board, Stand, map_file
from dinfer.rank import pyspy
from dinfer.rank.frames import FrameReader, send_frames
from dinfer.rank.process import Life, Wanting, clock_name, exists, sign_of_life
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
        self,
        memory: memoryview,
        rank_end: socket.socket,
        client: "zmq.Socket[bytes]",
        link: messages.RankLink,
    ) -> None:
        self._link, self._memory, self._client = link, memory, client
        self._rank_end, self._reader = rank_end, FrameReader(rank_end)
        self._rank_pid = os.getppid()
        self._lost_client_at: float | None = monotonic()  # it may be gone before it was ever reached
        self._connection = client.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self._board = Board(memory)
        self._board.set_session("awaited")
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
        self._thread_cpu: float | None = None
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
                self._take_commands()
            if self._rank_end.fileno() in ready:
                alive = self._take_reports()
            alive = alive and os.getppid() == self._rank_pid
            self._publish(last=not alive)
            self._answer_looks()
            self._check_client()
        for _, look in self._looks:
            look.end()
        self._report(messages.Gone())
        self._connection.close()

    def _take_commands(self) -> None:
        while self._client.poll(0):
            frame = self._client.recv()
            received, self._client_heard = monotonic_ns(), monotonic()
            request = messages.unpack_request(frame)
            match messages.tag_of(request.command):
                case messages.Beat.__name__:
                    self._tell_time(request, received)
                case messages.KillRank.__name__:
                    self._kill()
                case messages.DumpStacks.__name__:
                    text = "" if self._link.dump is None else dump_of(self._rank_pid, self._link.dump, DUMP_S)
                    self._report(
                        messages.Reply(request.number, messages.StackDump(named(text, self._threads)))
                    )
                case messages.SpyOnRank.__name__:
                    if spy := pyspy.program():
                        life = sign_of_life(self._rank_pid)
                        stopped = life is not None and life.state in "Tt"
                        look = pyspy.Look(spy, self._rank_pid, stopped=stopped)
                        self._looks.append((request.number, look))
                    else:
                        self._report(messages.Reply(request.number, messages.SpiedThreads(())))
                case _:
                    self._commanded = monotonic()
                    self._pass_on(frame)

    def _tell_time(self, request: messages.Request, received: int) -> None:
        """Say what the time is here, where the session cannot know."""
        if (name := clock_name()) == self._link.clock:
            return
        beat = messages.unpack_command(request.command)
        assert isinstance(beat, messages.Beat)
        self._report(messages.ClockAnswer(name, beat.sent, received, monotonic_ns()))

    def _answer_looks(self) -> None:
        """Report what py-spy has seen, once it has ended."""
        for one in list(self._looks):
            number, look = one
            if (threads := look.threads()) is not None:
                self._looks.remove(one)
                self._report(messages.Reply(number, messages.SpiedThreads(tuple(threads))))

    def _take_reports(self) -> bool:
        """Pass on what the rank reports; False once it is gone."""
        came = self._reader.read()
        for frames in came or ():
            is_lanes = messages.tag_of(frames[0]) == messages.Lanes.__name__
            # First what the lanes before have left behind, or events and positions on which the report builds.
            self._publish(last=not is_lanes)
            if is_lanes:
                report = messages.unpack_report(frames)
                assert isinstance(report, messages.Lanes)
                self._lanes, self._threads = len(report.lanes) - 1, report.threads
                self._recorder = Recorder.over(self._link.rank, report.lanes, self._memory[BOARD_BYTES:])
                self._cursor = []
            self._send(frames)
        return came is not None

    def _publish(self, *, last: bool) -> None:
        """What is new, as one message: each costs the rank's core, and wakes the session's process."""
        records, stand = b"", self._board.stand(self._lanes)
        # Read after the stand, so that the events of all ops that have ended there are among them.
        if self._recorder:
            records, self._cursor = self._recorder.read_records(self._cursor)
        state = (stand, self._board.phase, self._board.decoded)
        beat = monotonic() - self._last_beat > BEAT_S
        if last or beat or records or state != self._last_state:
            self._last_state = state
            if last or beat:
                self._last_beat = monotonic()
            life = self._sign_of_life(stand)
            status = messages.Status(
                phase=self._board.phase,
                decoded=self._board.decoded,
                stand=stand,
                process=life and life.state,
                cpu_s=life and life.cpu_s,
                wants_cpu=self._wants_cpu,
                thread_cpu=self._thread_cpu,
                memory=life and life.memory,
                device_memory=self._board.device_memory,
                records=records,
            )
            self._report(status)

    def _sign_of_life(self, stand: Stand) -> Life | None:
        if monotonic() - self._life_at > LIFE_S:
            before, self._life_at, self._life = self._life, monotonic(), sign_of_life(self._rank_pid)
            # What its threads want counts while something takes long, and takes as long to ask as all the rest.
            lanes = enumerate(zip(stand.positions, stand.started, strict=True))
            under_way = {(lane, position) for lane, (position, started) in lanes if started}
            if self._board.phase == "decode":
                under_way.add((-1, self._board.decoded))
            is_long = bool(under_way & self._under_way)
            self._wanting = self._wanting if is_long else Wanting(self._rank_pid)
            self._wants_cpu = self._wanting.look() if is_long else 0.0
            self._thread_cpu = self._wanting.busiest
            self._under_way = under_way
            if self._life and before and self._looks and self._life.state == "t":  # py-spy's doing
                self._life = self._life._replace(state=before.state)
        return self._life

    def _check_client(self) -> None:
        """A rank that nobody can command or hear any more is ended, or paused, as its client has asked.

        A session's client is gone when its connection is closed and stays so: one that sleeps, a laptop say, keeps it.
        """
        rule = self._link.orphan
        if not rule:
            silent = monotonic() - self._client_heard > ORPHAN_S
            if silent and (self._link.joined or not exists(self._link.launcher)):
                self._kill()
            return
        while self._connection.poll(0):
            is_gone = recv_monitor_message(self._connection)["event"] == zmq.EVENT_DISCONNECTED
            self._lost_client_at = monotonic() if is_gone else None
            self._board.set_session("gone" if is_gone else "there")
        if self._lost_client_at is None or monotonic() - self._lost_client_at <= rule.patience_s:
            return
        self._lost_client_at = None
        if rule.do == "pause":
            self._pass_on(messages.pack_command(messages.Freeze(), 0))
            return
        for pid in rule.ends:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGTERM)
        self._kill()

    def _kill(self) -> None:
        if os.getppid() == self._rank_pid:
            os.kill(self._rank_pid, signal.SIGKILL)

    def _pass_on(self, frame: bytes) -> None:
        with suppress(OSError):  # the rank has ended
            send_frames(self._rank_end, [frame])

    def _report(self, report: messages.RankReport) -> None:
        self._send(messages.pack_report(report))

    def _send(self, frames: Sequence[bytes]) -> None:
        self._client.send_multipart(frames, copy=len(frames) == 1)  # a tensor is not copied


def main() -> None:
    """`python -m dinfer.rank.watcher MEMORY_FD SOCKET_FD`, with a RankLink on standard input."""
    # These may go to the whole process group; the watcher ends with its rank.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    memory = map_file(int(sys.argv[1]), MEMORY_BYTES)
    rank_end = socket.socket(fileno=int(sys.argv[2]))
    packed = sys.stdin.buffer.read()
    if not packed:  # the rank has ended already
        return
    link = msgspec.msgpack.decode(packed, type=messages.RankLink)
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
