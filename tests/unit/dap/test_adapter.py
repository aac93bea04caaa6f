"""`dinfer dap` as an editor meets it: every request through the real protocol, with a run on threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dinfer
from dinfer.dap.adapter import HANDLERS
from dinfer.dap.listing import SUFFIX
from dinfer.dap.stops import StopTeller
from dinfer.dap.target import DebugTarget
from dinfer.dap.variables import figures, summary_of
from dinfer.engine.ops import HANDLERS as OPS
from dinfer.engine.ops import Outcome
from dinfer.run.run import Run
from tests.support.dap import Editor, editor_in_process
from tests.support.runs import DEADLINE_S, wait_for

IDS = list(range(3, 25))
"""22 tokens: six chunks of 4, the last of 2"""

MODEL: dict[str, Any] = {"layers": 6, "tokenizer": True}


@pytest.fixture
def editor() -> Iterator[Editor]:
    with editor_in_process() as editor:
        yield editor


@pytest.fixture
def launch(model: Path) -> dict[str, Any]:
    """The arguments of a launch."""
    return {
        "model": str(model), "promptIds": IDS, "ranks": 3, "where": "threads", "chunk_size": 4, "max_new_tokens": 4,
        "threads": 1,
    }  # fmt: skip


@pytest.fixture
def started(editor: Editor, launch: dict[str, Any]) -> Editor:
    """An editor whose run stands before its first op."""
    assert editor.start(**launch)["reason"] == "entry"
    return editor


def where(editor: Editor) -> list[str]:
    """Where each rank stands, without the time that its last op took."""
    return [line.partition(";")[0] for line in editor.say("where").splitlines()[1:4]]


AT_START = ["rank 0: 0 of", "rank 1: 0 of", "rank 2: 0 of"]


def is_at_start(editor: Editor) -> bool:
    return all(line.startswith(start) for line, start in zip(where(editor), AT_START, strict=True))


def test_all_requests_are_asked_by_these_tests() -> None:
    client = Path(dinfer.__file__).parents[1] / "tests" / "support" / "dap.py"
    asked = Path(__file__).read_text(encoding="utf-8") + client.read_text(encoding="utf-8")
    assert [name for name in HANDLERS if f'"{name}"' not in asked] == []


def test_ranks_are_threads_and_their_stack_is_op_layer_chunk(started: Editor) -> None:
    threads = started.ask("threads")["threads"]
    assert [one["name"] for one in threads] == ["rank 0 (cpu)", "rank 1 (cpu)", "rank 2 (cpu)"]
    assert started.names(0)[0] == "embed c0 (next)"
    op, layer, chunk = started.frames(1)
    assert [op["name"], layer["name"]] == ["layer c0 l2 (next)", "layer 2, of rank 1"]
    assert chunk["name"].startswith("chunk 0 of 6: tokens 0–3")
    source = started.ask("source", source=op["source"], sourceReference=op["source"]["sourceReference"])
    assert source["content"].splitlines()[op["line"] - 1].strip() == "layer c0 l2"
    assert started.ask("loadedSources")["sources"][1] == op["source"]
    assert "there is no thread 9" in started.refused("stackTrace", threadId=9)


@pytest.mark.parametrize(
    ("request_", "granularity", "said"),
    [
        ("next", "statement", "computed c0 l0"),
        ("stepIn", "statement", "rank 0: embed c0"),
        ("next", "instruction", "rank 0: embed c0"),
        ("stepOut", "statement", "block c0 l5"),
    ],
)
def test_steps_are_op_layer_and_chunk(started: Editor, request_: str, granularity: str, said: str) -> None:
    stop = started.go(request_, threadId=2, granularity=granularity)
    assert (stop["reason"], stop["threadId"], stop["allThreadsStopped"]) == ("step", 2, True)
    assert said in started.output()
    assert not is_at_start(started)
    for _ in range(6 if request_ == "stepOut" else 1):
        assert not is_at_start(started)
        started.go("stepBack", granularity=granularity)
    assert is_at_start(started)


def test_a_step_back_takes_back_a_layer(started: Editor) -> None:
    started.go("next")
    before = where(started)
    started.go("next")
    started.go("stepBack")
    assert where(started) == before


def test_function_breakpoints_stop_at_layer_chunk_rank_and_condition(started: Editor) -> None:
    names = ("layer 5", "chunk 1 layer 3", "c2 l1 if absmax > 1e9", "layer 99", "hello", "layer 1 if x > 2")
    found = started.functions(*names)
    assert [one["verified"] for one in found] == [True, True, True, False, False, False]
    assert "the layers are 0 to 5" in found[3]["message"]
    assert "'hello' is not understood; a breakpoint names layer, chunk, rank" in found[4]["message"]
    assert "when is 'x > 2'; it must be one of" in found[5]["message"]
    stop = started.go("continue")
    assert (stop["reason"], stop["hitBreakpointIds"]) == ("function breakpoint", [1])
    assert stop["description"] == "Stopped at #1: after layer 5"
    assert stop["threadId"] == 3  # layer 5 is of rank 2
    started.functions("chunk 1 layer 3")
    assert started.go("continue")["hitBreakpointIds"] == [2]  # that breakpoint has stayed
    started.functions()
    assert started.go("continue")["description"] == "Prefill is done"


def test_a_condition_stops_the_rank_on_which_it_holds(started: Editor) -> None:
    found = started.ask(
        "setFunctionBreakpoints", breakpoints=[{"name": "chunk 1 layer 3", "condition": "absmax > 0"}]
    )
    assert found["breakpoints"][0]["verified"]
    stop = started.go("continue")
    assert "rank 1, `layer c1 l3`: " in stop["text"]
    assert (stop["threadId"], stop["reason"]) == (2, "function breakpoint")


def test_a_number_of_a_hit_stops_there_only(started: Editor) -> None:
    asked = [
        {"name": "layer 2", "hitCondition": "3"},
        {"name": "layer 5", "condition": "absmax > 0", "hitCondition": "== 2"},
        {"name": "layer 1", "hitCondition": "> 2"},
        {"name": "layer 1", "hitCondition": "999"},
    ]
    found = started.ask("setFunctionBreakpoints", breakpoints=asked)["breakpoints"]
    assert [one["verified"] for one in found] == [True, True, False, False]
    assert "'> 2' is no hit: give its number" in found[2]["message"]
    assert "hit is 999; " in found[3]["message"]
    stops = [started.go("continue") for _ in range(3)]
    assert sorted(stop.get("hitBreakpointIds", [0])[0] for stop in stops) == [0, 1, 2]
    texts = {stop.get("hitBreakpointIds", [0])[0]: stop["text"] for stop in stops}
    assert "`layer c1 l5`" in texts[2]
    assert stops[-1]["description"] == "Prefill is done"


def test_reverse_continue_goes_to_the_breakpoint_before_and_to_the_start(started: Editor) -> None:
    started.functions("chunk 1 layer 3", "chunk 3 layer 2 if absmax > 0")
    first = started.go("continue")
    assert first["hitBreakpointIds"] == [1]
    at_first = where(started)
    assert started.go("continue")["hitBreakpointIds"] == [2]
    started.go("continue")
    back = started.go("reverseContinue")
    assert back["hitBreakpointIds"] == [2], started.output()  # where the condition was met on the way
    back = started.go("reverseContinue")
    assert back["hitBreakpointIds"] == [1]
    assert where(started) == at_first
    assert started.go("reverseContinue")["description"].startswith("Back at the start")
    assert is_at_start(started)
    assert started.go("continue")["hitBreakpointIds"] == [1]


def test_a_step_out_ends_at_a_breakpoint(started: Editor) -> None:
    started.functions("chunk 0 layer 1")
    assert started.go("stepOut")["hitBreakpointIds"] == [1]


def test_a_breakpoint_on_a_line_of_a_ranks_plan(started: Editor) -> None:
    source = started.frames(1)[0]["source"]
    text = started.ask("source", source=source)["content"].splitlines()
    line = text.index("  layer c2 l3") + 1
    found = started.ask("setBreakpoints", source=source, breakpoints=[{"line": line}, {"line": 1}])[
        "breakpoints"
    ]
    assert [one["verified"] for one in found] == [True, False]
    assert "no op is on this line" in found[1]["message"]
    stop = started.go("continue")
    assert (stop["reason"], stop["threadId"]) == ("breakpoint", 2)
    assert "layer 3, chunk 2, on rank 1" in stop["description"]
    by_name = started.ask("setBreakpoints", source={"name": f"rank 1{SUFFIX}"}, breakpoints=[])
    assert by_name == {"breakpoints": []}
    found = started.ask("setBreakpoints", source={"path": "/x/model.py"}, breakpoints=[{"line": 3}])[
        "breakpoints"
    ]
    assert "set a function breakpoint" in found[0]["message"]
    assert started.go("continue")["description"] == "Prefill is done"


def test_nan_is_an_exception_if_it_is_chosen(started: Editor) -> None:
    found = started.ask("setExceptionBreakpoints", filters=["nan"])["breakpoints"]
    assert found[0]["verified"]
    started.say('inject("nan", layer=2, chunk=1, where="compute")')
    stop = started.go("continue")
    assert (stop["reason"], stop["hitBreakpointIds"]) == ("exception", [1])
    info = started.ask("exceptionInfo", threadId=1)
    assert "nan" in info["description"]
    assert info["breakMode"] == "always"


def test_variables_are_hidden_states_and_kv_in_figures(started: Editor) -> None:
    started.say("run_to(chunk=1, layer=3)")
    started.event("stopped")
    frame = next(one for one in started.frames(1) if one["name"] == "layer c1 l3 (done last)")
    scopes = started.scopes(frame)
    assert list(scopes) == ["Position", "Hidden state of c1 l3", "KV of layer 3, by chunk", "Run"]
    hidden = started.variables(scopes["Hidden state of c1 l3"])
    assert list(hidden) == ["before layer 3", "after layer 3"]
    assert all("(rank 1)" in one["value"] for one in hidden.values())
    figures = started.variables(hidden["before layer 3"]["variablesReference"])
    assert {"shape", "dtype", "mean", "std", "min", "max", "NaN", "digest"} <= figures.keys()
    assert figures["shape"]["value"] == "[4, 64]"
    blocks = started.variables(scopes["KV of layer 3, by chunk"])
    assert "equal on ranks 0, 1 and 2" in blocks["chunk 1"]["value"]
    assert blocks["chunk 2"]["value"] == "not here yet"
    block = started.variables(blocks["chunk 1"]["variablesReference"])
    k = started.variables(block["K"]["variablesReference"])
    shown = started.say("kv(layer=3, chunk=1).k[:, :]")
    assert k["NaN"]["value"].startswith("0 of ")
    assert k["values"]["indexedVariables"] == 4
    page = started.variables(k["values"]["variablesReference"], start=1, count=2, filter="indexed")
    assert list(page) == ["[1]", "[2]"]
    assert page["[1]"]["type"].startswith("token 5")
    assert shown.startswith("tensor(")
    run = started.variables(scopes["Run"])
    assert run["state"]["value"] == "paused"
    position = started.variables(scopes["Position"])
    lanes = started.variables(position["lanes"]["variablesReference"])
    assert "next layer c2 l2" in lanes["compute"]["value"]
    chunk = next(one for one in started.frames(1) if one["name"].startswith("chunk "))
    by_layer = started.variables(started.scopes(chunk)["KV of chunk 2, by layer"])
    assert list(by_layer) == [f"layer {n}" for n in range(6)]


def test_the_figures_are_those_of_the_values() -> None:
    values = torch.tensor([[1.0, 2.0, float("nan")], [0.0, -5.0, float("inf")]])
    assert figures(values) == {
        "shape": "[2, 3]", "dtype": "float32", "mean": "-0.5", "std": "2.69258", "min": "-5", "max": "2", "absmax": "5",
        "NaN": "1 of 6", "Inf": "1 of 6", "zeros": "1 of 6",
    }  # fmt: skip
    assert summary_of(values).startswith("1 NaN, 1 Inf, float32 [2, 3], mean -0.5")
    assert figures(torch.full((2,), float("nan"))).keys() == {"shape", "dtype", "NaN", "Inf", "zeros"}


def test_a_block_that_differs_is_named(started: Editor) -> None:
    started.say('inject("bitflip", rank=2, layer=1, chunk=0, where="memory")')
    started.say("run_to(chunk=0, layer=5)")
    started.event("stopped")
    scopes = [started.scopes(frame) for frame in started.frames(0)]
    of_layer = next(one["KV of layer 1, by chunk"] for one in scopes if "KV of layer 1, by chunk" in one)
    blocks = started.variables(of_layer)
    assert "DIFFERS from rank 2" in blocks["chunk 0"]["value"]
    digests = started.variables(
        started.variables(blocks["chunk 0"]["variablesReference"])["digests"]["variablesReference"]
    )
    assert digests["rank 0"]["value"] == digests["rank 1"]["value"] != digests["rank 2"]["value"]
    assert "differs" in started.say("kv(layer=1).diff()")


def test_variables_of_an_earlier_stop_are_refused(started: Editor) -> None:
    frame = started.frames(0)[0]
    reference = started.scopes(frame)["Run"]
    started.go("next")
    assert "of an earlier stop" in started.refused("scopes", frameId=frame["id"])
    assert "of an earlier stop" in started.refused("variables", variablesReference=reference)


def test_going_to_a_line_runs_to_its_block(started: Editor) -> None:
    source = started.frames(1)[0]["source"]
    line = started.ask("source", source=source)["content"].splitlines().index("  layer c1 l2") + 1
    target = started.ask("gotoTargets", source=source, line=line)["targets"][0]
    assert target["label"] == "after c1 l2 on every rank"
    assert started.go("goto", targetId=target["id"])["reason"] == "goto"
    assert "l2" in started.say("where")
    assert started.ask("gotoTargets", source=source, line=1) == {"targets": []}
    assert "ask for gotoTargets first" in started.refused("goto", threadId=1, targetId=999)


def test_after_prefill_continue_decodes_and_then_ends(started: Editor) -> None:
    assert started.go("continue")["description"] == "Prefill is done"
    started.go("next")
    assert "1 new token" in started.output()
    started.go("stepBack")
    assert started.names(0)[0].endswith("(done, at the end of prefill)")
    stop = started.go("continue")
    assert stop["description"] == "Decoded 4 new tokens"
    assert started.names(0)[0] == "decode: 4 new tokens"
    scopes = started.scopes(started.frames(0)[0])
    assert list(scopes) == ["Position", "KV, by layer", "Run"]
    started.ask("continue", threadId=1)
    assert started.event("exited") == {"exitCode": 0}
    started.event("terminated")


def test_pause_stops_a_run_that_moves(started: Editor, slow: threading.Event) -> None:
    started.ask("continue", threadId=1)
    assert "the run moves: pause it first" in started.refused("next", threadId=1)
    pausing = started.send("pause", threadId=1)
    slow.set()
    started.answer(pausing)
    assert started.event("stopped")["reason"] == "pause"


def test_a_breakpoint_that_is_set_while_the_run_moves_stops_it(
    started: Editor, slow: threading.Event
) -> None:
    started.ask("continue", threadId=1)
    asked = started.send("setFunctionBreakpoints", breakpoints=[{"name": "chunk 4 layer 5"}])
    slow.set()
    assert started.answer(asked)["breakpoints"][0]["verified"]
    assert started.event("stopped")["hitBreakpointIds"] == [1]
    assert started.waiting("stopped") == []


def test_breakpoints_that_change_during_a_step_leave_it_a_step(
    started: Editor, slow: threading.Event
) -> None:
    started.functions("chunk 5 layer 5")
    for _ in range(2):
        started.go("stepOut")
    started.ask("stepOut", threadId=1)
    wait_for(lambda: "under way" in str(started.names(1)), "rank 1 waits in the third chunk")
    assert started.functions() == []  # and the step is still under way
    asked = started.send("setFunctionBreakpoints", breakpoints=[{"name": "chunk 4 layer 5"}])
    slow.set()
    assert started.answer(asked)["breakpoints"][0]["verified"]
    stop = started.event("stopped")
    assert (stop["reason"], "block c2 l5" in started.output()) == ("step", True)
    assert "hitBreakpointIds" not in stop
    assert started.go("continue")["hitBreakpointIds"] == [2]


def test_a_breakpoint_that_goes_while_a_step_is_on_its_way_there_hides_no_stop(
    started: Editor, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken, reached, opened = OPS["layer"], threading.Event(), threading.Event()

    def waits(state: Any, op: Any, comm: Any) -> Outcome:
        if str(op) == "layer c0 l1":
            reached.set()
            opened.wait(DEADLINE_S)
        return unbroken(state, op, comm)

    monkeypatch.setitem(OPS, "layer", waits)
    started.functions("chunk 0 layer 1")
    started.ask("stepOut", threadId=1)
    wait_for(reached.is_set, "the step is under way")
    assert started.functions() == []
    opened.set()
    assert started.event("stopped")["hitBreakpointIds"] == [1]


def test_a_breakpoint_that_the_console_has_removed_is_set_again(started: Editor) -> None:
    assert started.functions("layer 5")[0]["id"] == 1
    started.say("breakpoints.clear()")
    again = started.functions("layer 5")[0]
    assert (again["verified"], again["id"]) == (True, 2)
    assert started.go("continue")["hitBreakpointIds"] == [2]
    started.say("breakpoints.remove(2)")
    assert [one["verified"] for one in started.functions("layer 5", "chunk 1 layer 3")] == [True, True]


def test_watch_and_hover_change_nothing(started: Editor, tmp_path: Path) -> None:
    started.say('inject("nan", layer=2, chunk=1, where="compute")')
    started.functions("layer 5")
    for text in (
        "faults.clear", "faults.remove(1)", "breakpoints.clear()", "run.breakpoints.remove(1)", "break_at(layer=1)",
        'inject("nan", rank=1, layer=2)', f"report({str(tmp_path / 'report.html')!r})", "report", "save",
    ):  # fmt: skip
        for context in ("watch", "hover", "variables"):
            refusal = started.refused("evaluate", expression=text, context=context)
            assert "changes something: say it in the debug console" in refusal, text
    assert started.ask("evaluate", expression="where", context="hover")["result"].startswith("paused")
    assert started.say("breakpoints").startswith("#1")
    assert "nan" in started.say("faults")
    assert list(tmp_path.iterdir()) == []


def test_an_exception_stops_with_its_traceback_and_a_restart_goes_on(
    started: Editor, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = OPS["layer"]

    def raises(state: Any, op: Any, comm: Any) -> Outcome:
        if str(op) == "layer c1 l3":
            raise RuntimeError("weights are gone")
        return unbroken(state, op, comm)

    monkeypatch.setitem(OPS, "layer", raises)
    stop = started.go("continue")
    assert (stop["reason"], stop["threadId"]) == ("exception", 2)
    assert stop["description"].startswith("A rank has failed: rank 1")
    assert "to go on: session.recover(); run.restart()" in stop["text"]
    info = started.ask("exceptionInfo", threadId=2)
    assert info["exceptionId"] == "failed: exception"
    assert "weights are gone" in info["description"]
    assert "to go on: " in info["description"]
    names = started.names(1)
    assert names[0] == "raises"
    assert started.frames(1)[0]["source"]["path"] == __file__
    assert any(name.startswith("layer c1 l3") for name in names)
    assert started.go("continue")["reason"] == "exception"  # it cannot go on, and says so again
    monkeypatch.setitem(OPS, "layer", unbroken)
    assert started.go("restart")["reason"] == "entry"
    assert started.go("continue")["description"] == "Prefill is done"


def test_a_restart_is_not_told_of_the_failure_that_it_ends(
    started: Editor, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken, begin, resume = OPS["layer"], StopTeller.begin, DebugTarget.resume
    restart, look = DebugTarget.restart, Run.look
    begun, looks = threading.Event(), list[str]()

    def raises(*_: Any) -> Outcome:
        raise RuntimeError("weights are gone")

    def begins(teller: StopTeller, *given: Any, **named: Any) -> None:
        begin(teller, *given, **named)
        if named.get("mends"):
            begun.set()

    def resumes(target: DebugTarget) -> None:
        resume(target)
        begun.wait(DEADLINE_S)  # the client hears of the failure before this call has returned

    def restarts(target: DebugTarget) -> None:
        before = len(looks)
        wait_for(lambda: len(looks) > before + 1, "the teller has looked meanwhile")
        monkeypatch.setitem(OPS, "layer", unbroken)
        restart(target)

    def looks_on(run: Run) -> None:
        if threading.current_thread().name == "dinfer dap stops":
            looks.append("")
        look(run)

    monkeypatch.setitem(OPS, "layer", raises)
    monkeypatch.setattr(StopTeller, "begin", begins)
    monkeypatch.setattr(DebugTarget, "resume", resumes)
    monkeypatch.setattr(DebugTarget, "restart", restarts)
    monkeypatch.setattr(Run, "look", looks_on)
    assert started.go("continue")["reason"] == "exception"
    assert started.go("restart")["reason"] == "entry"


def test_a_hang_stops_with_the_verdict(started: Editor, door: threading.Event) -> None:
    stop = started.go("continue")
    assert (stop["reason"], stop["threadId"]) == ("exception", 2)
    assert stop["description"].startswith("Hung: rank 1 ")
    info = started.ask("exceptionInfo", threadId=2)
    assert info["exceptionId"].startswith("hung: stuck")
    assert "to go on: session.recover(); run.restart()" in info["description"]
    names = started.names(1)
    assert "wait" in names  # its Python frames, over its op
    assert any(name == "layer c1 l3 (under way)" for name in names)
    scopes = started.scopes(
        next(one for one in started.frames(0) if "layer" in one["name"] or "chunk" in one["name"])
    )
    kv = next(name for name in scopes if name.startswith("KV"))
    assert started.variables(scopes[kv])
    door.set()
    assert started.event("continued")["allThreadsContinued"]
    assert started.event("stopped")["description"] == "Prefill is done"


def test_the_console_takes_what_is_listed_and_nothing_else(started: Editor) -> None:
    assert "run_to(chunk=1, layer=5)" in started.say("help")
    assert started.say("run.where()").startswith("paused")
    started.go("stepOut")
    assert "bit for bit" in started.say("kv().diff()")
    assert "equal" in started.say("compare")
    frame = next(one for one in started.frames(1) if "done last" in one["name"])
    assert started.say("absmax > 1e9", frameId=frame["id"]).startswith("False: K of c0 l3 on rank 1")
    assert "select the frame of an op" in started.refused("evaluate", expression="nan", context="repl")
    assert "set a breakpoint" in started.refused(
        "evaluate", expression="slower than 5 ms", frameId=frame["id"]
    )
    for text in (
        "__import__('os')",
        "kv().__class__",
        "plan.lanes",
        "where()[0]",
        "1 + 1",
        "kv(**{})",
        "kv(layer=(",
    ):
        assert "`help` lists them" in started.refused("evaluate", expression=text, context="repl"), text
    refusal = started.refused("evaluate", expression="kv(layer=[x for x in (1,)])", context="repl")
    assert "is no plain value" in refusal
    assert "Did you mean where" in started.refused("evaluate", expression="wher", context="repl")
    assert "moves the run" in started.refused(
        "evaluate", expression="run_to(chunk=0, layer=1)", context="watch"
    )
    found = started.ask("completions", text="run.st", column=7)["targets"]
    assert {one["label"] for one in found} >= {"step", "step_back", "standing"}
    assert "the layers are 0 to 5" in started.refused("evaluate", expression="kv(layer=99)", context="repl")


def test_mistakes_in_a_launch_are_one_message(editor: Editor, launch: dict[str, Any]) -> None:
    for request in ("launch", "attach"):
        assert "send initialize first" in editor.refused(request, **launch)
    editor.ask("initialize", adapterID="dinfer")
    assert "send launch or attach first" in editor.refused("next", threadId=1)
    assert editor.ask("threads") == {"threads": []}
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"chunksize": 4}, "unknown argument 'chunksize' of launch. Did you mean chunk_size?"),
        ({"chunk_size": 0}, "chunk_size is 0; it must be at least 1"),
        ({"schedule": "pipeline"}, "Did you mean pipelined?"),
        ({"prompt": "x"}, "more than one is given"),
        ({"promptIds": []}, "none of them is given"),
        ({"ranks": "3"}, "ranks is '3'; it must be a whole number"),
        ({"take": True}, 'take is of "request": "attach"'),
        ({"model": "/no/such/folder"}, "/no/such/folder"),
        ({"promptIds": [], "promptFile": "/no/such/file"}, "prompt_file '/no/such/file' cannot be read"),
    ]
    for wrong, words in mistakes:
        assert words in editor.refused("launch", **{**launch, **wrong})
    assert "where nobody can attach" in editor.refused("attach", where="threads")
    assert 'is of "request": "launch"' in editor.refused("attach", model="demo")
    assert "does not know the request 'modules'" in editor.refused("modules")


def test_a_relative_model_is_of_the_folder_cwd(
    editor: Editor, launch: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    (tmp_path / "checkpoint").symlink_to(model)
    at_first = Path.cwd()
    assert editor.start(**{**launch, "model": "checkpoint"}, cwd=str(tmp_path))["reason"] == "entry"
    assert Path.cwd() == at_first  # a server at a port has more clients, and stays where it is


def test_a_launch_that_does_not_stop_on_entry(editor: Editor, launch: dict[str, Any]) -> None:
    assert editor.start(**launch, stopOnEntry=False)["description"] == "Prefill is done"
    assert "has a run already" in editor.refused("launch", **launch)


def test_run_without_debugging_writes_the_text_and_ends(editor: Editor, launch: dict[str, Any]) -> None:
    editor.ask("initialize", adapterID="dinfer")
    editor.ask("launch", **launch, noDebug=True)
    editor.event("initialized")
    editor.ask("configurationDone")
    assert editor.event("exited") == {"exitCode": 0}
    editor.event("terminated")
    assert "4 new tokens" in editor.output()
    assert editor.waiting("stopped") == []


def test_disconnect_ends_a_launched_session(started: Editor) -> None:
    started.ask("disconnect", terminateDebuggee=True)
    started.wait_until_ended()


@pytest.mark.parametrize("line", ["GET / HTTP/1.1", "POST /a:b HTTP/1.1", "Content-Length: 2\r\nHost: x"])
def test_a_client_that_speaks_no_protocol_is_told_so(line: str) -> None:
    with editor_in_process() as editor:
        editor._writer.write(f"{line}\r\nContent-Length: 2\r\n\r\n{{}}".encode())
        editor._writer.flush()
        wait_for(lambda: "it must read 'Content-Length: N'" in editor.output(), "it is told")


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Layer ops wait at `layer c2 l3` until this is set, on rank 1."""
    opened, unbroken = threading.Event(), OPS["layer"]

    def waits(state: Any, op: Any, comm: Any) -> Outcome:
        if str(op) == "layer c2 l3":
            opened.wait()
        return unbroken(state, op, comm)

    monkeypatch.setitem(OPS, "layer", waits)
    yield opened
    opened.set()
