"""What programs do that the probe must bear: it changes nothing of theirs, and goes on recording."""

from __future__ import annotations

import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import dinfer
from dinfer.watch.probe import recorder
from dinfer.watch.probe.imports import ImportWatch
from dinfer.watch.probe.records import WatchedProcess
from tests.support.probed import Watched


def well(watched: Watched) -> WatchedProcess:
    """What has been recorded, by a probe that has met no problem."""
    process = watched()
    assert process.problems == []
    return process


@pytest.mark.usefixtures("fake")
def test_ranks_of_a_group_that_can_be_gone_through_once(watched: Watched) -> None:
    group = dist.new_group(map(int, ["1", "2"]), backend="fake")
    assert dist.get_process_group_ranks(group) == [1, 2]
    dist.all_reduce(torch.ones(2), group=group)
    assert [op.kind for op in well(watched).ops] == ["new_group", "all_reduce"]


@pytest.mark.usefixtures("fake")
def test_ranks_that_are_none_are_torchs_to_refuse(watched: Watched) -> None:
    with pytest.raises((TypeError, ValueError)):
        dist.new_group(["one", None])
    dist.all_reduce(torch.ones(2))
    assert [op.kind for op in well(watched).ops][-1] == "all_reduce"


@pytest.mark.usefixtures("fake")
def test_a_label_that_is_no_small_number(watched: Watched) -> None:
    """A request's id, say."""
    with dinfer.label(chunk=2**40, layer=3):
        dist.all_reduce(torch.ones(2))
    dist.all_reduce(torch.ones(2))
    assert [(op.layer, op.chunk) for op in well(watched).ops] == [(3, None), (None, None)]


@pytest.mark.usefixtures("fake")
def test_an_exception_whose_text_cannot_be_made_is_handled_while_ops_go_on(watched: Watched) -> None:
    class Silent(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    for error in (Silent(), AssertionError(torch.ones(2))):
        try:
            raise error
        except (Silent, AssertionError):
            dist.all_reduce(torch.ones(2))
    process = well(watched)
    assert len(process.ops) == 2
    assert [one.message for one in process.handled] == ["", "(Tensor)"]


@pytest.mark.usefixtures("fake")
def test_after_many_handled_exceptions_the_last_is_told(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "MOST_RAISED", 2)
    for error in [ValueError(number) for number in range(5)]:
        try:
            raise error
        except ValueError:
            dist.all_reduce(torch.ones(2))
    watched.probe.recorder.raised(RuntimeError("the end"), "exception")
    process = well(watched)
    assert len(process.handled) == 2
    assert process.exception is not None
    assert process.exception.message == "the end"


def test_all_who_ask_for_a_module_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wanted_by_two.py").write_text("value = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    imports, got = ImportWatch(), list[str]()

    def act(name: str) -> Callable[[types.ModuleType], None]:
        return lambda module: got.append(f"{name} {module.value}")

    imports.add("wanted_by_two", act("one"))
    imports.add("wanted_by_two", act("two"))
    try:
        import wanted_by_two  # type: ignore[import-not-found]  # noqa: F401
    finally:
        imports.remove()
        sys.modules.pop("wanted_by_two", None)
    assert got == ["one 3", "two 3"]


IN_C = """
import ctypes, os, signal, sys
from pathlib import Path
from dinfer.watch.probe import stacks

libc = ctypes.CDLL(None)
calls = []
handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(calls.append)  # as C code installs one: Python does not know
libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
take = lambda number=signal.SIGUSR2: libc.signal(number, ctypes.cast(handler, ctypes.c_void_p))
path = Path(sys.argv[1])
"""


def in_c(tmp_path: Path, then: str) -> str:
    """What a process prints whose C code takes the signal."""
    return subprocess.run(
        [sys.executable, "-c", IN_C + then, str(tmp_path / "dump")],
        capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip


def test_a_handler_of_c_code_stays_and_is_not_sent_the_signal(tmp_path: Path) -> None:
    said = in_c(
        tmp_path,
        "take(); take(signal.SIGRTMAX); print(stacks.dump_on_signal(path), path.exists())\n"
        "os.kill(os.getpid(), signal.SIGUSR2); print(calls)",
    )
    assert said.split() == ["None", "False", f"[{signal.SIGUSR2.value}]"]


@pytest.mark.parametrize(
    "taken",
    ["take()", "import faulthandler; other = path.open('wb'); faulthandler.register(signal.SIGUSR2, other)"],
)
def test_where_somebody_else_uses_one_signal_another_is_taken(taken: str, tmp_path: Path) -> None:
    """Also where they dump stacks on it, as dinfer's own ranks do: each has a file of its own."""
    said = in_c(
        tmp_path,
        f"{taken}\n"
        "for _ in range(2):\n"
        "    print(stacks.dump_on_signal(path), stacks.dumps_still())\n"
        "    print(stacks.dump_on_signal(path), stacks.dumps_still())\n"
        "    os.kill(os.getpid(), signal.SIGRTMAX); print(path.read_text().count('Current thread'))\n"
        "    stacks.dump_no_more(); print(stacks._handler(signal.SIGRTMAX), stacks._handler(signal.SIGUSR2) != 0)",
    )
    number = signal.SIGRTMAX.value
    once = [str(number), "True", str(number), "True"]
    assert said.split() == [*once, "1", "0", "True", *once, "2", "0", "True"]


def test_a_handler_that_c_code_sets_later_is_seen_and_stays(tmp_path: Path) -> None:
    said = in_c(
        tmp_path,
        "print(stacks.dump_on_signal(path), stacks.dumps_still()); take(); print(stacks.dumps_still())\n"
        "stacks.dump_no_more(); os.kill(os.getpid(), signal.SIGUSR2); print(calls)",
    )
    number = signal.SIGUSR2.value
    assert said.split() == [str(number), "True", "False", f"[{number}]"]


def test_the_signal_is_taken_and_given_back_again_and_again(tmp_path: Path) -> None:
    said = in_c(
        tmp_path,
        "for _ in range(2):\n"
        "    print(stacks.dump_on_signal(path) is not None, stacks.dumps_still())\n"
        "    stacks.dump_on_signal(path); print(stacks.dumps_still()); stacks.dump_no_more()\n"
        "    print(stacks._handler(signal.SIGUSR2))",
    )
    assert said.split() == ["True", "True", "True", "0"] * 2
