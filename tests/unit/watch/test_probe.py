"""The probe in this process, on torch's fake backend and on gloo with one rank: what it sees of ops."""

from __future__ import annotations

import gc
import os
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch.distributed import send as early_send

from dinfer.verdict.completed import findings_of_events
from dinfer.watch.probe import callers, kernels, patched, recorder
from dinfer.watch.probe.groups import NO_GROUP
from dinfer.watch.probe.labels import label
from dinfer.watch.probe.reading import ask_stacks, read
from dinfer.watch.probe.records import WatchedOp, WatchedProcess
from dinfer.watch.probe.start import HOOK_VARIABLE, Probe
from dinfer.watch.probe.works import Works
from dinfer.watching.events import ranks_of, trace_of
from tests.support.probed import Watched
from tests.support.runs import wait_for


def line_of(function: Callable[..., Any], text: str) -> int:
    """Where this text is in a function of this file."""
    lines = Path(__file__).read_text().splitlines()
    begin = function.__code__.co_firstlineno
    return next(number for number in range(begin, len(lines) + 1) if text in lines[number - 1])


def only(process: WatchedProcess, kind: str) -> WatchedOp:
    """The one op of this kind."""
    (found,) = (op for op in process.ops if op.kind == kind)
    return found


@pytest.fixture(params=["kernels", "patched"])
def hook(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way to see ops."""
    monkeypatch.setenv(HOOK_VARIABLE, request.param)
    return str(request.param)


@pytest.mark.usefixtures("fake")
def test_a_send_and_who_called_it(hook: str, watched: Watched) -> None:
    def step(hidden: torch.Tensor, layer_idx: int) -> None:
        assert layer_idx
        early_send(hidden, 3, tag=5)

    for chunk in (7,):
        step(torch.zeros(2, 3, dtype=torch.bfloat16), 4 + chunk)
    process = watched()
    op = only(process, "send")
    assert (op.peer, op.tag, op.shape, op.dtype, op.nbytes) == (3, 5, (2, 3), "bfloat16", 12)
    assert (op.file, op.function, op.line) == (__file__, "step", line_of(step, "early_send"))
    assert (op.layer, op.chunk, op.thread) == (11, 7, "MainThread")
    assert (op.is_async, op.state, op.waited_line) == (False, "done", op.line)
    assert 0 < op.issued_ns <= op.waited_ns <= op.done_ns
    assert (process.rank, process.world_size, process.hook) == (1, 4, hook)
    assert process.groups[op.group].ranks == (0, 1, 2, 3)
    assert process.problems == []


@pytest.mark.usefixtures("fake")
def test_a_line_of_a_package_comes_with_the_users_line(watched: Watched) -> None:
    package: dict[str, Any] = {"dist": dist}
    source = "def _gather(tensor):\n    dist.all_reduce(tensor)\ndef gather(tensor):\n    _gather(tensor)\n"
    exec(compile(source, "/lib/site-packages/parallel/mappings.py", "exec"), package)

    def forward(layer: int) -> None:
        assert layer
        package["gather"](torch.zeros(2))

    forward(3)
    op = only(watched(), "all_reduce")
    line = line_of(forward, 'package["gather"]')
    assert (op.file, op.line, op.layer) == ("/lib/site-packages/parallel/mappings.py", 2, 3)
    assert op.function == f"_gather, called at test_probe.py:{line} in forward"


@pytest.mark.usefixtures("fake", "hook")
def test_an_isend_that_nobody_waits_for(watched: Watched) -> None:
    work = dist.isend(torch.zeros(2), 0)
    op = only(watched(), "send")
    assert (op.is_async, op.waited_ns, op.done_ns, op.state) == (True, 0, 0, "issued")
    assert work is not None
    work.wait()
    after = only(watched(), "send")
    assert after.state == "done"
    assert after.waited_line == line_of(test_an_isend_that_nobody_waits_for, "work.wait()")
    assert after.issued_ns < after.waited_ns <= after.done_ns


@pytest.mark.usefixtures("fake", "hook")
def test_every_way_to_send_is_seen(watched: Watched) -> None:
    tensor = torch.zeros(4)
    dist.group.WORLD.send([tensor], 2, 0).wait()  # type: ignore[union-attr]
    for work in dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, tensor, 0), dist.P2POp(dist.irecv, torch.zeros(4), 2)]
    ):
        work.wait()
    with torch.inference_mode():
        dist.send(tensor, 3)
    with ThreadPoolExecutor(1, thread_name_prefix="comm") as pool:
        pool.submit(dist.send, tensor, 0).result()
    from_any = dist.irecv(torch.zeros(4))
    assert from_any is not None
    from_any.wait()
    ops = watched().ops
    assert [(op.kind, op.peer) for op in ops[:5]] == [
        ("send", 2),
        ("send", 0),
        ("recv", 2),
        ("send", 3),
        ("send", 0),
    ]
    assert [op.kind for op in ops] == ["send", "send", "recv", "send", "send", "recv"]
    assert ops[4].thread == "comm_0"
    assert {op.state for op in ops} == {"done"}


@pytest.mark.usefixtures("fake", "hook")
def test_a_subgroup_names_global_ranks(watched: Watched) -> None:
    group = dist.new_group([1, 3])
    dist.send(torch.zeros(1), group_dst=1, group=group)
    process = watched()
    made, op = process.ops
    assert (made.kind, process.groups[made.group].ranks) == ("new_group", (1, 3))
    assert (op.peer, process.groups[op.group].ranks) == (3, (1, 3))


def collectives(world: int) -> dict[str, Callable[[], object]]:
    """Each kind of collective, of tensors of 4 numbers."""
    tensor, whole = torch.ones(4), torch.ones(4 * world)
    parts = [torch.ones(4) for _ in range(world)]
    return {
        "all_reduce": lambda: dist.all_reduce(tensor),
        "broadcast": lambda: dist.broadcast(tensor, 0),
        "reduce": lambda: dist.reduce(tensor, 0),
        "all_gather": lambda: dist.all_gather(parts, tensor),
        "gather": lambda: dist.gather(tensor, parts if dist.get_rank() == 0 else None),
        "scatter": lambda: dist.scatter(tensor, parts if dist.get_rank() == 0 else None),
        "reduce_scatter": lambda: dist.reduce_scatter(tensor, parts),
        "all_to_all": lambda: dist.all_to_all_single(whole, torch.ones(4 * world)),
        "barrier": lambda: dist.barrier(),
    }


@pytest.mark.parametrize("kind", collectives(1))
@pytest.mark.usefixtures("gloo", "hook")
def test_collectives_are_seen(watched: Watched, kind: str) -> None:
    collectives(1)[kind]()
    op = only(watched(), kind)
    assert (op.state, op.is_async, op.function) == ("done", False, "<lambda>")
    assert (op.shape, op.nbytes) == (() if kind == "barrier" else (4,), 0 if kind == "barrier" else 16)
    assert op.peer == (0 if kind in ("broadcast", "reduce", "gather", "scatter") else None)
    assert op.issued_ns <= op.waited_ns <= op.done_ns


@pytest.mark.skipif(
    not hasattr(torch.ops._c10d_functional, "isend"), reason="this torch has no functional messages"
)
@pytest.mark.usefixtures("fake")
def test_functional_messages_are_seen_and_others_then_only_once(watched: Watched) -> None:
    group = dist.group.WORLD
    assert group is not None
    for _ in range(2):
        torch.ops._c10d_functional.isend(torch.zeros(2), 3, 0, group.group_name)
        dist.send(torch.zeros(3), 2)
    ops = [(op.kind, op.peer, op.shape, op.number) for op in watched().ops]
    assert ops == [("send", 3, (2,), 0), ("send", 2, (3,), 0), ("send", 3, (2,), 1), ("send", 2, (3,), 1)]


@pytest.mark.skipif(
    not hasattr(torch.ops._c10d_functional, "isend"), reason="this torch has no functional messages"
)
@pytest.mark.usefixtures("fake")
def test_a_functional_message_waits_for_no_lock_of_another_process_or_once_all_are_seen(
    watched: Watched,
) -> None:
    group, own = dist.group.WORLD, watched.probe.recorder
    assert group is not None
    arguments = (torch.zeros(2), 3, 0, group.group_name)

    def send() -> None:
        thread = threading.Thread(target=torch.ops._c10d_functional.isend, args=arguments, daemon=True)
        thread.start()
        thread.join(30)
        assert not thread.is_alive()

    own.placing.acquire()  # as another thread had it when the process forked
    own._reset()
    send()
    with own.placing:
        send()
    assert [op.kind for op in watched().ops] == ["send", "send"]


@pytest.mark.usefixtures("fake", "hook")
def test_messages_are_seen_however_their_arguments_are_given(watched: Watched) -> None:
    group = dist.group.WORLD
    assert group is not None
    group.send(tensors=[torch.zeros(2)], dstRank=3, tag=7)
    group.recv((torch.zeros(2),), srcRank=torch.tensor(2), tag=8)  # type: ignore[arg-type]
    group.recv_anysource([torch.zeros(2)], 9)
    with pytest.raises(TypeError):
        group.send([torch.zeros(2)])  # type: ignore[call-arg]
    ops = [(op.kind, op.peer, op.shape, op.tag) for op in watched().ops if op.state != "failed"]
    assert ops == [("send", 3, (2,), 7), ("recv", 2, (2,), 8), ("recv", None, (2,), 9)]
    assert watched().problems == []


@pytest.mark.usefixtures("gloo", "hook")
def test_an_async_collective_is_over_before_anybody_waits(watched: Watched) -> None:
    work = dist.all_reduce(torch.ones(2), async_op=True)
    assert only(watched(), "all_reduce").is_async
    wait_for(lambda: only(watched(), "all_reduce").done_ns != 0, "the probe's thread notices the end")
    assert only(watched(), "all_reduce").waited_ns == 0
    assert work is not None
    work.wait()
    op = only(watched(), "all_reduce")
    assert 0 < op.done_ns < op.waited_ns


def by_future(work: dist.Work) -> None:
    """Waits."""
    work.get_future().wait()


def by_what_follows(work: dist.Work) -> None:
    """Waits."""
    work.get_future().then(lambda future: future.value()).wait()


def by_asking(work: dist.Work) -> None:
    """Waits."""
    wait_for(work.is_completed, "the op is over")


@pytest.mark.parametrize("wait", [by_future, by_what_follows, by_asking])
@pytest.mark.usefixtures("gloo", "hook")
def test_who_has_seen_the_end_has_waited(watched: Watched, wait: Callable[[dist.Work], None]) -> None:
    work = dist.all_reduce(torch.ones(2), async_op=True)
    assert work is not None
    wait(work)
    op = only(watched(), "all_reduce")
    assert (op.is_async, op.state, op.is_followed) == (True, "done", wait is not by_asking)
    assert op.waited_ns > 0
    if wait is not by_asking:
        assert op.waited_line == line_of(wait, ".wait()")


@pytest.mark.usefixtures("gloo")
def test_who_acts_on_the_end_need_not_wait(watched: Watched) -> None:
    work = dist.all_reduce(torch.ones(2), async_op=True)
    assert work is not None
    ended = threading.Event()
    work.get_future().then(lambda _: ended.set())
    wait_for(ended.is_set, "the op is over")
    wait_for(lambda: only(watched(), "all_reduce").done_ns != 0, "the probe's thread notices the end")
    op = only(watched(), "all_reduce")
    assert (op.is_followed, op.waited_ns) == (True, 0)
    trace = trace_of(ranks_of([watched()]))
    assert findings_of_events(trace.events, ended=[0]) == []


@pytest.mark.usefixtures("fake")
def test_who_asks_an_op_that_is_not_over_goes_on_to_something_else(watched: Watched) -> None:
    class Slow(dist.Work):
        def is_completed(self) -> bool:
            return False

    works, work = Works(watched.probe.recorder), Slow()
    works.patch()
    try:
        pending = works._recorder.issued("send", NO_GROUP, 1, 0, [torch.zeros(1)], True, None)
        assert pending is not None
        works.hand_over(work, pending)
        assert not work.is_completed()
    finally:
        works.unpatch()
    assert only(watched(), "send").waited_ns == 0


@pytest.mark.usefixtures("gloo")
def test_functional_collectives_are_waited_for_by_their_tensor(watched: Watched) -> None:
    assert dist.group.WORLD is not None
    found = functional.all_reduce(torch.ones(2), "sum", dist.group.WORLD)
    before = only(watched(), "all_reduce")
    assert (before.is_async, before.waited_ns) == (True, 0)
    assert (found + 1).tolist() == [2.0, 2.0]
    after = only(watched(), "all_reduce")
    assert after.state == "done"
    assert after.waited_line == line_of(
        test_functional_collectives_are_waited_for_by_their_tensor, "(found + 1)"
    )


@pytest.mark.usefixtures("gloo")
def test_ops_that_torch_itself_waits_for_are_over(watched: Watched) -> None:
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    model(torch.ones(1, 2)).sum().backward()
    dist.barrier()
    ops = watched().ops
    assert {op.kind for op in ops} == {"all_gather", "broadcast", "all_reduce", "barrier"}
    assert {(op.state, op.is_async) for op in ops} == {("done", False)}
    assert {op.file for op in ops} == {__file__}


@pytest.mark.usefixtures("gloo")
def test_a_compiled_function_is_called_where_the_user_calls_it(watched: Watched) -> None:
    def double(tensor: torch.Tensor) -> torch.Tensor:
        assert dist.group.WORLD is not None
        reduced: torch.Tensor = functional.all_reduce(tensor * 2, "sum", dist.group.WORLD)
        return reduced + 1

    compiled = torch.compile(double, backend="aot_eager", fullgraph=True)
    assert compiled(torch.ones(2)).tolist() == [3.0, 3.0]
    op = only(watched(), "all_reduce")
    assert (op.file, op.state) == (__file__, "done")


@pytest.mark.usefixtures("gloo", "hook")
def test_an_op_that_fails_says_why(watched: Watched) -> None:
    with pytest.raises(RuntimeError, match="contiguous"):
        dist.isend(torch.zeros(3, 3).t()[:2], 0)
    op = only(watched(), "send")
    assert op.state == "failed"
    assert "contiguous" in op.error


@pytest.mark.usefixtures("gloo")
def test_an_op_while_an_exception_is_handled(watched: Watched) -> None:
    try:
        raise KeyError("lost")
    except KeyError:
        dist.barrier()
        dist.barrier()
    process = watched()
    (raised,) = process.handled
    assert (raised.type, raised.message, raised.file) == ("KeyError", "'lost'", __file__)
    assert raised.line == line_of(test_an_op_while_an_exception_is_handled, "raise KeyError")
    assert raised.seq == process.ops[0].seq


@pytest.mark.usefixtures("gloo")
def test_an_exception_that_has_the_id_of_one_before_is_another(watched: Watched) -> None:
    ids = list[int]()
    while len(ids) < 1000 and len(set(ids)) == len(ids):
        try:
            raise KeyError(len(ids))
        except KeyError as error:
            ids.append(id(error))
            if len(ids) < recorder.MOST_RAISED:
                dist.barrier()
    assert len(set(ids)) < len(ids)  # Python has used one again
    assert [raised.message for raised in watched().handled] == [str(n) for n in range(len(ids))]


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.usefixtures("gloo", "watched")
def test_an_exception_that_was_handled_is_not_kept(is_first: bool) -> None:
    """Nor what the user has given it, before its handler issues an op or after."""

    def handle() -> weakref.ref[Any]:
        held = torch.ones(2)
        try:
            raise KeyError(held.shape) if is_first else KeyError("a shape")
        except KeyError as error:
            if is_first:
                error.batch = held  # type: ignore[attr-defined]
            dist.barrier()
            error.batch = held  # type: ignore[attr-defined]
        return weakref.ref(held)

    tensor = handle()
    gc.collect()
    assert tensor() is None


@pytest.mark.usefixtures("gloo")
def test_an_exception_that_ends_a_thread_is_told_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = list[weakref.ref[Any]]()

    def fail() -> None:
        held = torch.ones(2)
        kept.append(weakref.ref(held))
        raise ValueError(held.shape)

    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # pytest's own keeps it
    probe = Probe(tmp_path)
    dist.barrier()
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    gc.collect()
    probe.stop()
    assert kept[0]() is None
    (process,) = read(tmp_path)
    assert process.exception
    assert process.exception.type == "ValueError"


@pytest.mark.usefixtures("fake")
def test_labels_count_before_variables(watched: Watched) -> None:
    layer, chunk = 1, 2
    with label(layer=5):
        dist.send(torch.zeros(1), 0)
        with label(chunk=6):
            dist.send(torch.zeros(1), 0)
            assert watched().now == (5, 6)
        assert watched().now == (5, None)
    dist.send(torch.zeros(1), 0)
    assert [(op.layer, op.chunk) for op in watched().ops] == [(5, 2), (5, 6), (layer, chunk)]


def test_a_label_must_be_a_number() -> None:
    with pytest.raises(TypeError, match="layer is 'a': it takes an integer"):
        label(layer="a")  # type: ignore[arg-type]


@pytest.mark.usefixtures("fake")
def test_a_module_that_sends_is_its_own_layer(watched: Watched) -> None:
    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer_idx = 9

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            dist.send(hidden, 0)
            return hidden

    Attention()(torch.zeros(1))
    assert only(watched(), "send").layer == 9


@pytest.mark.usefixtures("fake")
def test_layers_of_transformers_are_known_by_their_module(watched: Watched) -> None:
    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

    config = Qwen3Config(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=3, num_attention_heads=1,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    model = Qwen3Model(config)
    for number in (0, 2):
        part = model.get_submodule(f"layers.{number}.mlp")
        part.register_forward_hook(lambda *_: dist.send(torch.zeros(1), 0))
    model(torch.zeros(1, 2, dtype=torch.int64))
    dist.send(torch.zeros(1), 0)
    assert [op.layer for op in watched().ops] == [0, 2, None]
    assert watched().now == (None, None)


@pytest.mark.usefixtures("fake")
def test_no_variable_is_kept_alive(watched: Watched) -> None:
    """Not by a copy of the caller's variables, nor by the Work."""

    def sends() -> weakref.ref[torch.Tensor]:
        layer = 3
        tensor = torch.zeros(2)
        dist.send(tensor, 0)
        weak = weakref.ref(tensor)
        del tensor
        gc.collect()
        assert layer == 3
        assert weak() is None
        return weak

    sends()
    assert only(watched(), "send").layer == 3


@pytest.mark.usefixtures("fake")
def test_the_users_own_locals_stay(watched: Watched) -> None:
    def sends(layer: int) -> dict[str, object]:
        mine = locals()
        dist.send(torch.zeros(1), 0)
        return mine

    assert sends(3)["layer"] == 3
    assert only(watched(), "send").layer == 3


@pytest.mark.usefixtures("fake")
def test_a_bug_of_the_probe_switches_it_off(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    dist.send(torch.zeros(1), 0)

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(recorder, "seen_from", broken)
    dist.send(torch.zeros(1), 0)
    dist.send(torch.zeros(1), 0)
    process = watched()
    assert len(process.ops) == 1
    assert process.problems == ["recording ops switched itself off: ZeroDivisionError: a bug"]


@pytest.mark.usefixtures("fake")
def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    probe = Probe(tmp_path / "file")
    dist.send(torch.zeros(1), 0)
    dist.send(torch.zeros(1), 0)
    probe.stop()
    assert capsys.readouterr().err.count("is not watched") == 1


@pytest.mark.usefixtures("fake")
def test_stacks_show_user_code_first(watched: Watched, tmp_path: Path) -> None:
    dist.send(torch.zeros(1), 0)
    number = ask_stacks(tmp_path, watched())
    release = threading.Event()

    def stands_here() -> None:
        release.wait()

    thread = threading.Thread(target=stands_here, name="mine")
    thread.start()
    try:
        wait_for(lambda: bool(watched().stacks), "the probe's thread answers")
    finally:
        release.set()
        thread.join()
    (taken,) = watched().stacks
    assert taken.number == number
    assert taken.threads[0].name == "MainThread"
    mine = next(look for look in taken.threads if look.name == "mine")
    assert mine.user_frames == 1
    assert mine.frames[0][2:] == ("stands_here", "release.wait()")
    assert watched().heartbeat_ns > 0


@pytest.mark.usefixtures("fake", "watched")
def test_a_forked_child_has_files_of_its_own(tmp_path: Path) -> None:
    dist.send(torch.zeros(1), 0)
    child = os.fork()
    if child == 0:
        dist.send(torch.zeros(1), 2)
        dist.send(torch.zeros(1), 2)
        os._exit(3)
    os.waitpid(child, 0)
    processes = {process.pid: process for process in read(tmp_path)}
    assert [op.peer for op in processes[child].ops] == [2, 2]
    assert processes[child].ended == "os._exit(3)"
    assert [op.peer for op in processes[os.getpid()].ops] == [0]
    assert processes[os.getpid()].ended is None


@pytest.mark.usefixtures("fake", "hook")
def test_nothing_is_left_once_it_stops(tmp_path: Path) -> None:
    names = ("init_process_group", "new_group")
    c10d = torch._C._distributed_c10d

    def now() -> tuple[Any, ...]:
        ours = (sys.excepthook, os._exit, vars(c10d.Work)["wait"], vars(c10d.ProcessGroup)["send"])
        return (*ours, *(getattr(dist, name) for name in names))

    before = now()
    probe = Probe(tmp_path)
    dist.send(torch.zeros(1), 0)
    probe.stop()
    assert now() == before
    dist.send(torch.zeros(1), 0)
    (process,) = read(tmp_path)
    assert len(process.ops) == 1
    assert not [thread for thread in threading.enumerate() if thread.name == "dinfer probe"]


@pytest.mark.usefixtures("fake")
def test_where_operators_cannot_be_overridden_methods_are_replaced(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a torch that has no BackendSelect for them. What was placed before it failed is taken away."""
    watched.probe.stop()
    monkeypatch.delattr(torch.library, "Library")
    folder: Path = watched.probe.recorder.folder / "other"
    probe = Probe(folder)
    dist.send(torch.zeros(1), 0)
    probe.stop()
    (process,) = read(folder)
    assert (process.hook, [op.kind for op in process.ops]) == ("patched", ["send"])
    assert "torch's operators cannot be overridden: AttributeError" in process.problems[0]


@pytest.mark.usefixtures("fake")
def test_a_way_that_there_is_not_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HOOK_VARIABLE, "magic")
    probe = Probe(tmp_path)
    dist.send(torch.zeros(1), 0)
    probe.stop()
    (process,) = read(tmp_path)
    assert process.problems == [f"{HOOK_VARIABLE} is 'magic'; it takes kernels or patched"]
    assert process.hook == "kernels"


def test_all_methods_of_this_torch_s_groups_are_known() -> None:
    """A new one would go unseen by those that are replaced. What takes tensors, and is none of these, starts no op."""
    kind = torch._C._distributed_c10d.ProcessGroup
    others = {"_end_coalescing"}
    starting = {name for name in vars(kind) if "-> c10d::Work" in (getattr(kind, name).__doc__ or "")}
    assert starting - set(patched.METHODS) <= others


def test_all_operators_of_this_torch_are_known() -> None:
    """A new one would go unseen."""
    ours = {*kernels.OPERATORS, "check_for_nan"}
    theirs = {s.name.removeprefix("c10d::") for s in torch._C._jit_get_all_schemas() if "c10d::" in s.name}
    assert {name for name in theirs if not name.startswith("_c10d_functional")} <= ours


def test_whose_code_is_whose() -> None:
    assert callers.whose(__file__) == callers.USER
    assert callers.whose(torch.nn.__file__) == callers.INTERNAL
    assert callers.whose(callers.__file__) == callers.INTERNAL
    assert callers.whose(pytest.__file__) == callers.LIBRARY
    assert callers.whose(threading.__file__) == callers.STANDARD
