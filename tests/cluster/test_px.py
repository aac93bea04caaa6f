"""`%%px` and `%dinfer` in a real kernel, on a stock `ipcluster start -n 3`: what a notebook's user does by hand."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from textwrap import dedent
from typing import NamedTuple

import pytest

from tests.support.dap import Debugger
from tests.support.ipclusters import IPython
from tests.support.kernels import Kernel, kernel
from tests.support.runs import DEADLINE_S, free_ports, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

PROMPT = "The code of Lima is 471. The code of Oslo is 306. What is the code of Lima? The code of Lima is"
SLOW = """
%%px
import os, pathlib, time
from dinfer.engine import ops
from dinfer.engine.decoding import Decoding
if "unbroken" not in globals():
    unbroken, unbroken_step = ops.HANDLERS["layer"], Decoding.step
def be_slow():
    pathlib.Path(os.environ["IPYTHONDIR"], "slow").touch()
    time.sleep(delay_s)
def slow_layer(state, op, comm):
    be_slow()
    return unbroken(state, op, comm)
def slow_token(decoding):
    be_slow()
    return unbroken_step(decoding)
ops.HANDLERS["layer"], Decoding.step = slow_layer, slow_token
"""
FAST = """
%%px
ops.HANDLERS["layer"], Decoding.step = unbroken, unbroken_step
"""


class Notebook(NamedTuple):
    """A kernel with a session, and what its prompt comes to when nobody interferes."""

    kernel: Kernel
    place: IPython
    tokens: list[int]
    sha256: list[str]


@pytest.fixture(scope="module")
def loaded(engines: IPython) -> Iterator[Notebook]:
    """A fresh kernel after the first cells of any notebook."""
    with kernel() as found:
        said = found.run("%load_ext dinfer\nsession = dinfer.connect(n=3)")
        assert "joined profile 'default' (local engines): ranks 0–2" in said
        found.run(f"PROMPT = {PROMPT!r}\nsession.load('demo', threads=1)")
        found.run("run = session.prefill(PROMPT, chunk_size=8, max_new_tokens=40, timeout=8)\nrun.decode(5)")
        yield Notebook(found, engines, found.value("run.tokens"), found.value("run.sha256()"))


@pytest.fixture
def notebook(loaded: Notebook) -> Notebook:
    """Its run stands at its start, whatever the test before has done."""
    if not loaded.kernel.value("run is session.run and not run.closed"):
        loaded.kernel.run("run = session.prefill(PROMPT, chunk_size=8, max_new_tokens=40, timeout=8)")
    assert loaded.kernel.run("run.breakpoints.clear()\nrun.restart()").startswith("paused")
    return loaded


def px(notebook: Notebook, code: str, targets: str = "") -> str:
    """Run a `%%px` cell."""
    head = f"%%px --targets {targets}" if targets else "%%px"
    return notebook.kernel.run(f"{head}\n{dedent(code)}")


def assert_ends_as_if_undisturbed(notebook: Notebook) -> None:
    """What was done has changed neither KV nor tokens."""
    notebook.kernel.run("run.decode(5)")
    assert notebook.kernel.value("(run.tokens, run.sha256(), run.edited)") == (
        notebook.tokens, notebook.sha256, [],
    )  # fmt: skip


def test_names_on_every_rank(notebook: Notebook) -> None:
    said = px(notebook, "print(rank, world_size, type(model).__name__, type(engine).__name__)")
    assert [line for line in said.splitlines() if "Engine" in line] == [
        f"{rank} 3 Qwen3ForCausalLM Engine" for rank in range(3)
    ]


def test_a_step_on_all_ranks_is_one_wave(notebook: Notebook) -> None:
    said = px(notebook, "engine.step()")
    for line in (
        "rank 0: one wave, 4 ops",
        "  embed c0   hidden [1, 8, 128] -",
        "  layer c0 l0   K [8, 2, 32] -",
        "  send kv c0 l0 -> 2, 8 tokens",
        "rank 1: one wave, 1 op\n",
        "rank 2: one wave, 1 op\n",
        "  recv kv c0 l0 <- 0, 8 tokens   K [8, 2, 32] -",
    ):
        assert line in said
    assert "mean" in said
    where = notebook.kernel.run("run.where()")
    assert where.startswith("paused\nrank 0: 4 of")
    for _ in range(3):
        px(notebook, "engine.step(); engine.step('op'); engine.step('layer')")
    assert_ends_as_if_undisturbed(notebook)


def test_a_rank_that_steps_alone_says_whom_it_waits_for_and_goes_on_later(notebook: Notebook) -> None:
    px(notebook, "engine.step(); engine.step()")
    alone = "rank 1 waits for hidden c0 before layer 2 from rank 0, which stands at c0 l1"
    for _ in range(2):
        assert alone in px(notebook, "engine.step(timeout=0.3)", "1")
    assert alone in px(notebook, "print(engine.where())", "1")
    others = px(notebook, "engine.step()", "0,2")
    assert "rank 0: one wave" in others
    again = px(notebook, "engine.step()", "1")
    assert "rank 1: one wave, 5 ops\n  recv hidden c0 l2 <- 0, 8 tokens" in again
    assert "layer c0 l2   K" in again
    wait_for(lambda: notebook.kernel.run("run.where()").startswith("paused"), "all at one cut again")
    assert_ends_as_if_undisturbed(notebook)


def test_tensors_are_read_and_replaced_and_the_run_says_so(notebook: Notebook) -> None:
    notebook.kernel.run("run.run_to(chunk=0, layer=2)")
    assert "layer 2 on rank 0: 8 tokens, chunks [0]" in px(notebook, "engine.kv(layer=2)", "0")
    said = px(notebook, "print(sorted(engine.hidden), tuple(engine.hidden[0, 3].shape))", "1")
    assert "(0, 3)] (1, 8, 128)" in said
    px(notebook, "engine.kv(layer=2).k[0, 3:5] = 7.0", "1")
    px(notebook, "engine.hidden[0, 3] = engine.hidden[0, 3] * 2", "1")
    moved = notebook.kernel.run("run.step()")
    assert "edited by hand: " in moved
    where = notebook.kernel.run("%dinfer where")
    assert "edited by hand: KV of layer 2 on rank 1, hidden c0 l3 on rank 1" in where
    notebook.kernel.run("run.decode(2)")
    assert notebook.kernel.value("run.sha256()") != notebook.sha256
    notebook.kernel.run("run.restart()")
    assert_ends_as_if_undisturbed(notebook)


def test_ranks_that_come_to_different_tokens_say_so_and_go_on(notebook: Notebook) -> None:
    notebook.kernel.run("run.run_to(chunk=3, layer=5)")
    px(notebook, "for layer in range(4): engine.kv(layer=layer).v[:] = 0", "2")
    said = notebook.kernel.fail("run.decode(5)")
    assert "the ranks' tokens differ, first at new token 1: rank 0 chose" in said
    assert "rank 2 chose" in said
    notebook.kernel.run("run.restart()")
    assert_ends_as_if_undisturbed(notebook)


BY_HAND = """
pair = None
if rank == 0:
    hidden = engine.decoder.embed(engine.ids[:8])
    layer = engine.forward_single_layer(0, hidden)
    pair = layer["kv_cache"]
k, v = engine.sync_single_layer_cache(0, pair)
print("synced", tuple(k.shape), float(k.double().sum()), float(v.double().sum()))
"""


def test_one_layer_by_hand(notebook: Notebook) -> None:
    lines = [line for line in px(notebook, BY_HAND).splitlines() if line.startswith("synced")]
    assert len(lines) == 3
    assert len(set(lines)) == 1
    assert lines[0].startswith("synced (1, 2, 8, 32) ")
    notebook.kernel.run("run.restart()")
    assert_ends_as_if_undisturbed(notebook)


def test_a_collective_call_that_one_rank_makes_alone_has_a_deadline(notebook: Notebook) -> None:
    said = notebook.kernel.fail(f"%%px --targets 1\n{BY_HAND}")
    assert "rank 1: sync_single_layer_cache(0, …) has waited 8 s for the other ranks" in said
    assert "call it on the others, then repeat it here" in said
    lines = px(notebook, BY_HAND, "0,2") + px(notebook, BY_HAND, "1")
    synced = {line for line in lines.splitlines() if line.startswith("synced")}
    assert len(synced) == 1


def test_both_phases_from_a_cell(notebook: Notebook) -> None:
    said = px(notebook, "result = engine.prefill_phase()\nprint(tuple(result.hidden_states.shape))")
    assert said.count("(1, 1, 128)") == 3
    tokens = px(notebook, "print('tokens', engine.decode_phase(max_new_tokens=5))")
    assert tokens.count(f"tokens {notebook.tokens}") == 3
    other = px(
        notebook,
        "engine.prefill_phase('The code of Rome is')\nprint('one', engine.decode_phase(None, None, 1))",
    )
    assert len({line for line in other.splitlines() if line.startswith("one [")}) == 1
    notebook.kernel.run("run.restart()")
    assert_ends_as_if_undisturbed(notebook)


def test_verbs(notebook: Notebook) -> None:
    run = notebook.kernel.run
    assert "step " in run("%dinfer")
    assert "%dinfer step [-n N] [unit]" in run("%dinfer step --help")
    assert "rank 0: embed c0, computed c0 l0" in run("%dinfer step layer")
    assert "undid c0 l0 on ranks 0–2" in run("%dinfer back")
    assert run("%dinfer break layer=3 chunk=1").strip() == "#1: after layer 3, chunk 1"
    run("%dinfer resume")
    assert "stopped at #1" in run("%dinfer wait")
    assert "no breakpoints" in run("%dinfer clear")
    assert "run of 30 tokens in 4 chunks, pipelined, pairwise: paused" in run("%dinfer run")
    assert "stopped at #1" in run("%dinfer log -n 3")
    said = notebook.kernel.fail("%dinfer stap layer")
    assert "UsageError: %dinfer knows no 'stap'. Did you mean step?" in said
    assert "Traceback" not in said
    assert "no block c77 l1" in notebook.kernel.fail("%dinfer to 77 1")
    assert_ends_as_if_undisturbed(notebook)


def test_an_interrupt_before_a_breakpoint_is_not_taken_for_it(notebook: Notebook) -> None:
    notebook.kernel.run("run.break_at(layer=3, chunk=3)")
    interrupt(notebook, "run.decode(5)")
    where = notebook.kernel.run("run.where()")
    assert "interrupted" in where
    assert "stopped at" not in where
    assert "prefill is not done: stopped at #" in notebook.kernel.run("run.decode(5)")


def interrupt(notebook: Notebook, call: str) -> None:
    """Interrupt a cell while ranks are in slow ops; they are fast again afterwards."""
    px(notebook, "delay_s = 0.4")
    notebook.kernel.run(SLOW)
    (notebook.place.folder / "slow").unlink(missing_ok=True)
    cell = notebook.kernel.begin(call)
    wait_for((notebook.place.folder / "slow").exists, "a rank is in a slow op")
    notebook.kernel.interrupt()
    notebook.kernel.finish(cell)
    assert "KeyboardInterrupt" in cell.error
    notebook.kernel.run(FAST)


@pytest.mark.parametrize("call", ["run.step('chunk', n=100)", "run.decode(40)", "run.step('token', n=30)"])
def test_an_interrupt_leaves_the_run_paused(notebook: Notebook, call: str) -> None:
    if "token" in call:
        notebook.kernel.run("run.decode(1)")
    interrupt(notebook, call)
    assert "interrupted" in notebook.kernel.run("run.where()")
    assert notebook.kernel.value("run.standing().state") in ("paused", "done")
    notebook.kernel.run("run.decode(5 - len(run.tokens)) if len(run.tokens) < 5 else None")
    assert notebook.kernel.value("(run.tokens[:5], run.sha256())") == (notebook.tokens, notebook.sha256)


HEAR = """
import os, pathlib, threading, time
heard = {{rank: [] for rank in range(3)}}
take = session.ranks.take
def listen(rank, report, *more):
    take(rank, report, *more)
    if type(report).__name__ == "Status":
        heard[rank].append(any(more))
session.ranks.take = listen

def let_go():
    "Once the cell holds its ranks, and all ranks have been heard often since."
    place, until = pathlib.Path({folder!r}), time.monotonic() + {deadline}
    def wait(condition):
        while not condition() and time.monotonic() < until:
            time.sleep(0.01)
    wait(lambda: all((place / f"busy{{rank}}").exists() for rank in {ranks}))
    heard.update({{rank: [] for rank in range(3)}})
    wait(lambda: min(map(len, heard.values())) >= {often})
    with open(place / "go", "wb") as go:
        go.write(b"x" * len({ranks}))
threading.Thread(target=let_go).start()
"""
BUSY = """
import ctypes, os, pathlib
go = os.open({folder!r} + "/go", os.O_RDWR)
pathlib.Path({folder!r}, f"busy{{rank}}").touch()
{wait}
"""


OFTEN = 3
"""so often each rank is heard while a cell runs, however long that takes here; it is ten times a second"""


@pytest.mark.parametrize(
    ("ranks", "wait"),
    [
        ([0, 1, 2], "os.read(go, 1)"),
        ([1], "ctypes.PyDLL(None).read(go, ctypes.create_string_buffer(1), 1)  # holds the GIL"),
    ],
    ids=["main thread", "GIL"],
)
def test_ranks_are_heard_while_a_cell_is_busy(
    notebook: Notebook, ranks: list[int], wait: str, tmp_path: Path
) -> None:
    folder = str(tmp_path)
    os.mkfifo(tmp_path / "go")
    px(notebook, "delay_s = 0.03")
    notebook.kernel.run(SLOW)
    notebook.kernel.run("before = run.standing().stands\nrun.resume()")
    notebook.kernel.run(HEAR.format(folder=folder, ranks=ranks, often=OFTEN, deadline=DEADLINE_S / 2))
    px(notebook, BUSY.format(folder=folder, wait=wait), ",".join(map(str, ranks)))
    found: dict[int, int] = notebook.kernel.value("{rank: len(times) for rank, times in heard.items()}")
    assert all(count >= OFTEN for count in found.values()), found
    assert notebook.kernel.value("run.standing().stands != before")
    notebook.kernel.run("run.wait(60)")
    assert notebook.kernel.value("any(map(any, heard.values()))")  # events of ops, too
    notebook.kernel.run("session.ranks.take = take")
    notebook.kernel.run(FAST)
    assert_ends_as_if_undisturbed(notebook)


MINE = """
from dinfer.engine.ops import HANDLERS

unbroken = HANDLERS["layer"]


def look(engine):
    rank = engine.rank
    return rank


def layer(state, op, comm):
    rank = state.rank
    return unbroken(state, op, comm)
"""


def stopped_in(debugger: Debugger, function: str) -> int:
    """Wait until rank 1 stands at the breakpoint in one of MINE's functions; the thread that does."""
    stopped = debugger.event("stopped")
    assert stopped["reason"] == "breakpoint"
    frame = debugger.ask("stackTrace", threadId=stopped["threadId"])["stackFrames"][0]
    assert frame["name"] == function
    expression = "engine.rank" if function == "look" else "(state.rank, op.layer)"
    value = debugger.ask("evaluate", expression=expression, frameId=frame["id"])["result"]
    assert value == ("1" if function == "look" else "(1, 2)")
    thread: int = stopped["threadId"]
    return thread


def test_a_debugger_stops_one_rank_while_the_others_wait_at_a_cut(notebook: Notebook) -> None:
    run, path = notebook.kernel.run, notebook.place.folder / "mine.py"
    path.write_text(MINE)
    lines = [number for number, line in enumerate(MINE.splitlines(), 1) if "    rank = " in line]
    px(notebook, f"import sys\nsys.path.append({str(path.parent)!r})\nimport mine")
    taken, port = free_ports(2), 0
    with closing(socket.create_server(("127.0.0.1", taken))):
        said = notebook.kernel.fail(f"session.listen_for_debugger(1, {taken})")
        assert "rank 1 (pid" in said
        assert f"cannot listen at port {taken}" in said
    port = taken + 1
    assert f"127.0.0.1:{port}" in run(f"%dinfer debug 1 --port {port}")
    assert f"127.0.0.1:{port}" in run("session.listen_for_debugger(rank=1)")
    debugger = Debugger(port)
    debugger.attach({str(path): lines})

    run("%%px --noblock --targets 1\nmine.look(engine)")
    thread = stopped_in(debugger, "look")
    assert run("run.where()").startswith("paused\nrank 0: 0 of")
    debugger.ask("continue", threadId=thread)

    px(notebook, "mine.HANDLERS['layer'] = mine.layer", "1")
    run("run.resume()")
    thread = stopped_in(debugger, "layer")
    waits = "layer c0 l2"
    notebook.kernel.run(f"import time\nwhile {waits!r} not in str(run.where()): time.sleep(0.02)")
    where = run("run.where()")
    assert where.startswith("running")
    assert "rank 0: " in where
    debugger.ask("setBreakpoints", source={"path": str(path)}, breakpoints=[])
    debugger.ask("continue", threadId=thread)
    run("run.wait(60)")
    debugger.close()
    px(notebook, "mine.HANDLERS['layer'] = mine.unbroken", "1")
    assert_ends_as_if_undisturbed(notebook)


def test_another_kernel_takes_the_ranks_and_weights_have_stayed(notebook: Notebook) -> None:
    """The last test: the first kernel's session has lost its ranks then."""
    before = px(notebook, "print('model', id(model))")
    px(notebook, "delay_s = 0.2")
    notebook.kernel.run(SLOW)
    notebook.kernel.run("run.resume()")
    with kernel() as other:
        other.run("%load_ext dinfer\nsession = dinfer.connect(n=3, take=True)")
        other.run(FAST)
        said = other.run("session.load('demo', threads=1)")
        assert "demo on 3 CPUs" in said
        after = other.run("%%px\nprint('model', id(model))")
        assert sorted(before.split()) == sorted(after.split())
        other.run(f"run = session.prefill({PROMPT!r}, chunk_size=8, paused=True)\nrun.decode(5)")
        assert other.value("(run.tokens, run.sha256())") == (notebook.tokens, notebook.sha256)
        other.run("session.close()")
