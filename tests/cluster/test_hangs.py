"""Real engines whose runs stop moving, each for another reason: named unasked, with its line, and got over."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dinfer.run.run import Run
from dinfer.session.session import Session
from dinfer.verdict.verdict import Verdict
from tests.support.runs import wait_for
from tests.support.spies import may_spy
from tests.support.twin import prompt

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

IDS = tuple(prompt(22))

_ARM = """
import ctypes, os, pathlib, signal, time
from dinfer.engine import ops
def broken(state, op, comm, unbroken=ops.HANDLERS[{kind!r}]):
    if str(op) == {op!r}:
        ops.HANDLERS[{kind!r}] = unbroken
        path = pathlib.Path({path!r})
        path.with_suffix(".part").write_text(str(time.monotonic()))
        path.with_suffix(".part").rename(path)
        {action}
    return unbroken(state, op, comm)
ops.HANDLERS[{kind!r}] = broken
"""


@pytest.fixture(autouse=True)
def mended(session: Session) -> Iterator[None]:
    """A test that fails leaves its mark on no other."""
    yield
    if session.run.failure or session.run.silence or session.run.told:
        session.recover()


def begin(session: Session, **parameters: Any) -> Run:
    return session.prefill(IDS, paused=True, chunk_size=4, max_new_tokens=4, **parameters)


def arm(session: Session, rank: int, op: str, action: str, path: Path) -> None:
    """Have that rank do this, once, when it comes to that op."""
    source = path.with_name("fault.py")  # a file, so that the line that is stuck can be read
    source.write_text(_ARM.format(kind=op.split()[0], op=op, action=action, path=str(path)), encoding="utf-8")
    run = f"exec(compile(open({str(source)!r}).read(), {str(source)!r}, 'exec'), {{}})"
    cluster = session.ranks.cluster  # type: ignore[attr-defined]  # its ranks are engines
    cluster.call(rank, "builtins:exec", run, {}, timeout=60)


def told(session: Session, run: Run, path: Path | None = None) -> Verdict:
    """The verdict, once somebody has said it unasked."""
    before = time.monotonic()
    wait_for(lambda: run.hang or run.failure or run.silence, f"it is told: {run.where()}")
    took = time.monotonic() - (float(path.read_text()) if path else before)
    verdict = run.verdict()
    print(f"\n{verdict.kind}, {took:.2f} s after it: {verdict.sentence}")
    wait_for(lambda: says_the_same(session, run), "all say the same")
    return verdict


def says_the_same(session: Session, run: Run) -> bool:
    """The sentence may change once: when py-spy has seen more."""
    sentence = run.verdict().sentence
    is_shown = run.standing().message.splitlines()[0] == sentence
    return is_shown and any(sentence in line for line in session.log)


def check_seen(run: Run, sentence: str, stack: str) -> None:
    """What py-spy, where it may look, has seen of rank 1 comes with the verdict."""
    if may_spy():

        def is_seen() -> bool:
            verdict = run.verdict()
            return sentence in verdict.sentence and stack in verdict.stacks.get(1, "")

        wait_for(is_seen, f"it is seen: {run.verdict()}")
        print(run.verdict().sentence)


def check_goes_on(session: Session) -> None:
    began = time.monotonic()
    said = session.recover()
    print(f"recovered in {time.monotonic() - began:.1f} s: {said}")
    run = begin(session)
    run.decode()
    assert len(set(run.sha256())) == 1


def test_a_circle_of_blocking_sends(session: Session) -> None:
    run = begin(session, schedule="batched", unsafe=True)
    run.resume()
    verdict = told(session, run)
    assert (verdict.kind, verdict.ranks) == ("cycle", (0, 1, 2))
    assert all("gloo.py" in verdict.stacks[rank] for rank in range(3))
    check_goes_on(session)


OP = "layer c2 l3"  # of rank 1


@pytest.mark.slow
def test_a_sleep_in_python(session: Session, tmp_path: Path) -> None:
    run = begin(session)
    arm(session, 1, OP, "time.sleep(600)", tmp_path / "struck")
    run.resume()
    verdict = told(session, run, tmp_path / "struck")
    assert (verdict.kind, verdict.rank, verdict.blocked) == ("stuck in Python", 1, (0, 2)), verdict
    assert f"rank 1 is in `{OP}` and stuck in Python (" in verdict.sentence
    assert "at `time.sleep(600)` in broken (fault.py:" in verdict.sentence
    assert set(verdict.stacks) == {0, 1, 2}
    check_goes_on(session)


@pytest.mark.slow
def test_a_c_call_that_lets_others_go_on(session: Session, tmp_path: Path) -> None:
    run = begin(session)
    arm(session, 1, OP, "ctypes.CDLL(None).usleep(600_000_000)", tmp_path / "struck")
    run.resume()
    verdict = told(session, run, tmp_path / "struck")
    assert (verdict.kind, verdict.rank) == ("stuck in C", 1), verdict
    check_seen(run, "), in usleep → ", "in usleep (libc")
    check_goes_on(session)


def test_a_c_call_that_holds_the_interpreter(session: Session, tmp_path: Path) -> None:
    """The rank cannot say anything; its stacks come all the same."""
    run = begin(session)
    arm(session, 1, OP, "ctypes.PyDLL(None).usleep(600_000_000)", tmp_path / "struck")
    run.resume()
    told(session, run, tmp_path / "struck")
    # Threads that wait for the interpreter use some CPU time, for which a slow machine calls the rank slow at times.
    found: list[Verdict] = []

    def is_stuck() -> bool:
        found.append(run.verdict())
        return found[-1].kind == "stuck in C"

    wait_for(is_stuck, "it is called stuck")
    verdict = found[-1]
    assert verdict.rank == 1, verdict
    assert "holds the interpreter (the GIL)" in verdict.sentence
    assert "in broken (fault.py:" in verdict.sentence
    assert "in broken" in verdict.stacks[1]
    check_seen(run, "), in usleep → ", "rank 1 compute, which holds the interpreter (the GIL):")
    check_goes_on(session)


@pytest.mark.slow
def test_a_send_that_holds_the_interpreter(session: Session, tmp_path: Path) -> None:
    """Of all the lanes of a rank that cannot speak, the one that is to blame is named."""
    run = begin(session)
    op = "send kv c1 l3 -> 2, 4 tokens"
    arm(session, 1, op, "ctypes.PyDLL(None).usleep(600_000_000)", tmp_path / "struck")
    run.resume()
    told(session, run, tmp_path / "struck")
    check_seen(run, f"rank 1 is in `{op}` and stuck in C code that holds the interpreter", "in usleep (libc")
    check_goes_on(session)


@pytest.mark.slow
def test_an_exception_in_a_layer(session: Session, tmp_path: Path) -> None:
    run = begin(session)
    arm(session, 1, OP, "raise RuntimeError('boom')", tmp_path / "struck")
    run.resume()
    verdict = told(session, run, tmp_path / "struck")
    assert (verdict.kind, verdict.rank) == ("exception", 1)
    assert "RuntimeError: boom" in verdict.sentence
    assert f"`{OP}`" in verdict.sentence
    check_goes_on(session)


@pytest.mark.parametrize(
    ("number", "kind"),
    [(signal.SIGSTOP, "stopped"), pytest.param(signal.SIGKILL, "dead", marks=pytest.mark.slow)],
)
def test_a_rank_that_is_stopped_or_killed(
    session: Session, tmp_path: Path, number: signal.Signals, kind: str
) -> None:
    run = begin(session)
    arm(session, 1, OP, f"os.kill(os.getpid(), {int(number)}); time.sleep(600)", tmp_path / "struck")
    run.resume()
    verdict = told(session, run, tmp_path / "struck")
    assert (verdict.kind, verdict.rank) == (kind, 1), verdict
    assert f"in `{OP}`" in verdict.sentence
    if kind == "stopped":
        check_seen(run, verdict.sentence, "in broken")
    check_goes_on(session)


def test_a_rank_that_only_takes_long(session: Session, tmp_path: Path) -> None:
    """CPU time moves: it is called slow, and nothing is raised."""
    run = begin(session)
    arm(session, 1, OP, "while not path.with_name('go').exists(): pass", tmp_path / "struck")
    run.resume()
    wait_for(lambda: run.hang, f"it is told: {run.where()}")
    verdict = run.verdict()
    assert (verdict.kind, verdict.rank, verdict.is_hung) == ("computing", 1, False), verdict
    (tmp_path / "go").touch()
    assert run.wait(60).state == "done"


def test_watching_a_run_that_moves_raises_no_alarm(session: Session) -> None:
    for _ in range(5):
        run = begin(session)
        run.resume()
        run.wait(60)
        assert run.verdict().kind == "done"
        assert run.hang == ""


def test_a_rank_alone_in_this_process_is_the_rank_of_the_cluster(session: Session) -> None:
    run = begin(session)
    run.decode(3)
    digests, decoder = run.sha256(), None
    for rank in range(3):
        with run.replay(rank, decoder=decoder) as replay:
            decoder = replay.decoder
            replay.run_to(chunk=2, layer=1)
            replay.step_back("chunk")
            assert list(replay.decode().tokens) == run.tokens
            assert replay.notes == []
            assert replay.engine.cache
            assert replay.engine.cache.sha256(len(IDS)) == digests[rank]


def test_a_rank_that_hangs_is_replayed_to_its_send(session: Session) -> None:
    run = session.prefill(IDS, chunk_size=4, schedule="batched", unsafe=True)
    told(session, run)
    with run.replay(1) as replay:
        assert "rank 1 stood in `send kv c0 l" in str(replay.resume())
        assert replay.notes == []
