"""Signals that `dinfer watch` gets: the command gets each once, whoever sent it."""

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.runs import wait_for
from tests.support.watched import own_session

REPOSITORY = Path(__file__).parent.parent.parent.parent
PATIENCE_S = 60.0

COUNTS = """
import pathlib, signal, sys
counts = {}
here = pathlib.Path(sys.argv[1])
def take(number, _):
    counts[number] = counts.get(number, 0) + 1
    name = signal.Signals(number).name
    (here / f"{name}-{counts[number]}").touch()
    if number == signal.SIGTERM:
        sys.exit(3)
for one in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGUSR1):
    signal.signal(one, take)
ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
(here / f"started-{ignored}").touch()
while True:
    signal.pause()
"""
"""a command that says which signals it gets, and ends by SIGTERM"""


def watching(folder: Path, *more: str) -> list[str]:
    (folder / "counts.py").write_text(COUNTS)
    words = [sys.executable, "-m", "dinfer.cli", "watch", "--folder", str(folder / "records"), *more, "--"]
    return [*words, sys.executable, str(folder / "counts.py"), str(folder)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def wait_for_file(path: Path, meanwhile: Callable[[], object] = lambda: None) -> None:
    wait_for(path.exists, f"{path.name} is there", meanwhile)


@pytest.mark.cluster
def test_ctrl_c_in_a_terminal_reaches_the_command_once_and_a_signal_to_watch_alone_once_too(
    tmp_path: Path,
) -> None:
    """Standard input is not the terminal, as under `dinfer watch … < prompts.txt`."""
    terminal, side = pty.openpty()
    os.set_blocking(terminal, False)

    def read() -> None:
        with suppress(OSError):
            os.read(terminal, 1 << 16)

    def take_terminal() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may ignore it, as nohup does
        fcntl.ioctl(1, termios.TIOCSCTTY, 0)

    ends = {"stdin": subprocess.DEVNULL, "stdout": side, "stderr": side, "preexec_fn": take_terminal}
    with own_session(watching(tmp_path), env=environment(), **ends) as process:
        os.close(side)
        wait_for_file(tmp_path / "started-False", read)
        os.write(terminal, b"\x03")
        wait_for_file(tmp_path / "SIGINT-1", read)
        process.send_signal(signal.SIGUSR1)
        wait_for_file(tmp_path / "SIGUSR1-1", read)
        process.send_signal(signal.SIGINT)
        wait_for_file(tmp_path / "SIGINT-2", read)
        os.write(terminal, b"\x1c")  # Ctrl-\\
        wait_for_file(tmp_path / "SIGQUIT-1", read)
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: process.poll() is not None, "it ends", read)
        assert process.returncode == 3
    os.close(terminal)
    told = {path.name for path in tmp_path.glob("SIG*")}
    assert told == {"SIGINT-1", "SIGINT-2", "SIGUSR1-1", "SIGQUIT-1", "SIGTERM-1"}


@pytest.mark.cluster
def test_ctrl_c_reaches_a_command_that_has_left_the_terminals_group(tmp_path: Path) -> None:
    """As `timeout 600 torchrun …` does."""
    terminal, side = pty.openpty()

    def take_terminal() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        fcntl.ioctl(1, termios.TIOCSCTTY, 0)

    command = watching(tmp_path)
    (tmp_path / "counts.py").write_text(f"import os\nos.setpgid(0, 0)\n{COUNTS}")
    ends = {"stdin": subprocess.DEVNULL, "stdout": side, "preexec_fn": take_terminal}
    with own_session(command, env=environment(), **ends) as process:
        os.close(side)
        wait_for_file(tmp_path / "started-False")
        os.write(terminal, b"\x03")
        wait_for_file(tmp_path / "SIGINT-1")
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 3
    os.close(terminal)


@pytest.mark.cluster
def test_what_is_ignored_stays_ignored_and_closed_ends_do_not_disturb(tmp_path: Path) -> None:
    """As under nohup, with standard error closed and nobody who reads standard output."""

    def before() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        os.close(2)

    reader, writer = os.pipe()
    os.close(reader)
    told = tmp_path / "told.json"
    command = watching(tmp_path, "--json", str(told))
    with own_session(command, env=environment(), preexec_fn=before, stdout=writer) as process:
        os.close(writer)
        wait_for_file(tmp_path / "started-True")
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 3
    assert told.is_file()


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("code", "status"),
    [("os.kill(os.getpid(), 9)", 137), pytest.param("os._exit(200)", 200, marks=pytest.mark.slow)],
)
def test_the_status_is_what_a_shell_says(code: str, status: int, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "dinfer.cli", "watch", "--folder", str(tmp_path / "a"), "--"]
    run = subprocess.run(
        [*words, sys.executable, "-c", f"import os; {code}"],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert run.returncode == status, run.stderr


DAEMON = """
import os, signal, sys, time
import torch, torch.distributed as dist
if os.fork() == 0:
    os.setsid()
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=0, world_size=1)
    dist.barrier()
    open(sys.argv[1] + "/met", "w").write(str(os.getpid()))
    os.close(1), os.close(2)
    while True:
        signal.pause()
while not os.path.exists(sys.argv[1] + "/met"):
    time.sleep(0.05)
time.sleep(1)  # so that it has been looked at
"""


@pytest.mark.cluster
@pytest.mark.slow
def test_a_command_that_leaves_a_daemon_behind(tmp_path: Path) -> None:
    (tmp_path / "daemon.py").write_text(DAEMON)
    words = [sys.executable, "-m", "dinfer.cli", "watch", "--folder", str(tmp_path / "a"), "--"]
    command = [*words, sys.executable, str(tmp_path / "daemon.py"), str(tmp_path)]
    run = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=PATIENCE_S)
    os.kill(int((tmp_path / "met").read_text()), signal.SIGKILL)
    assert run.returncode == 0
    assert "1 of its processes go on and record: `dinfer explain" in run.stderr
    assert "✖" not in run.stderr
