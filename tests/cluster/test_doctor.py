"""The doctor with real ranks: what it measures, what it says of ranks that fail, and nobody is left."""

from __future__ import annotations

import json
import multiprocessing

import pytest

from dinfer.doctor.doctor import doctor
from dinfer.doctor.pairs import measure, pairs_check

pytestmark = pytest.mark.cluster


def test_a_host_is_examined(capfd: pytest.CaptureFixture[str]) -> None:
    status = doctor("demo", 2, as_json=True)
    found = json.loads(capfd.readouterr().out)  # nothing that gloo prints is in it
    assert status == 0, found
    assert {(pair["source"], pair["target"]) for pair in found["pairs"]} == {(0, 1), (1, 0)}
    assert all(pair["latency_s"] > 0 and pair["bytes_per_s"] > 1e6 for pair in found["pairs"])
    assert multiprocessing.active_children() == []


def test_an_interface_that_is_not_there_ends_the_measurement_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nonesuch0")
    found = pairs_check(measure(2, 60), 2, "nonesuch0")
    assert (found.state, found.fix) == ("fail", "unset GLOO_SOCKET_IFNAME"), found
    assert "nonesuch0" in found.found
    assert multiprocessing.active_children() == []


def test_ranks_that_take_too_long_to_start_are_ended() -> None:
    found = pairs_check(measure(2, 0.01), 2)
    assert found.state == "unchecked"
    assert "0 of 2 ranks started" in found.found
    assert multiprocessing.active_children() == []
