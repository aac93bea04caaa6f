"""Of the environment, which rank this process is and where the ranks meet."""

from __future__ import annotations

import pytest

from dinfer.config import ConfigError
from dinfer.launch.environment import Launched, Meeting, launched_as, meeting_of, speaks

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "0"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}


@pytest.mark.parametrize(
    ("environment", "launched"),
    [
        ({}, None),
        ({"RANK": "1", "WORLD_SIZE": "3"}, None),  # not by a launcher that dinfer knows
        (TORCHRUN, Launched("torchrun", 2, 3, 0)),
        (OPEN_MPI, Launched("mpirun", 1, 4, 1)),
        ({"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0"}, Launched("mpirun", 0, 2, 0)),
        ({"DINFER_JOIN": "1", "RANK": "1", "WORLD_SIZE": "3"}, Launched("a debugger", 1, 3, 1)),
    ],
)
def test_a_launcher_names_the_rank(environment: dict[str, str], launched: Launched | None) -> None:
    assert launched_as(environment) == launched


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"RANK": "x"}, "RANK is 'x' in the environment"),
        ({"RANK": "²"}, "RANK is '²' in the environment"),
        ({"RANK": "3"}, "ranks count from 0"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is ''"),
    ],
)
def test_an_environment_that_makes_no_sense_is_refused(changes: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        launched_as({**TORCHRUN, **changes})


def test_the_environment_wins_over_the_config_as_to_where_to_meet() -> None:
    there = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert meeting_of(there, "127.0.0.1", 0) == Meeting("10.0.0.1", 29500, theirs=False)
    assert meeting_of({}, "10.0.0.2", 7) == Meeting("10.0.0.2", 7, theirs=False)
    assert meeting_of({**there, "TORCHELASTIC_USE_AGENT_STORE": "True"}, "", 0).theirs


@pytest.mark.parametrize("port", ["0", "70000"])
def test_a_port_must_be_named(port: str) -> None:
    with pytest.raises(ConfigError, match="no port to meet at: set MASTER_PORT"):
        meeting_of({"MASTER_PORT": port}, "127.0.0.1", 0)


def test_a_mistake_that_all_share_is_told_once_on_each_host() -> None:
    assert speaks(None)
    assert speaks(launched_as(TORCHRUN))
    assert not speaks(launched_as(OPEN_MPI))
    assert speaks(launched_as({"DINFER_JOIN": "1", "RANK": "1", "WORLD_SIZE": "3"}))
