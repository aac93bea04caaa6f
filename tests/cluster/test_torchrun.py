"""`torchrun -m dinfer run`: processes join as the ranks that torchrun names; rank 0 alone speaks."""

from __future__ import annotations

import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.support.parrot import C_LOCALE, FLAGS, check_parroted
from tests.support.runs import Fault, Run, fault_time, run_arguments, wait_for
from tests.support.tiny import tiny_checkpoint
from tests.support.twin import prompt

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

IDS = tuple(prompt(22))
TORCHRUN = (
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node=3",
    "-m",
    "dinfer",
)
PAIR = tuple(word.replace("=3", "=2") for word in TORCHRUN)
BLOCK = "while True: time.sleep(60)"
AT = r"compute in `layer c1 l3`"
Launch = Callable[..., Run]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """launch(model, fault=None, **flags): three ranks under torchrun, ended with the test."""
    runs: list[Run] = []

    def launched(
        model: Path,
        fault: Fault | None = None,
        program: Sequence[str] = TORCHRUN,
        environment: dict[str, str] | None = None,
        **flags: object,
    ) -> Run:
        more = {**(environment or {}), **(fault.environment(tmp_path) if fault else {})}
        flags = (
            flags if "prompt" in flags else {"prompt_ids": IDS, "chunk_size": 4, "max_new_tokens": 6, **flags}
        )
        runs.append(Run(tmp_path, run_arguments(model, **flags), more, program))
        return runs[-1]

    yield launched
    for run in runs:
        run.end()


def said(run: Run) -> list[str]:
    """What dinfer said on stderr, torchrun's own summary left out."""
    return re.findall(
        r"^dinfer: (?:✖ error: )?(.*(?:\n(?:rank \d|The whole|Its log).*)*)", run.err, re.MULTILINE
    )


def message(run: Run) -> str:
    """The one message of a run that failed, once nothing of it is left."""
    assert run.finish() != 0
    wait_for(lambda: not run.members(), "no process is left")
    assert len(said(run)) == 1, run.err
    return said(run)[0]


def test_ranks_join_and_agree_with_transformers(parrot: Path, launch: Launch) -> None:
    run = launch(parrot, environment=C_LOCALE, **FLAGS)
    check_parroted(run, parrot)
    assert sorted(path.name for path in run.logs.iterdir()) == [
        "rank0.log",
        "rank1.log",
        "rank2.log",
        "trace.jsonl",
    ]
    assert said(run) == []
    wait_for(lambda: not run.members(), "no process is left")
    assert run.out.count("rank  device") == 1


def test_ranks_that_torchrun_has_started_measure_and_run_what_is_chosen(model: Path, launch: Launch) -> None:
    run = launch(model, program=PAIR, chunk_size="auto", layer_split="auto")
    assert run.finish() == 0, run.err
    found = run.result()
    assert [line.split()[0] for line in found["chosen"]["because"]] == [
        "chunk_size", "layer_split", "world_size",
    ]  # fmt: skip
    assert run.out.count("chunk_size ") == 1, "one rank alone says it"
    assert len({rank["kv_sha256"] for rank in found["ranks"]}) == 1


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        pytest.param(
            Fault("raise ValueError('broken on purpose')"),
            r"rank 1 failed at `layer c1 l3` \(lane compute\): ValueError: broken on purpose\n",
            marks=pytest.mark.slow,
        ),
        (Fault("os.kill(os.getpid(), 9)", rank=2, layer=5), r"rank 2 is gone: .*stood at: .*`layer c1 l5`"),
        pytest.param(
            Fault("raise KeyError('gone')", rank=0, chunk=5, layer=0),
            r"rank 0 failed at `layer c5 l0` \(lane compute\): KeyError: 'gone'\n",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            Fault("os.kill(os.getpid(), 9)", rank=0, layer=1),
            r"rank 0, which leads the run, is gone\. Rank 1: ",
            marks=pytest.mark.slow,
        ),
        pytest.param(Fault("os._exit(0)"), rf"rank 1 is gone: .*{AT}", marks=pytest.mark.slow),
        pytest.param(
            Fault("raise ValueError('lost for words')", kind="token", chunk=3),
            r"rank 1: .*ValueError: lost for words",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["raises", "killed", "leader raises", "leader killed", "leaves", "raises in decode"],
)
def test_a_rank_that_fails_ends_all_with_one_message(
    fault: Fault, words: str, model: Path, launch: Launch
) -> None:
    run = launch(model, fault)
    assert re.match(words, message(run)), run.err
    assert fault_time(run.folder)


@pytest.mark.slow
def test_no_progress_names_each_position(model: Path, launch: Launch) -> None:
    run = launch(model, Fault(BLOCK), timeout=8)
    text = message(run)
    assert re.match(r"no rank has made progress for \d+ s", text)
    assert re.search(rf"^rank 1: .*{AT}", text, re.MULTILINE)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_to_torchrun_is_an_interruption(number: signal.Signals, model: Path, launch: Launch) -> None:
    run = launch(model, Fault(BLOCK, layer=5), PAIR)
    wait_for((run.folder / "fault.at").exists, "rank 1 is blocked")
    run.process.send_signal(number)
    assert message(run) == "interrupted; all ranks were ended."


@pytest.mark.slow
def test_ranks_of_other_versions_and_checkpoints_are_told_apart(
    model: Path, launch: Launch, tmp_path: Path
) -> None:
    """Each host has its own `checkpoint` folder; here, each rank its own working folder, by a wrapper."""
    mine = tmp_path / "other"
    tiny_checkpoint(mine / "checkpoint", seed=1)
    shutil.copytree(model, tmp_path / "checkpoint")
    (tmp_path / "wrapped.py").write_text(
        "import os\n"
        "import dinfer.version\n"
        "if os.environ['RANK'] == '2':\n"
        "    dinfer.version.__version__ = '0.0.9'\n"
        f"    os.chdir({str(mine)!r})\n"
        "from dinfer.cli import main\n"
        "main()\n"
    )
    run = launch(Path("checkpoint"), program=(*TORCHRUN[:-2], "wrapped.py"))
    text = message(run)
    assert re.match(
        r"the ranks do not run the same thing\. dinfer: ranks 0, 1 [\d.]+; rank 2 0\.0\.9\. "
        r"checkpoint: ranks 0, 1 \w{16}; rank 2 \w{16}\.",
        text,
    )


def test_a_mistake_that_all_ranks_share_is_told_once(model: Path, launch: Launch) -> None:
    assert message(launch(model, program=PAIR, chunk_size=0)).startswith(
        "chunk_size is 0; it must be at least 1."
    )


@pytest.mark.slow
def test_a_rank_that_cannot_take_part_is_named(model: Path, launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "wrapped.py").write_text(
        "import os, sys\n"
        "from dinfer.cli import main\n"
        "if os.environ['RANK'] == '1': sys.argv += ['--model', '/nowhere/at/all']\n"
        "main()\n"
    )
    run = launch(model, program=(*TORCHRUN[:-2], "wrapped.py"))
    assert message(run).startswith("rank 1: folder /nowhere/at/all does not exist")
