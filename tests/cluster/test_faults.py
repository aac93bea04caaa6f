"""A rank that fails, dies, leaves or stands still ends the run: soon, and with one message."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.fixtures import Start
from tests.support.runs import Fault, Run, is_alive, run_arguments, wait_for
from tests.support.twin import prompt

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

IDS = tuple(prompt(22))
"""within which a failure ends the other ranks"""
TIMEOUT_S = 10
AT = r"compute in `layer c1 l3`"
BLOCK = "while True: time.sleep(60)"
# A signal may take effect a little after kill has returned; the op must not go on meanwhile.
DIE, STOP = (f"os.kill(os.getpid(), signal.{name})\n{BLOCK}" for name in ("SIGKILL", "SIGSTOP"))


def broken_run(start: Start, model: Path, fault: Fault, **flags: object) -> Run:
    """A run on three ranks with a fault, once all its ranks are gone."""
    run = start(model, fault, prompt_ids=IDS, chunk_size=4, max_new_tokens=6, **flags)
    processes = run.started(3)
    wait_for(lambda: not any(_is_alive_rank(process) for process in processes), "all ranks are gone")
    return run


def message(run: Run) -> str:
    """What the run said on stderr: one message, and no traceback."""
    assert run.finish() == 1
    assert run.err.startswith("dinfer: ✖ error: ")
    assert run.err.count("dinfer: ") == 1
    assert "Traceback" not in run.err
    return run.err.removeprefix("dinfer: ✖ error: ")


def _is_alive_rank(process: psutil.Process) -> bool:
    try:
        return is_alive(process) and "dinfer.rank.worker" in process.cmdline()
    except psutil.Error:
        return False


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (
            Fault("raise ValueError('broken on purpose')"),
            r"rank 1 failed at `layer c1 l3` \(lane compute\): ValueError: broken on purpose\n",
        ),
        pytest.param(
            Fault(DIE), rf"rank 1 was killed by SIGKILL; it stood at: .*{AT}", marks=pytest.mark.slow
        ),
        pytest.param(
            Fault("os._exit(7)"),
            rf"rank 1 ended with exit status 7; it stood at: .*{AT}",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            Fault("raise MemoryError('no room')", rank=2, kind="recv"),
            r"rank 2 failed at `recv kv c1 l3 <- 1, 4 tokens` \(lane [^)]*\): MemoryError: no room\n"
            r"Out of memory on cpu: an unknown amount was asked for",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            Fault("import torch; torch.empty(1 << 50)"),
            r"rank 1 failed at `layer c1 l3` \(lane compute\): RuntimeError: .* 4503599627370496 bytes.*\n"
            r"Out of memory on cpu: 4,194,304.0 GiB was asked for, .* No single change saves the missing .*\n"
            r"The whole traceback is in ",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            Fault("sys._getframe(2).f_locals['state'].hidden[1, 3][0, 2] = float('nan')"),
            r"the logits of new token 0 are not finite \(NaN or Inf\) on all ranks\. The first NaN or Inf is in "
            r"layer 3, chunk 1 \(token 6\) of the KV on all ranks: computed by rank 1; ",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            Fault("raise KeyError('gone')", rank=0, kind="layer", chunk=5, layer=0),
            r"rank 0 failed at `layer c5 l0` \(lane compute\): KeyError: 'gone'\n",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            Fault("os._exit(0)"),
            rf"rank 1 ended with exit status 0; it stood at: .*{AT}",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            Fault("raise ValueError('lost for words')", kind="token", chunk=3),
            r"rank 1: ValueError: lost for words\n",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            Fault(DIE, kind="token", chunk=3),
            r"rank 1 was killed by SIGKILL; it stood at: decode, token 3\n",
            marks=pytest.mark.slow,
        ),
    ],
    ids=[
        "raises",
        "dies",
        "exits",
        "recv",
        "no memory",
        "NaN",
        "rank0",
        "exits0",
        "decode raises",
        "decode dies",
    ],
)
def test_the_others_stop_and_the_cause_is_named(fault: Fault, words: str, model: Path, start: Start) -> None:
    run = broken_run(start, model, fault)
    assert re.match(words, message(run)), run.err


@pytest.mark.parametrize(
    ("action", "words", "advice"),
    [
        pytest.param(
            BLOCK,
            rf"rank 1: .*{AT}[^(]*$",
            r"^rank 1 is in `layer c1 l3` and stuck in Python .*; ranks 0 and 2 wait for it.*DINFER_DEBUGPY=1",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            STOP,
            rf"rank 1: .*{AT}.*\(its process is stopped\)$",
            r"^rank 1 is stopped .*kill -CONT",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["blocked", "stopped"],
)
def test_no_progress_ends_the_run_with_each_position(
    action: str, words: str, advice: str, model: Path, start: Start
) -> None:
    run = broken_run(start, model, Fault(action), timeout=TIMEOUT_S)
    said = message(run)
    assert re.match(r"no rank has made progress for \d+ s \(timeout\); where they stand:\n", said)
    assert re.search(words, said, re.MULTILINE), said
    assert re.search(advice, said, re.MULTILINE), said
    assert len(re.findall(r"^rank [02]: .* in `recv ", said, re.MULTILINE)) == 2


@pytest.mark.slow
def test_an_error_ranks_above_those_who_wait(model: Path, start: Start) -> None:
    """Rank 1 stands still, so rank 2 waits for it, and rank 0 raises after a while: that is the cause."""
    late = "while time.monotonic() - float((folder / 'fault.at').read_text().split()[0]) < 1: pass\n"
    fault = Fault(late + "raise ValueError('the first domino')", rank=0, chunk=2, layer=1)
    run = broken_run(start, model, fault, timeout=60)
    assert re.match(r"rank 0 failed at `layer c2 l1` .*: ValueError: the first domino\n", message(run))


@pytest.mark.slow
def test_the_traceback_is_in_the_log(model: Path, start: Start) -> None:
    run = broken_run(start, model, Fault("raise ValueError('深い所')"))
    named = re.search(r"The whole traceback is in (\S+)\.\n", message(run))
    assert named
    text = (run.folder / named[1]).read_text(encoding="utf-8")
    assert "Traceback" in text
    assert "ValueError: 深い所" in text


def test_a_refuted_schedule_hangs_as_foretold(model: Path, start: Start) -> None:
    """Run all the same, with --unsafe, it ends by its timeout; every rank stands at the send of the cycle."""
    run = start(model, prompt_ids=IDS, chunk_size=4, schedule="batched", unsafe=True, timeout=TIMEOUT_S)
    assert run.finish() == 1
    said = message(run)
    assert "no rank has made progress" in said
    circle = "deadlock: rank 0 waits for rank 1 to take block c0 l0"
    assert f"no progress: {circle}" in run.out  # told long before
    assert f"\n{circle}" in said
    assert all(
        re.search(rf"^rank {rank}: \d+ of \d+ ops done; .* in `send kv", said, re.M) for rank in range(3)
    )
    assert said.splitlines()[-1].startswith(circle)
    assert "dinfer verify" in said.splitlines()[-1]


def test_files_of_the_working_folder_stand_in_for_no_module(model: Path, tmp_path: Path) -> None:
    """A script finds its modules in its own folder, as `dinfer` does, so what matters are the ranks."""
    for name in ("types", "queue", "transformers"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('not this one')\n")
    program = (str(Path(sys.executable).with_name("dinfer")),)
    flags: dict[str, Any] = {"world_size": 1, "prompt_ids": IDS, "chunk_size": 4, "max_new_tokens": 1}
    run = Run(tmp_path, run_arguments(model, **flags), {}, program)
    try:
        assert run.finish() == 0, run.err
    finally:
        run.end()
