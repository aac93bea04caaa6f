"""Passes signals on to a command: it gets what this process gets, once."""

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_SIGNALS = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT,
)  # fmt: skip
"""schedulers send some of them before a time limit"""

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)

_TICK_S = 0.2


class PassedOn:
    """While it is entered, signals that would end this process go to the command instead, from before it is started.

    What the terminal sends, such as Ctrl-C, reaches the command by itself, which is in the same process group. Who has
    sent a signal is told with it where it is waited for: so all threads hold the signals back, and one waits for them.
    Enter it before threads are started. Signals that are ignored, as by `nohup`, stay so for both.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._on_end: Callable[[], None] | None = None
        self._numbers: set[int] = set()
        self._before: dict[int, object] = {}
        self._mask: set[int] = set()
        self._early: list[int] = []
        self._after_end = 0
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._waits = hasattr(signal, "sigtimedwait")  # not on macOS

    def __enter__(self) -> "PassedOn":
        self._numbers = {n for n in _SIGNALS if signal.getsignal(n) not in (signal.SIG_IGN, None)}
        for number in self._numbers:
            self._before[number] = signal.signal(number, self._handle)
        if self._waits:
            self._mask = {int(one) for one in signal.pthread_sigmask(signal.SIG_BLOCK, self._numbers)}
        return self

    @contextmanager
    def starting(self) -> Iterator[None]:
        """While the command is started: it must not hold signals back. What comes meanwhile is passed on later."""
        if self._waits:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        try:
            yield
        finally:
            if self._waits:
                signal.pthread_sigmask(signal.SIG_BLOCK, self._numbers)

    def follow(self, process: "subprocess.Popen[bytes]", on_end: Callable[[], None]) -> None:
        """From now on signals go to that process. `on_end` is called before the first that is to end it."""
        self._process, self._on_end = process, on_end
        for number in self._early:
            self._pass_on(number, from_terminal=False)
        if self._waits:
            self._thread = threading.Thread(target=self._listen, name="dinfer signals", daemon=True)
            self._thread.start()

    def _listen(self) -> None:
        while not self._over.is_set():
            found = signal.sigtimedwait(self._numbers, _TICK_S)
            if found is not None:
                self._pass_on(found.si_signo, from_terminal=found.si_code > 0)  # by the kernel, not a process

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._process is None:
            self._early.append(number)
        else:
            self._pass_on(number, from_terminal=number == signal.SIGINT and _is_in_foreground())

    def _pass_on(self, number: int, *, from_terminal: bool) -> None:
        assert self._process
        if number in _ENDING and self._on_end:
            on_end, self._on_end = self._on_end, None
            with suppress(Exception):  # the signal comes first, whatever writing of it runs into
                on_end()
        if self._process.returncode is not None:  # what is left is to write down what was seen
            self._after_end += number != signal.SIGCONT
            if self._after_end > 1:
                os._exit(128 + number)
        elif not (from_terminal and _is_in_my_group(self._process.pid)):
            with suppress(ProcessLookupError):
                self._process.send_signal(number)

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread:
            self._thread.join()
        if self._waits:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


def _is_in_my_group(pid: int) -> bool:
    """Whether what the terminal sends to this process reaches that one, too: `timeout`, for one, leaves the group."""
    try:
        return os.getpgid(pid) == os.getpgrp()
    except ProcessLookupError:
        return False


def _is_in_foreground() -> bool:
    """Whether this process is in the foreground of its terminal, whose Ctrl-C all of the foreground gets."""
    try:
        descriptor = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(descriptor) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(descriptor)
