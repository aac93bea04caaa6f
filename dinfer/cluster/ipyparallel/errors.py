"""What can go wrong with a cluster, as one message each."""

from dinfer.errors import DinferError


class ClusterError(DinferError, RuntimeError):
    """The cluster is not as asked for; the message says what was found and what to do."""


class TooFewEngines(ClusterError):
    """The cluster has fewer engines than asked for."""


class RankError(ClusterError):
    """A call failed on one rank; the message names it."""

    def __init__(self, rank: int, message: str, traceback: str = "") -> None:
        super().__init__(message)
        self.rank = rank
        self.traceback = traceback
        """as text, from the engine; "" where there is none"""


class RankGone(RankError):
    """The rank's engine has ended."""


class RankSilent(RankError):
    """The rank has not answered in time. What it was asked to do may still happen."""
