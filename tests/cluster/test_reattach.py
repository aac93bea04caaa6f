"""Who holds a cluster: a kernel that restarts finds its run again; another notebook takes it only if told to."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.ipclusters import IPython, ipython
from tests.support.kernels import Kernel, kernel
from tests.support.runs import DEADLINE_S, wait_for
from tests.support.tiny import tiny_checkpoint
from tests.support.twin import prompt

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

BEGIN = """
import dinfer
session = dinfer.connect({connect})
session.load({model!r}, threads=1)
run = session.prefill({ids}, chunk_size=5, max_new_tokens=6, paused=True)
"""
SLOW_TOKENS = """
from dinfer.engine.decoding import Decoding
def slow(self, unslowed=Decoding.step):
    import time
    time.sleep(0.2)
    return unslowed(self)
Decoding.step = slow
"""
HELD = "(p := __import__('psutil').Process()).num_fds(), p.num_threads()"
"""descriptors and threads of the kernel"""

STANDS = "[stand.positions for stand in session.run.standing().stands]"


@pytest.fixture(scope="module")
def notebook(engines: IPython) -> Iterator[Kernel]:  # noqa: ARG001 - it is beside them
    """A kernel beside a cluster that was started by hand."""
    with kernel() as notebook:
        yield notebook


def begin(notebook: Kernel, model: Path, connect: str = "n=3, start=False") -> str:
    """Connect, load, and begin a run that stands before its first op; what is printed."""
    return notebook.run(BEGIN.format(model=str(model), ids=list(prompt(22)), connect=connect))


def test_after_a_restart_the_run_goes_on_where_it_stood(notebook: Kernel, model: Path) -> None:
    begin(notebook, model)
    notebook.run("run.step('layer', n=4); run.break_at(layer=2, chunk=1); run.break_at(layer=1, when='nan')")
    notebook.run("run.inject('nan', rank=2, layer=2, chunk=0)")
    before = notebook.value(f"{STANDS}, len(run.trace.events)")
    notebook.restart(now=True)
    said = notebook.run("import dinfer; session = dinfer.connect(n=3, start=False); run = session.run")
    assert all(part in said for part in ("Reattached", "paused", "2 breakpoints", "1 armed fault", "Lost"))
    assert notebook.value(f"{STANDS}, len(run.trace.events)") == before
    notebook.run("run.resume()")
    assert "#1" in notebook.run("print(run.wait(60))")
    assert "hit: #1" in notebook.run("print(run.faults)")
    notebook.run("run.faults.clear(); run.breakpoints.clear(); run.restart(); run.decode()")
    assert notebook.value("run.compare().equal")
    notebook.run("session.close()")
    notebook.restart(now=True)
    said = notebook.run("import dinfer; session = dinfer.connect(n=3, start=False)")
    assert "still hold" in said
    assert "Reattached" not in said  # that run was closed
    notebook.run("session.close()")


@pytest.mark.slow
def test_a_kernel_that_ends_during_decode_leaves_all_ranks_at_one_token(
    notebook: Kernel, model: Path
) -> None:
    begin(notebook, model)
    notebook.run(f"session.ranks.cluster.call(None, 'builtins:exec', {SLOW_TOKENS!r}, {{}})")
    cell = notebook.begin("run.decode(on_text=lambda text: print('token', end=' '))")
    while "token token" not in cell.text:
        notebook.look(cell)
    notebook.restart(now=True)
    notebook.run("import dinfer; session = dinfer.connect(n=3, start=False); run = session.run")
    assert 2 <= notebook.value("len(run.tokens)") <= 6
    notebook.run("run.decode(6 - len(run.tokens)) if len(run.tokens) < 6 else None")
    assert notebook.value("run.compare().equal, len(run.tokens)") == (True, 6)
    notebook.run("session.close()")


@pytest.mark.slow
def test_a_session_that_is_taken_over_during_decode_leaves_all_ranks_at_one_token(
    notebook: Kernel, model: Path
) -> None:
    begin(notebook, model)
    cell = notebook.begin("run.decode(3000, on_text=lambda text: print('token', end=' '))")
    while "token token" not in cell.text:
        notebook.look(cell)
    with kernel() as other:
        other.run("import dinfer; session = dinfer.connect(n=3, start=False, take=True); run = session.run")
        made = other.value("len(run.tokens)")
        assert 2 <= made < 3000
        other.run("run.decode(2)")
        assert other.value("run.compare().equal, len(run.tokens)") == (True, made + 2)
        other.run("session.close()")


@pytest.mark.slow
def test_a_checkpoint_that_has_changed_meanwhile_is_lost_by_name(notebook: Kernel, tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", layers=3)
    begin(notebook, model)
    notebook.restart(now=True)
    tiny_checkpoint(model, layers=3, seed=7)
    said = notebook.run("import dinfer; session = dinfer.connect(n=3, start=False)")
    assert "has changed" in said
    assert str(model) in said
    assert "session.load" in notebook.fail(f"session.prefill({list(prompt(22))})")
    assert "again" not in begin(notebook, model)
    notebook.run("run.decode(2)")
    assert notebook.value("run.compare().equal")
    notebook.run("session.close()")


def test_a_cluster_in_use_is_taken_only_by_who_says_so(notebook: Kernel, model: Path) -> None:
    begin(notebook, model)
    notebook.run("run.step('chunk')")
    where = notebook.value(STANDS)
    with kernel() as other:
        said = other.fail("import dinfer; session = dinfer.connect(n=3, start=False)")
        assert "ClusterTaken" in said
        assert str(notebook.value("__import__('os').getpid()")) in said
        assert "take=True" in said
        assert "Reattached" not in said
        assert notebook.value(STANDS) == where
        notebook.run("run.step('layer')")  # nothing has happened to it
        said = other.run("session = dinfer.connect(n=3, start=False, take=True)")
        assert "Reattached" in said
        taker = str(other.value("__import__('os').getpid()"))
        wait_for(lambda: "taken over" in notebook.run("print(run.failure)"), "the first session is told")
        for call in (
            "run.step()",
            "run.wait()",
            "session.load('demo')",
            "session.recover()",
            "session.prefill('a')",
        ):
            said = notebook.fail(call)
            assert "taken over" in said
            assert taker in said
            assert "recover" not in said.partition("Error")[2].partition("taken over")[2]
        assert "recover" not in notebook.run("print(run.where(), run.failure, *session.log)")
        assert notebook.value("session.log[-1].count('taken over')") == 1
        other.run("run = session.run; run.step('layer'); run.decode(2)")
        assert other.value("run.compare().equal")
        notebook.run("session.close()")  # which takes nothing from the other one
        other.run("run.restart()")
        other.run("session.close()")


def test_the_same_notebook_may_connect_again(notebook: Kernel, model: Path) -> None:
    begin(notebook, model)
    notebook.run("run.step('layer'); older, kv = session, run.kv(layer=0)")
    where, held = notebook.value(STANDS), notebook.value(HELD)
    assert "Reattached" in notebook.run("session = dinfer.connect(n=3, start=False)")
    assert notebook.value(STANDS) == where
    for call in (
        "older.prefill('a')",
        "older.recover()",
        "older.run.step()",
        "older.run.kv(layer=0)",
        "kv.k[0, 0]",
    ):
        said = notebook.fail(call)
        assert "taken over" in said
        assert "ZMQ" not in said
    assert "taken over" in notebook.run("print(older.run.where())")
    files, threads = notebook.value(HELD)
    assert files <= held[0] + 4, "the older session's link and client are gone"
    assert threads <= held[1] + 1
    notebook.run("older.close()")  # which takes nothing from the newer one
    begin(notebook, model)
    notebook.run("run.decode(1); session.close()")


@pytest.mark.slow
def test_a_session_that_died_while_it_prepared_a_prompt_is_in_nobodys_way(
    notebook: Kernel, model: Path
) -> None:
    """Rank 0 waits for the others, which were never asked: the next prefill frees it, and says so."""
    begin(notebook, model)
    notebook.run(
        "from dataclasses import asdict; from dinfer.messages import GetHeld, PreparePrompt\n"
        "session.ranks.send(0, PreparePrompt(asdict(run.job.config), tuple(run.job.ids)))"
    )
    wait_for(
        lambda: notebook.value("session.ranks.ask({0: GetHeld()}, 10)[0].preparing"), "rank 0 waits in it"
    )
    notebook.restart(now=True)
    notebook.run("import dinfer; session = dinfer.connect(n=3, start=False)")
    said = notebook.run(f"run = session.prefill({list(prompt(22))}, chunk_size=4); run.wait(60)")
    assert "are freed: all ranks have met again" in said
    assert notebook.value("run.compare().equal")
    notebook.run("session.close()")


@pytest.mark.slow
def test_a_restarted_kernel_keeps_the_cluster_that_dinfer_started(tmp_path: Path, model: Path) -> None:
    with ipython(tmp_path) as place, kernel() as notebook:
        begin(notebook, model, "n=3")
        notebook.run("run.step('chunk')")
        where, engines = notebook.value(f"{STANDS}, session.ranks.cluster.call(None, 'os:getpid')")
        notebook.restart()
        assert "Reattached" in notebook.run("import dinfer; session = dinfer.connect(n=3)")
        assert notebook.value(f"{STANDS}, session.ranks.cluster.call(None, 'os:getpid')") == (where, engines)
        notebook.run("session.close()")
        deadline = time.monotonic() + DEADLINE_S
        while place.members("ipyparallel.engine"):
            assert time.monotonic() < deadline


@pytest.mark.slow
def test_an_engine_keeps_nothing_of_sessions_of_other_sizes(notebook: Kernel) -> None:
    held = "__import__('os').popen('ls -l /proc/%d/fd' % __import__('os').getpid()).read().count('memfd')"
    call = "session.ranks.cluster.call(0, "
    counts = f"({call}'gc:collect'), {call}'builtins:eval', {held!r}))[1]"
    notebook.run("import dinfer; session = dinfer.connect(n=3, start=False)")
    before = notebook.value(counts)
    for n in (2, 3):
        notebook.run(f"session.close(); session = dinfer.connect(n={n}, start=False)")
    assert notebook.value(counts) == before
    notebook.run("session.close()")
