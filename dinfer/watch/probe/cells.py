"""When cells of a notebook begin, end and fail in this process, which itself goes on: as IPython's shell says."""

from collections.abc import Callable
from typing import Any

from .recorder import OpRecorder


class Cells:
    """Tells the recorder of the cells that a shell runs, silent ones too, as ipyparallel's are. None runs now."""

    def __init__(
        self, recorder: OpRecorder, shell: Any, before_end: Callable[[], None] = lambda: None
    ) -> None:
        """`before_end`: called before a cell's end is told; must not raise."""
        self._recorder, self._shell, self._before_end = recorder, shell, before_end
        shell.events.register("pre_execute", self._begun)
        shell.events.register("post_execute", self._ended)
        self._say("ended")

    def remove(self) -> None:
        """Tell no more."""
        self._shell.events.unregister("pre_execute", self._begun)
        self._shell.events.unregister("post_execute", self._ended)

    def _begun(self) -> None:
        self._say("running")

    def _ended(self) -> None:
        self._before_end()
        error = getattr(getattr(self._shell, "last_execution_result", None), "error_in_exec", None)
        self._say("ended", error if isinstance(error, BaseException) else None)

    def _say(self, state: str, error: BaseException | None = None) -> None:
        try:
            if error is not None:
                self._recorder.raised(error, "cell_raised")
            if (records := self._recorder.open()) is not None:
                records.lines.write("cell", state=state)
        except Exception as failure:
            self._recorder.switch_off("following cells", failure)
