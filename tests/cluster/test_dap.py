"""`dinfer dap` on real engines: an editor attaches to a run, and is told of a hang and a killed rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dinfer
from dinfer.session.session import Session
from tests.support.dap import Editor
from tests.support.ipclusters import IPython, within
from tests.support.twin import prompt

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

IDS = list(prompt(22))
"""six chunks of 4, the last of 2"""

MODEL: dict[str, Any] = {"layers": 6}

_STUCK = """
import time
from dinfer.engine import ops
def stuck(state, op, comm, unbroken=ops.HANDLERS["layer"]):
    if str(op) == "layer c4 l3":
        ops.HANDLERS["layer"] = unbroken
        time.sleep(600)
    return unbroken(state, op, comm)
ops.HANDLERS["layer"] = stuck
"""


@pytest.fixture
def place(daemonized: IPython) -> Iterator[IPython]:
    with within(daemonized):
        yield daemonized


@pytest.fixture
def editor(place: IPython) -> Iterator[Editor]:  # noqa: ARG001 - it is within it
    """An editor that has started `dinfer dap`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dinfer", "dap"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin
    assert process.stdout
    with process.stdin as writer, process.stdout as reader:
        yield Editor(reader, writer)  # type: ignore[arg-type]  # a pipe is one
        writer.close()
        assert process.wait() == 0


def stuck_in(session: Session, path: Path) -> None:
    """Rank 1 sleeps in `layer c4 l3`, the first time."""
    source = path / "fault.py"  # a file, so that the line that is stuck can be read
    source.write_text(_STUCK, encoding="utf-8")
    run = f"exec(compile(open({str(source)!r}).read(), {str(source)!r}, 'exec'), {{}})"
    session.ranks.cluster.call(1, "builtins:exec", run, {}, timeout=60)  # type: ignore[attr-defined]


@pytest.mark.slow
def test_an_editor_attaches_steps_and_is_told_of_a_hang_and_a_killed_rank(
    editor: Editor, model: Path, tmp_path: Path
) -> None:
    notebook = dinfer.connect(n=3, start=False).load(str(model), threads=1)
    run = notebook.prefill(IDS, paused=True, chunk_size=4, max_new_tokens=4)
    run.step("layer", 2)
    run.break_at(chunk=2, layer=1)
    stuck_in(notebook, tmp_path)
    rank_2 = notebook.ranks.cluster.facts[2].pid  # type: ignore[attr-defined]

    editor.ask("initialize", adapterID="dinfer")
    held = editor.refused("attach")
    assert "is in use: its ranks are held by the session of" in held
    assert held.endswith('In the launch entry: "take": true.')
    assert editor.start("attach", take=True)["reason"] == "entry"
    assert "Reattached to the run" in editor.output()
    assert editor.names(1)[0] == "layer c0 l2 (next)"

    # Stepping, breakpoints: the notebook's own, one with a condition, and back.
    editor.go("stepIn")
    editor.go("next")
    editor.go("stepBack")
    assert editor.go("stepOut")["reason"] == "step"
    first = editor.go("continue")
    assert first["description"] == "Stopped at #1: after layer 1, chunk 2"
    assert [one["verified"] for one in editor.functions("chunk 3 layer 3 if absmax > 0")] == [True]
    second = editor.go("continue")
    assert "rank 1, `layer c3 l3`: " in second["text"]
    assert second["threadId"] == 2
    frame = next(one for one in editor.frames(1) if one["name"] == "layer c3 l3 (done last)")
    scopes = editor.scopes(frame)
    hidden = editor.variables(scopes["Hidden state of c3 l3"])
    assert "float32 [4, 64], mean " in hidden["after layer 3"]["value"]
    assert (
        "equal on ranks 0, 1 and 2" in editor.variables(scopes["KV of layer 3, by chunk"])["chunk 0"]["value"]
    )
    assert editor.go("reverseContinue")["hitBreakpointIds"] == [1]
    assert "bit for bit" in editor.say("kv().diff()")

    # A hang: the verdict, the line of Python in which rank 1 is stuck; then a kill.
    editor.functions()
    hung = editor.go("continue")
    assert (hung["reason"], hung["threadId"]) == ("exception", 2)
    assert "rank 1 is in `layer c4 l3` and stuck in Python" in hung["description"]
    info = editor.ask("exceptionInfo", threadId=2)
    assert info["exceptionId"] == "hung: stuck in Python"
    assert "to go on: session.recover(); run.restart()" in info["description"]
    stack = editor.frames(1)
    assert (stack[0]["name"], stack[0]["source"]["name"]) == ("stuck", "fault.py")
    assert "layer c4 l3 (under way)" in [one["name"] for one in stack]
    assert editor.frames(0)
    os.kill(rank_2, signal.SIGKILL)
    killed = editor.event("stopped")
    assert (killed["reason"], killed["threadId"]) == ("exception", 3)
    assert killed["description"].startswith("A rank is lost: rank 2 ")
    assert "to go on: session.recover(); run.restart()" in killed["text"]
    assert editor.ask("threads")["threads"][2]["name"] == "rank 2 (gone)"
    assert editor.ask("exceptionInfo", threadId=3)["exceptionId"] == "lost: dead"

    # The remedy is the restart button; what is left after that is the notebook's again.
    assert editor.go("restart")["reason"] == "entry"
    assert editor.go("continue")["hitBreakpointIds"] == [1]
    editor.ask("disconnect")
    editor.wait_until_ended()
    with dinfer.connect(n=3, start=False) as again:
        assert again.run.standing().state == "paused"
        assert len(again.run.breakpoints) == 1
        assert again.run.decode().count == 4
        assert len(set(again.run.sha256())) == 1
