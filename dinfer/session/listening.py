"""Where a debugger can attach to a rank."""

from dataclasses import dataclass

from dinfer.display import Displayable
from dinfer.rank.debugger import FIRST_PORT


@dataclass(frozen=True, repr=False)
class Listening(Displayable):
    """A rank that waits for a client of debugpy at this port of 127.0.0.1 on its host."""

    rank: int
    host: str
    port: int

    def __str__(self) -> str:
        return (
            f"rank {self.rank} listens for a debugger at 127.0.0.1:{self.port} on {self.host}: attach from VS Code "
            f'("Attach to rank {self.rank}", which `dinfer vscode` writes, has port {FIRST_PORT + self.rank}) or any '
            "client of debugpy. While the rank stands at a breakpoint, the other ranks wait at a cut."
        )
