"""The probe's own thread: a sign of life every 0.25 s, stacks for whoever asks, and which ops are over."""

import threading
import time
from collections.abc import Callable

from .recorder import OpRecorder
from .stacks import thread_stacks
from .works import Works

TICK_S = 0.25
DEVICE_TICK_S = 0.02
"""While ops on a device are under way: their ends are found by asking."""
MOST_STACKS, STACKS_EVERY_S = 200, 30.0
"""So many questions for stacks are answered at once, and one more each time so many seconds have passed: a run of days
must answer at its end, too, and its record stay small."""


class ProbeThread:
    """Runs until it is stopped, or recording is off. It never waits for anybody but its own clock."""

    def __init__(self, recorder: OpRecorder, works: Works, more: Callable[[], None]) -> None:
        """`more`: called at each tick, and must not raise."""
        self._recorder, self._works, self._more = recorder, works, more
        self._stop = threading.Event()
        self._began, self._answers = time.monotonic(), 0
        self._thread = threading.Thread(target=self._run, name="dinfer probe", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # the interpreter is ending, or there are too many threads
            recorder.problem(f"without a thread of its own the probe writes no signs of life: {error}")

    def stop(self) -> None:
        """End it, before the interpreter ends: a thread that wakes up in torch after that would abort the process."""
        self._stop.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(1)

    def _run(self) -> None:
        is_busy = False
        while not self._stop.wait(DEVICE_TICK_S if is_busy else TICK_S) and not self._recorder.is_off:
            try:
                is_busy = self._tick()
            except Exception as error:
                self._recorder.switch_off("the probe's thread", error)

    def _tick(self) -> bool:
        records = self._recorder.records
        if records is None:
            return False
        records.ops.beat(time.monotonic_ns())
        asked = records.ops.asked
        if asked:
            if self._answers < MOST_STACKS + (time.monotonic() - self._began) / STACKS_EVERY_S:
                self._answers += 1
                threads = thread_stacks()
                records.lines.write("stacks", number=asked, at_ns=time.monotonic_ns(), threads=threads)
            records.ops.answered(asked)
        self._recorder.find_groups()
        self._more()
        return self._works.look()
