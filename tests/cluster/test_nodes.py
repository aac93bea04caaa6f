"""env/launch on several hosts, here network namespaces: the same result, and a host that is cut off is named."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from dinfer.lab.hosts import LabNetwork, hosts
from tests.support.hosted import cut_off, needs_hosts
from tests.support.parrot import C_LOCALE, FLAGS, check_parroted
from tests.support.runs import Fault, Run, run_arguments, wait_for
from tests.support.twin import prompt

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(500), needs_hosts]

IDS = tuple(prompt(22))
LAUNCH = str(Path(__file__).parents[2] / "env" / "launch")
TIMEOUT_S = 16
BLOCK = "while True: time.sleep(60)"
ENDS = re.compile(r"^dinfer: (?!talking over |machine \d+: )", re.MULTILINE)
"""what dinfer says of a run's end; the lines before it tell how the hosts find one another"""


class Nodes:
    """Three hosts, and what env/launch runs on them."""

    def __init__(self, network: LabNetwork, folder: Path, model: Path) -> None:
        self.network, self._folder, self.model = network, folder, model
        self.runs: dict[int, Run] = {}

    def launch(self, rank: int, fault: Fault | None = None, **flags: object) -> Run:
        """env/launch on the host of that rank, in a folder of its own."""
        master = self.network.hosts[0].address
        program = self.network.hosts[rank].inside(
            LAUNCH, "--nodes", "3", "--node-rank", str(rank), "--master-addr", master, "--"
        )
        if "prompt" not in flags:
            flags = {"prompt_ids": IDS, "chunk_size": 4, "max_new_tokens": 6, **flags}
        arguments = run_arguments(self.model, **flags)[1:]  # env/launch says "run" itself
        environment = {**C_LOCALE, **(fault.environment(self._folder) if fault else {})}
        self.runs[rank] = Run(self._folder / f"host{rank}", arguments, environment, program)
        return self.runs[rank]

    def members(self) -> list[psutil.Process]:
        """What still runs on all hosts."""
        return [process for run in self.runs.values() for process in run.members()]


@pytest.fixture
def nodes(tmp_path: Path, model: Path) -> Iterator[Nodes]:
    """Three hosts that share no file but the checkpoint."""
    with hosts(3) as network:
        nodes = Nodes(network, tmp_path, model)
        yield nodes
        for run in nodes.runs.values():
            run.end()


def test_three_hosts_get_what_one_gets(nodes: Nodes, parrot: Path) -> None:
    nodes.model = parrot
    first, last = nodes.launch(0, **FLAGS), nodes.launch(2, **FLAGS)
    wait_for(lambda: "waiting for machine 1 " in first.err, "machine 0 says who is missing")
    nodes.launch(1, **FLAGS)
    check_parroted(first, parrot)
    assert [nodes.runs[rank].finish() for rank in range(3)] == [0, 0, 0]
    assert f"talking over eth0 ({nodes.network.hosts[2].address})" in last.err
    assert not nodes.runs[1].out
    assert not last.out
    wait_for(lambda: not nodes.members(), "no process is left")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 2])
def test_a_host_that_is_cut_off_is_named(nodes: Nodes, tmp_path: Path, rank: int) -> None:
    fault = Fault(BLOCK, rank=1)
    first, *_ = [nodes.launch(n, fault, timeout=TIMEOUT_S) for n in range(3)]
    wait_for((tmp_path / "fault.at").exists, "rank 1 is in a layer")
    wait_for(lambda: f"rank {rank}  prefill" in first.out, "rank 0 has heard where the rank stands")
    cut_off(nodes.network, rank)
    named = re.compile(
        rf"^dinfer: ✖ error: rank {rank} has not been heard of for .*stood at: \d+ of", re.MULTILINE
    )
    wait_for(lambda: named.search(first.err), "the rank is named")
    wait_for(lambda: not nodes.members(), "no process is left on any host")
    assert all(run.finish() != 0 for run in nodes.runs.values())
    assert sum(len(ENDS.findall(run.err)) for run in nodes.runs.values()) == 1, "one host says why, once"


@pytest.mark.slow
def test_rank_0_being_cut_off_ends_all(nodes: Nodes, tmp_path: Path) -> None:
    first, *_ = [nodes.launch(n, Fault(BLOCK), timeout=TIMEOUT_S) for n in range(3)]
    wait_for((tmp_path / "fault.at").exists, "rank 1 is in a layer")
    cut_off(nodes.network, 0)
    wait_for(lambda: "rank 0's host may be cut off" in first.err, "rank 0 says so")
    wait_for(lambda: not nodes.members(), "no process is left on any host")


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--help"], 0, r"Start `dinfer run` under torchrun"),
        (["--nodes", "3"], 2, r"flags of dinfer run are missing"),
        (["--nodes", "3", "--", "--prompt", "x"], 2, r"--master-addr is missing"),
        (["--nodes", "2", "--node-rank", "2", "--master-addr", "10.77.0.1", "--", "x"], 2, r"at most 1"),
        (["--nproc", "0", "--", "x"], 2, r"--nproc is '0'; it must be a whole number, at least 1"),
        (["--prompt", "x"], 2, r"there is no flag '--prompt' here"),
        (["--nodes", "2", "--node-rank", "1", "--master-addr", "127.0.0.1", "--", "x"], 2, r"loopback"),
        (
            ["--nodes", "2", "--master-addr", "10.77.0.1", "--", "--prompt", "a b"],
            0,
            r"env/launch --nodes 2 --node-rank 1 --master-addr 10\.77\.0\.1 --master-port 29500 -- --prompt a\\ b",
        ),
    ],
)
def test_env_launch_says_what_it_needs(arguments: list[str], status: int, words: str) -> None:
    done = subprocess.run(
        ["bash", LAUNCH, *arguments], capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == status, done.stderr
    assert re.search(words, done.stdout + done.stderr)
