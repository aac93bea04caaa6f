"""`dinfer watch` on programs of other people's kind: the defects that they have are named, and nothing else is.

Each program runs by torchrun on gloo, unchanged, and knows nothing of dinfer.
"""

import json
import sys
from pathlib import Path

import pytest

import dinfer
from tests.support.watched import WatchedRun, torchrun, watch

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

TOLD_S = 8.0
"""within 5 s on a machine that is not busy; these run beside others"""

HANGS = {
    "gather_against_recv": ("cycle", 0, ("`all_gather` ([8, 2] float32) at defects.py:", "`recv <- 0`")),
    "one_send_for_two_recvs": ("cycle", 0, ("`barrier` at defects.py:", "`recv <- 0` ([8, 2] float32)")),
    "exception_then_barrier": ("exception", 1, ("ValueError: a shape that does not fit", "`barrier`")),
    "both_send_first": ("cycle", 0, ("`send -> 1` ([8, 2] float32)", "`send -> 0`")),
    "micro_batches": ("cycle", 0, ("`all_reduce`", "`recv <- 0`")),
    "group_on_one_rank": ("cycle", 1, ("`new_group`", "`all_reduce`")),
    "stops_in_python": ("stuck in Python", 1, ("`time.sleep(1000)` in stops_in_python", "`all_reduce`")),
    "stops_in_c": ("stuck in C", 1, ("the GIL", "stops_in_c (defects.py:", "`all_reduce`")),
    "stops_by_signal": ("stopped", 1, ("stopped by a signal", "`all_reduce`")),
    "dies": ("dead", 1, ("a signal killed it", "defects.py:")),
    "raises": ("exception", 1, ("ValueError: a shape that does not fit at defects.py:",)),
}
"""the kind of the verdict, the rank to blame first, and what else is said"""

FINDINGS = {
    "other_size": ("other size", 0, "[4, 2] float32"),
    "other_dtype": ("other size", 0, "int32"),
    "crossed": ("crossed", 1, "messages crossed"),
    "appended_twice": ("rows repeated", 1, "of layer 0"),
    "slow": ("slow rank", 1, "is slow"),
}

HEALTHY = ["one_f_one_b", "ring_attention", "tensor_parallel", "long_computation", "objects_beside_tensors"]


def assert_hang(run: WatchedRun, kind: str, rank: int, words: tuple[str, ...]) -> None:
    verdict = run.told["verdict"]
    assert verdict, run.errors
    assert (verdict["kind"], verdict["ranks"][0]) == (kind, rank), verdict
    for word in words:
        assert word in verdict["text"], (word, verdict["text"])
    assert verdict["text"] in run.errors
    assert run.status != 0
    assert run.told["exit_status"] == run.status


def assert_healthy(run: WatchedRun, n: int) -> None:
    assert (run.status, run.told["verdict"], run.told["findings"]) == (0, None, []), run.errors
    assert "✖" not in run.errors
    assert run.output.count("WELL") == n
    assert all(rank["hook"] != "none" and rank["ops"] for rank in run.told["ranks"]), run.told["ranks"]


def test_a_hang_is_told_with_both_lines_and_explained_again_from_its_records(tmp_path: Path) -> None:
    run = watch(torchrun("defects.py", "gather_against_recv"), tmp_path, "--report", str(tmp_path / "a.html"))
    assert_hang(run, *HANGS["gather_against_recv"])
    assert run.told_s is not None
    assert run.told_s < TOLD_S
    assert run.told["links"][0]["messages"] == 3
    assert "0→1" in run.errors
    text = run.told["verdict"]["text"]
    assert "all_gather" in (tmp_path / "a.html").read_text()
    trace = tmp_path / "watch/trace.jsonl"
    again = watch_explained(trace, tmp_path / "again.json")
    assert again["verdict"]["kind"] == "cycle"
    assert again["verdict"]["text"] == text


def watch_explained(path: Path, told: Path) -> dict[str, dict[str, object]]:
    from typer.testing import CliRunner

    from dinfer.cli import app

    CliRunner().invoke(app, ["explain", str(path), "--json", str(told)])
    found: dict[str, dict[str, object]] = json.loads(told.read_text())
    return found


def test_a_pipeline_in_which_nothing_is_wrong_raises_no_alarm(tmp_path: Path) -> None:
    assert_healthy(watch(torchrun("healthy.py", "one_f_one_b", n=3), tmp_path), 3)


def test_a_command_in_a_notebook_is_watched_meanwhile() -> None:
    command = torchrun("defects.py", "both_send_first")
    with dinfer.watch(command, environment={"OMP_NUM_THREADS": "1"}) as watched:
        assert watched.status is None
        deadline = 120 / 0.2
        while not (verdict := watched.verdict()).is_hung and deadline:
            deadline -= 1
            with pytest.raises(TimeoutError):
                watched.wait(0.2)
        assert (verdict.kind, verdict.ranks) == ("cycle", (0, 1))
        assert "`send -> 1`" in str(watched.where())
        assert {event.kind for event in watched.trace.events} >= {"send", "recv", "all_reduce"}
        assert "DEFECT" in str(watched.output())
    assert watched.status != 0
    assert watched.verdict().kind == "cycle"  # though it was killed since


@pytest.mark.slow
@pytest.mark.parametrize("name", HANGS)
def test_every_defect_that_hangs(name: str, tmp_path: Path) -> None:
    n = 3 if name == "one_send_for_two_recvs" else 2
    run = watch(torchrun("defects.py", name, n=n), tmp_path)
    assert_hang(run, *HANGS[name])
    assert run.told_s is not None
    assert run.told_s < TOLD_S


@pytest.mark.slow
@pytest.mark.parametrize("name", FINDINGS)
def test_every_defect_that_ends(name: str, tmp_path: Path) -> None:
    run = watch(torchrun("defects.py", name), tmp_path)
    assert (run.status, run.told["verdict"]) == (0, None)
    kind, rank, words = FINDINGS[name]
    (found,) = run.told["findings"]
    assert (found["kind"], found["ranks"][0]) == (kind, rank)
    assert words in found["text"]
    assert found["text"] in run.errors


@pytest.mark.slow
def test_a_message_to_a_wrong_group_rank(tmp_path: Path) -> None:
    """The wait is never over; the message that went elsewhere was never received."""
    run = watch(torchrun("defects.py", "wrong_group_rank", n=3), tmp_path)
    verdict = run.told["verdict"]
    assert verdict
    assert "`recv <- 0`" in verdict["text"]
    assert "defects.py:" in verdict["text"]


@pytest.mark.slow
def test_a_send_that_nobody_waits_for(tmp_path: Path) -> None:
    """Whether it hangs is a race: the handle may be dropped before or after the message has left."""
    run = watch(torchrun("defects.py", "never_waited"), tmp_path)
    found = [run.told["verdict"], *run.told["findings"]]
    named = [one for one in found if one and "`send -> 1`" in one["text"]]
    assert named, run.errors
    assert named[0]["ranks"][0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", HEALTHY)
def test_every_program_that_is_right(name: str, tmp_path: Path) -> None:
    assert_healthy(watch(torchrun("healthy.py", name, n=3), tmp_path), 3)


def test_the_status_is_the_commands_own(tmp_path: Path) -> None:
    run = watch([sys.executable, "-c", "import sys; print('hello'); sys.exit(7)"], tmp_path)
    assert (run.status, run.output, run.told["verdict"]) == (7, "hello\n", None)
    assert "no torch.distributed ops were seen" in run.errors
