"""Ranks: what a session needs of the processes, or threads, that are its ranks, beside what they say of themselves."""

from dinfer.engine.hosting.commands import Message
from dinfer.session.states import States


class Ranks(States):
    """Those who started the ranks, or joined them, implement this."""

    can_kill = True
    """whether a rank can be ended and started again alone"""

    @property
    def world_size(self) -> int:
        return len(self.ranks)

    def describe(self) -> str:
        """One line for people."""
        raise NotImplementedError

    def exits(self) -> list[int | None]:
        """By rank, an exit status where its process has ended."""
        raise NotImplementedError

    def cores(self) -> list[int]:
        """How many ranks share each rank's host."""
        raise NotImplementedError

    def meeting(self) -> Message:
        """Where the ranks' group is to meet: address and port."""
        raise NotImplementedError

    def silent(self) -> list[int]:
        """Ranks that do not answer though their process is there."""
        raise NotImplementedError

    def kill(self, rank: int) -> None:
        """End one rank's process."""
        raise NotImplementedError

    def revive(self, rank: int) -> None:
        """Start one rank again under its number."""
        raise NotImplementedError

    def listen_for_debugger(self, rank: int, port: int) -> tuple[str, int]:
        """Let a client of debugpy attach to one rank: on which host, at which port."""
        raise NotImplementedError

    def free(self) -> None:
        """Wake what is blocked in the transport, where that can be done from here."""

    def share_weights(self) -> None:
        """Let ranks of one process use one copy of the weights."""

    def close(self) -> None:
        """Part from the ranks."""
        raise NotImplementedError
