"""The probe in real processes: torchrun, spawned and forked ones, started from the zip as in an environment without
dinfer; what is left of those that were killed, left without a word, failed, or stand."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from dinfer.watch.probe.reading import ask_stacks, read
from dinfer.watch.probe.records import RecordsError, WatchedOp, WatchedProcess
from dinfer.watch.probe.rows import read_rows
from dinfer.watch.zipped import watched_environment, write_zip
from tests.support.runs import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

START = """
import os, sys, time, threading
import torch
import torch.distributed as dist
from torch.distributed import recv, send
"""
INIT = """
dist.init_process_group("gloo")
rank = dist.get_rank()
tensor = torch.zeros(4)
"""


class Program:
    """A program that is watched, with all that it starts."""

    def __init__(self, folder: Path, text: str, ranks: int) -> None:
        self.script = folder / "infer.py"
        self.script.write_text(START + text)
        self.folder = folder / "watched"
        launch = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}") if ranks else ()
        self._log = (folder / "log").open("wb+")
        environment = watched_environment(write_zip(folder / "probe.zip"), self.folder)
        self.process = subprocess.Popen(
            (sys.executable, *launch, str(self.script)),
            env={**os.environ, **environment},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def read(self) -> list[WatchedProcess]:
        """By rank."""
        try:
            found = read(self.folder)
        except RecordsError:
            if self.folder.exists():
                raise
            return []
        return sorted(found, key=lambda process: -1 if process.rank is None else process.rank)

    def ranks(self) -> list[WatchedProcess]:
        """Once it has ended, whatever its status."""
        self.process.wait(200)
        return self.read()

    def line(self, text: str) -> int:
        """Where this text is in the script."""
        lines = self.script.read_text().splitlines()
        return next(number for number, line in enumerate(lines, 1) if text in line)

    def log(self) -> str:
        """What it printed."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def end(self) -> None:
        """It and all that it started."""
        try:
            family = [self.process_info(), *self.process_info().children(recursive=True)]
        except psutil.NoSuchProcess:
            family = []
        for one in family:
            try:
                one.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait(20)
        self._log.close()

    def process_info(self) -> psutil.Process:
        """The launcher."""
        return psutil.Process(self.process.pid)


Launch = Callable[..., Program]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """launch(text, ranks=2): a program under torchrun; `ranks=0`: without a launcher."""
    programs: list[Program] = []

    def launched(text: str, ranks: int = 2) -> Program:
        programs.append(Program(tmp_path, textwrap.dedent(text), ranks))
        return programs[-1]

    yield launched
    for program in programs:
        program.end()


def of_kind(process: WatchedProcess, *kinds: str) -> list[WatchedOp]:
    """Its ops of these kinds."""
    return [op for op in process.ops if op.kind in kinds]


def test_a_healthy_program(launch: Launch) -> None:
    program = launch(
        INIT
        + """
def sync(kv, other):
    if rank == 0:
        send(kv, other, tag=3)
    elif rank == other:
        recv(kv, 0, tag=3)

for layer in range(2):
    for chunk in range(3):
        sync(torch.zeros(2, layer + 1), 1)
pair = dist.new_group([0, 2])
if rank != 1:
    dist.broadcast(tensor, 2, group=pair)
if rank < 2:
    ops = [dist.P2POp(dist.isend, tensor, 1 - rank), dist.P2POp(dist.irecv, torch.zeros(4), 1 - rank)]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
if rank == 2:
    thread = threading.Thread(target=send, args=(tensor, 0), name="sender")
    thread.start()
    thread.join()
if rank == 0:
    recv(tensor)
dist.all_gather_object([None] * 3, {"rank": rank})
dist.barrier()
dist.destroy_process_group()
""",
        ranks=3,
    )
    first, second, third = program.ranks()
    assert program.process.returncode == 0, program.log()
    assert [process.rank for process in (first, second, third)] == [0, 1, 2]
    assert {(process.world_size, process.hook, process.ended) for process in (first, second, third)} == {
        (3, "kernels", "exit")
    }
    assert all(process.problems == [] for process in (first, second, third))
    sends = of_kind(first, "send")[:6]
    assert [(op.layer, op.chunk, op.shape, op.peer, op.tag) for op in sends] == [
        (layer, chunk, (2, layer + 1), 1, 3) for layer in range(2) for chunk in range(3)
    ]
    assert {op.line for op in sends} == {program.line("send(kv")}
    assert [op.shape for op in of_kind(second, "recv")[:6]] == [op.shape for op in sends]
    for process in (first, third):
        (broadcast,) = of_kind(process, "broadcast")
        assert (process.groups[broadcast.group].ranks, broadcast.peer) == ((0, 2), 2)
    assert of_kind(second, "broadcast") == []
    assert {op.waited_line for op in of_kind(second, "send")} == {program.line("work.wait()")}
    assert of_kind(third, "send")[0].thread == "sender"
    assert of_kind(first, "recv")[-1].peer == 2  # from any, and then it is known from which
    assert {op.state for process in (first, second, third) for op in process.ops} == {"done"}


@pytest.mark.slow
def test_who_waits_can_be_seen_while_it_does_and_after_a_kill(launch: Launch) -> None:
    program = launch(
        INIT
        + """
dist.all_reduce(tensor)
if rank == 0:
    work = dist.isend(tensor, 1)
    recv(tensor, 1, tag=9)
else:
    time.sleep(1000)
"""
    )
    wait_for(lambda: any(of_kind(one, "recv") for one in program.read()), "rank 0 receives")
    wait_for(lambda: all(one.heartbeat_ns for one in program.read()), "both have shown signs of life")
    first, second = program.read()
    (sent,), (received,) = of_kind(first, "send"), of_kind(first, "recv")
    assert (sent.is_async, sent.waited_ns, sent.done_ns, sent.state) == (True, 0, 0, "issued")
    wait_for(lambda: of_kind(program.read()[0], "recv")[0].state == "waiting", "it waits")
    assert (received.peer, received.tag, received.line) == (1, 9, program.line("recv(tensor"))

    ask_stacks(program.folder, second)
    wait_for(lambda: program.read()[1].stacks, "rank 1 says where it stands")
    main = program.read()[1].stacks[0].threads[0]
    assert main.frames[0][1] == program.line("time.sleep")
    assert main.frames[0][3] == "time.sleep(1000)"

    for process in (first, second):
        os.kill(process.pid, signal.SIGKILL)
    program.process.wait(60)
    after = program.read()
    assert [one.ended for one in after] == [None, None]
    assert of_kind(after[0], "recv")[0].state == "waiting"


@pytest.mark.slow
def test_a_process_that_holds_the_gil_shows_no_life_and_still_dumps(launch: Launch) -> None:
    program = launch(
        INIT
        + """
import ctypes
dist.all_reduce(tensor)
if rank == 0:
    ctypes.PyDLL(None).sleep(1000)
dist.barrier()
"""
    )
    wait_for(lambda: any(of_kind(one, "barrier") for one in program.read()), "rank 1 is in the barrier")

    def only_rank_1_lives() -> bool:
        first, second = program.read()
        return second.heartbeat_ns - first.heartbeat_ns > 2 * 10**9

    wait_for(only_rank_1_lives, "rank 0 shows no signs of life, and rank 1 does")
    first = program.read()[0]
    assert first.dump is not None
    os.kill(first.pid, first.dump)
    dump = program.folder / f"{first.name}.dump"
    wait_for(lambda: f"line {program.line('PyDLL')} in <module>" in dump.read_text(), "the stack is dumped")


def test_an_exception_that_ends_a_rank(launch: Launch) -> None:
    program = launch(
        INIT
        + """
def step():
    raise ValueError("no such layer")

if rank == 1:
    sys.excepthook = lambda *_: None  # as others do
    step()
dist.barrier()
"""
    )
    second = program.ranks()[1]
    assert program.process.returncode != 0
    assert second.ended == "exception"
    assert second.exception is not None
    assert (second.exception.type, second.exception.message) == ("ValueError", "no such layer")
    assert (second.exception.file, second.exception.line) == (
        str(program.script),
        program.line("raise Value"),
    )


@pytest.mark.slow
def test_an_exception_and_a_barrier_in_its_handler(launch: Launch) -> None:
    program = launch(
        INIT
        + """
try:
    if rank == 1:
        raise KeyError("lost")
    dist.all_reduce(tensor)
except KeyError:
    dist.barrier()
"""
    )
    wait_for(lambda: any(one.handled for one in program.read()), "rank 1 handles its exception")
    first, second = program.read()
    assert first.handled == []
    assert (second.handled[0].type, second.handled[0].line) == ("KeyError", program.line("raise KeyError"))
    assert second.ops[second.handled[0].seq].kind == "barrier"


@pytest.mark.slow
def test_a_process_that_leaves_without_a_word(launch: Launch) -> None:
    program = launch(INIT + "dist.all_reduce(tensor)\nos._exit(0)\n")
    assert [process.ended for process in program.ranks()] == ["os._exit(0)"] * 2


@pytest.mark.slow
def test_a_rank_that_waits_for_the_others_to_join(launch: Launch) -> None:
    program = launch(
        'if os.environ["RANK"] == "0":\n    dist.init_process_group("gloo")\nelse:\n    time.sleep(1000)\n'
    )
    wait_for(lambda: [one for one in program.read() if one.ops], "rank 0 begins to join")
    (process,) = program.read()
    (op,) = process.ops
    assert (op.kind, op.state, process.rank, process.expected_rank) == ("init_group", "waiting", None, 0)
    assert op.line == program.line("init_process_group")


@pytest.mark.slow
def test_a_rank_that_no_environment_names_and_that_cannot_join(launch: Launch) -> None:
    program = launch(
        """
import socket
taken = socket.create_server(("", 0))
at = f"tcp://localhost:{taken.getsockname()[1]}"
dist.init_process_group("gloo", init_method=at, rank=0, world_size=2)
""",
        0,
    )
    assert program.process.wait(200) == 1
    (process,) = program.read()
    assert (process.rank, process.expected_rank) == (None, 0)
    assert process.exception is not None
    assert process.exception.line == program.line("init_process_group")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_processes_that_python_starts(launch: Launch, method: str) -> None:
    program = launch(
        f"""
import multiprocessing

def work(rank, file):
    dist.init_process_group("gloo", init_method=f"file://{{file}}", rank=rank, world_size=2)
    for mb in range(2):
        dist.all_reduce(torch.ones(3))
    if rank == 1:
        raise ValueError("in the child")

if __name__ == "__main__":
    context = multiprocessing.get_context("{method}")
    processes = [context.Process(target=work, args=(rank, os.path.abspath("store"))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
""",
        ranks=0,
    )
    first, second = program.ranks()
    assert program.process.returncode == 0, program.log()
    for process in (first, second):
        assert [op.chunk for op in of_kind(process, "all_reduce")] == [0, 1]
        assert process.problems == []
    assert first.exception is None
    assert second.exception is not None
    assert (second.exception.message, second.exception.line) == (
        "in the child",
        program.line("raise ValueError"),
    )


@pytest.mark.slow
def test_torch_spawn(launch: Launch) -> None:
    program = launch(
        """
import torch.multiprocessing

def work(rank, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    dist.all_reduce(torch.ones(3))
    if rank == 0:
        raise ValueError("in the child")

if __name__ == "__main__":
    torch.multiprocessing.spawn(work, args=(os.path.abspath("store"),), nprocs=2)
""",
        ranks=0,
    )
    first, _ = program.ranks()
    assert program.process.returncode != 0
    assert first.exception is not None
    assert first.exception.line == program.line("raise ValueError")


@pytest.mark.slow
def test_a_program_that_says_more_than_it_must(launch: Launch) -> None:
    program = launch(
        """
import dinfer

for layer in range(2):
    with dinfer.label(chunk=5):
        dinfer.tap("hidden", torch.full((3, 2), float(layer)))
""",
        ranks=0,
    )
    (process,) = program.ranks()
    assert program.process.returncode == 0, program.log()
    assert (process.rank, process.ops, process.problems) == (None, [], [])
    rows = read_rows(program.folder, process)
    assert [(row.layer, row.chunk, len(row.digests[0])) for row in rows] == [(0, 5, 3), (1, 5, 3)]
    assert rows[0].digests != rows[1].digests


def test_programs_without_groups_leave_nothing_and_keep_their_sitecustomize(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "sitecustomize.py").write_text("import builtins\nbuiltins.own = 5\n")
    environment = watched_environment(write_zip(tmp_path / "probe.zip"), tmp_path / "watched")
    environment["PYTHONPATH"] += os.pathsep + str(tmp_path / "own")
    program = "import sys; print(own, 'torch' in sys.modules, 'sitecustomize' in sys.modules)"
    done = subprocess.run(
        (sys.executable, "-c", program),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["5", "False", "True"]
    assert done.stderr == ""
    assert not (tmp_path / "watched").exists()
