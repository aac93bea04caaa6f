"""The watcher speaks when its rank cannot: in C code that holds the GIL, and after it was killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from dinfer.run.failure import RankFailed
from tests.support.runs import Fault, fault_pid, wait_for
from tests.support.stepped import stepped
from tests.support.twin import prompt

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

IDS = tuple(prompt(22))
HOLD_THE_GIL = "ctypes.PyDLL(None).pause()"  # until a signal comes: no thread of the process runs any Python


def test_a_rank_that_holds_its_gil_and_is_then_killed_is_known_by_its_position(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in Fault(HOLD_THE_GIL, layer=5).environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    with stepped(model, IDS, tmp_path / "logs", world_size=2, chunk_size=4) as run:
        run.stepper.resume()
        wait_for((tmp_path / "fault.at").exists, "rank 1 is in the layer")
        state, heard = run.ranks.ranks[1], set[float]()

        def heard_often() -> bool:
            heard.add(state.heard)
            return len(heard) > 5

        wait_for(heard_often, "the watcher speaks")
        assert "compute in `layer c1 l5`" in run.stepper.where().splitlines()[1]
        assert state.process == "S"
        os.kill(fault_pid(tmp_path), signal.SIGKILL)
        with pytest.raises(
            RankFailed, match=r"rank 1 was killed by SIGKILL; it stood at: .*in `layer c1 l5`"
        ):
            run.stepper.wait(60)
