"""How a process ends, as far as it can say so itself: its exit, os._exit, an exception that nobody caught.

Who is killed says nothing; its files end where it was.
"""

import atexit
import os
import sys
import threading
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

from .imports import ImportWatch
from .recorder import OpRecorder


class Endings:
    """Tells the recorder how the process ends. Everything that was there before is called as it would have been."""

    def __init__(
        self,
        recorder: OpRecorder,
        imports: ImportWatch,
        before_exit: Callable[[], None],
        before_os_exit: Callable[[], None],
    ) -> None:
        self._recorder, self._before_exit, self._before_os_exit = recorder, before_exit, before_os_exit
        self._restore: list[Callable[[], None]] = []
        self._told: BaseException | None = None
        """what ends the process; an exception of another thread is not kept: it would hold its frames"""
        self._has_told = False
        self._replace(sys, "excepthook", self._excepthook)
        self._replace(threading, "excepthook", self._thread_excepthook)
        self._replace(os, "_exit", self._os_exit)
        # These catch what their function raises, print it, and end the process with status 1.
        imports.add(
            "multiprocessing.process", lambda module: self._replace(module.BaseProcess, "run", self._run)
        )
        imports.add("torch.multiprocessing.spawn", self._patch_spawn)
        atexit.register(self._at_exit)

    def remove(self) -> None:
        """As it was before."""
        atexit.unregister(self._at_exit)
        for restore in reversed(self._restore):
            restore()

    def _replace(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        before = getattr(owner, name)
        by = make(before)
        setattr(owner, name, by)

        def restore() -> None:
            if getattr(owner, name) is by:  # else somebody else has replaced it since
                setattr(owner, name, before)

        self._restore.append(restore)

    def _patch_spawn(self, module: ModuleType) -> None:
        if hasattr(module, "_wrap"):
            self._replace(module, "_wrap", self._spawn_wrap)

    # -- exceptions

    def _raised(self, error: BaseException | None, thread: str = "") -> None:
        if error is None or error is self._told or self._recorder.records is None:
            return
        self._has_told = True
        if not thread:
            self._told = error
        try:
            self._recorder.raised(error, "exception", thread)
        except Exception as failure:
            self._recorder.switch_off("recording exceptions", failure)

    def _excepthook(self, before: Any) -> Any:
        @wraps(before)
        def excepthook(kind: Any, error: Any, traceback: Any) -> None:
            self._raised(error)
            before(kind, error, traceback)

        return excepthook

    def _thread_excepthook(self, before: Any) -> Any:
        @wraps(before)
        def excepthook(args: Any) -> None:
            if not issubclass(args.exc_type, SystemExit):
                self._raised(args.exc_value, args.thread.name if args.thread else "")
            before(args)

        return excepthook

    def _run(self, before: Any) -> Any:
        @wraps(before)
        def run(process: Any) -> Any:
            try:
                return before(process)
            except Exception as error:
                self._raised(error)
                raise

        return run

    def _spawn_wrap(self, before: Any) -> Any:
        @wraps(before)
        def wrap(function: Any, *args: Any) -> Any:
            @wraps(function)
            def called(*of_function: Any) -> Any:
                try:
                    return function(*of_function)
                except Exception as error:
                    self._raised(error)
                    raise

            return before(called, *args)

        return wrap

    # -- ends

    def _end(self, how: str) -> None:
        try:
            if self._recorder.records is not None:
                self._recorder.records.lines.write("end", how=how)
        except Exception:
            self._recorder.turn_off()  # there is nobody left to tell

    def _os_exit(self, before: Any) -> Any:
        @wraps(before)
        def _exit(status: int) -> Any:
            self._before_os_exit()
            self._end(f"os._exit({status})")
            before(status)

        return _exit

    def _at_exit(self) -> None:
        self._before_exit()
        # Where somebody has replaced sys.excepthook, Python has still noted what nobody caught.
        if not hasattr(sys, "ps1") and "ipykernel" not in sys.modules:
            self._raised(getattr(sys, "last_value", None))
        self._end("exception" if self._has_told else "exit")
