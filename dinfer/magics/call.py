"""What a verb is given, and what it returns where that is only text."""

from argparse import Namespace
from typing import Any, NamedTuple

from dinfer.display import Displayable
from dinfer.errors import NotPossible
from dinfer.session.session import Session


class Text(Displayable):
    """Lines to be shown."""

    def __init__(self, lines: list[str]) -> None:
        self._text = "\n".join(lines)

    def __str__(self) -> str:
        return self._text


class Call(NamedTuple):
    """What a verb is given: the shell and the words of the line."""

    shell: Any
    words: Namespace

    @property
    def session(self) -> Session:
        """The one that the user calls `session`, else the newest that has a name. Raises RuntimeError."""
        names = self.shell.user_ns
        for value in (names.get("session"), *reversed(list(names.values()))):
            if isinstance(value, Session):
                return value
        raise NotPossible("there is no session yet: %dinfer connect, or session = dinfer.connect(n=3).")

    @property
    def run(self) -> Any:
        return self.session.run
