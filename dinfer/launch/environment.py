"""Which rank a process is, where another launcher (torchrun, mpirun, a debugger) has started it. Pure."""

from collections.abc import Mapping
from typing import NamedTuple

from dinfer.config import ConfigError


class Launched(NamedTuple):
    """This process's rank, as its launcher names it."""

    launcher: str
    rank: int
    world_size: int
    local_rank: int


class Meeting(NamedTuple):
    """Where the ranks of a launched run meet; `theirs`: the launcher itself holds the store there."""

    address: str
    port: int
    theirs: bool


class _Launcher(NamedTuple):
    name: str
    mark: str
    rank: str
    world_size: str
    local_rank: str


TORCHRUN, MPIRUN, DEBUGGER = "torchrun", "mpirun", "a debugger"

_LAUNCHERS = (
    _Launcher(TORCHRUN, "TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    _Launcher(
        MPIRUN,
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
    ),
    _Launcher(MPIRUN, "PMI_RANK", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    _Launcher(DEBUGGER, "DINFER_JOIN", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
)


def launched_as(environment: Mapping[str, str]) -> Launched | None:
    """The rank that the environment names, or None where this process was started by hand. Raises ConfigError."""
    for known in _LAUNCHERS:
        if known.mark in environment:
            rank = _number(known.rank, environment.get(known.rank))
            world_size = _number(known.world_size, environment.get(known.world_size))
            local_rank = _number(known.local_rank, environment.get(known.local_rank, str(rank)))
            if rank >= world_size:
                raise ConfigError(
                    f"{known.rank} is {rank} and {known.world_size} is {world_size} in the environment; "
                    "ranks count from 0."
                )
            return Launched(known.name, rank, world_size, local_rank)
    return None


def speaks(launched: Launched | None) -> bool:
    """Whether this process may print a mistake that others likely share: one on each host, so that it is read once."""
    return launched is None or launched.launcher == DEBUGGER or launched.local_rank == 0


def meeting_of(environment: Mapping[str, str], address: str, port: int) -> Meeting:
    """Where to meet: as the environment says, else as given. Raises ConfigError where no port is named."""
    port = _number("MASTER_PORT", environment.get("MASTER_PORT", str(port)))
    if not 0 < port < 65536:
        raise ConfigError(
            "no port to meet at: set MASTER_PORT in the environment, or master_port, to a free one "
            f"from 1 to 65535; it is {port}."
        )
    theirs = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Meeting(environment.get("MASTER_ADDR", address), port, theirs)


def _number(name: str, value: str | None) -> int:
    if value is None or not (value.isascii() and value.isdigit()):
        raise ConfigError(f"{name} is {value!r} in the environment; a launcher sets it to a whole number.")
    return int(value)
