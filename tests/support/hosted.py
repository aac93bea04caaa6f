"""Tests that make hosts on this machine: their mark, and cutting a host off. Not a test."""

import json

import pytest

from dinfer.lab.hosts import LabNetwork, do, why_not

WHY_NOT = why_not()
needs_hosts = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


def cut_off(network: LabNetwork, number: int) -> None:
    """Cut every wire of one host, the one to this machine too."""
    for link in json.loads(do("ip", "-n", network.hub, "-j", "link", "show")):
        if link["ifname"].partition("-")[0] == f"plug{number}":
            do("ip", "-n", network.hub, "link", "set", link["ifname"], "down")
