"""Hosts of the fault lab: what of them can be known without making any."""

from __future__ import annotations

import os
import shutil

import pytest

from dinfer.lab.hosts import RANGES, HostsError, LabNetwork, free_range, why_not


def test_addresses_are_those_to_which_no_route_leads() -> None:
    assert str(free_range([])) == "10.77.0.0/24"
    assert str(free_range([], first=300)) == "10.77.44.0/24"
    taken = ["default", "0.0.0.0/1", "128.0.0.0/1", "192.168.1.0/24", "10.77.0.0/23", "10.77.2.9"]
    assert str(free_range(taken)) == "10.77.3.0/24"
    assert str(free_range(["10.77.255.0/24"], first=255)) == "10.77.0.0/24"
    assert str(free_range(["10.0.0.0/8"], first=7)) == "198.19.7.0/24"
    with pytest.raises(HostsError, match="no addresses are left"):
        free_range(RANGES)


def test_why_there_are_none_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000, raising=False)
    assert why_not() == "only root can make network namespaces"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "tc" else name)
    assert why_not().startswith("network namespaces need tc of iproute2")


def test_a_wire_is_the_same_from_both_ends_and_slow_in_one_direction() -> None:
    network = LabNetwork("hub", (), "10.77.0.1")
    assert network.cut(0, 2) == network.cut(2, 0) != network.cut(0, 1)
    assert network.slow(0, 2, 1000) != network.slow(2, 0, 1000)
    assert "1000bit" in network.slow(0, 2, 1000)
