"""Errors of clusters and of calls on their ranks."""

from collections.abc import Sequence

from dinfer.errors import DinferError


class ClusterError(DinferError, RuntimeError):
    """The cluster is not as requested; the message says what was found and what to do."""


class TooFewEngines(ClusterError):
    """The cluster has fewer engines than requested. `engines`: the ids of those that it has."""

    def __init__(self, message: str, engines: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.engines = tuple(engines)


class RankError(ClusterError):
    """A call failed on one rank; the message names it."""

    def __init__(self, rank: int, message: str, traceback: str = "") -> None:
        super().__init__(message)
        self.rank = rank
        self.traceback = traceback
        """the engine's, as text; "" for none"""


class RankGone(RankError):
    """The rank's engine has ended."""


class RankSilent(RankError):
    """The rank has not answered in time. The call may still take effect."""
