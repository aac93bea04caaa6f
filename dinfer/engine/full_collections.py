"""No full garbage collection while lanes run.

Among the objects of a loaded model one takes some 0.3 s, in which no thread of Python goes on: twice the time of a
whole prefill on a GPU, and on a CPU it would look like a slow op. Collections of young objects go on, and full ones
make up for it as soon as the lanes stand.
"""

import gc
import threading

_NEVER = 1 << 30
"""collections of the middle generation before a full one"""

_lock = threading.Lock()
_running: set[int] = set()
_usual = 0


def hold(who: int) -> None:
    """No full collection from now on, until `release` is called with the same number."""
    global _usual
    with _lock:
        if not _running:
            young, middle, _usual = gc.get_threshold()
            gc.set_threshold(young, middle, _NEVER)
        _running.add(who)


def release(who: int) -> None:
    """Full collections again, unless others hold them."""
    with _lock:
        if who in _running:
            _running.remove(who)
            if not _running:
                young, middle, _ = gc.get_threshold()
                gc.set_threshold(young, middle, _usual)
