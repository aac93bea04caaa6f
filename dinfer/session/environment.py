"""Which rank a process is, where another launcher (torchrun, mpirun) has started it. Pure."""

from collections.abc import Mapping
from typing import NamedTuple

from dinfer.config import ConfigError


class Launched(NamedTuple):
    """This process's rank, as its launcher names it."""

    launcher: str
    rank: int
    world_size: int
    local_rank: int


class _Launcher(NamedTuple):
    name: str
    mark: str
    rank: str
    world_size: str
    local_rank: str


_LAUNCHERS = (
    _Launcher("torchrun", "TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    _Launcher(
        "mpirun",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
    ),
    _Launcher("mpirun", "PMI_RANK", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    _Launcher("a debugger", "DINFER_JOIN", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
)


def launched_as(environment: Mapping[str, str]) -> Launched | None:
    """The rank that the environment names, or None where this process was started by hand. Raises ConfigError."""
    for known in _LAUNCHERS:
        if known.mark in environment:
            rank = _number(known.rank, environment.get(known.rank))
            world_size = _number(known.world_size, environment.get(known.world_size))
            local_rank = _number(known.local_rank, environment.get(known.local_rank, str(rank)))
            return Launched(known.name, rank, world_size, local_rank)
    return None


def _number(name: str, value: str | None) -> int:
    if value is None or not value.isdigit():
        raise ConfigError(f"{name} is {value!r} in the environment; a launcher sets it to a whole number.")
    return int(value)
