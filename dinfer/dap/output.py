"""What this process prints, as lines in a client's debug console: standard output may be the wire itself."""

import io
from collections.abc import Callable


class OutputStream(io.TextIOBase):
    """`say(category, text)` gets whole lines."""

    def __init__(self, say: Callable[[str, str], None], category: str = "console") -> None:
        self._say, self._category, self._rest = say, category, ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._say(self._category, line.rpartition("\r")[2])
        return len(text)
