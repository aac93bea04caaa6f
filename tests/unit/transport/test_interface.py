"""The interface that leads to other hosts is never loopback."""

from __future__ import annotations

import os
import socket
import threading
from types import SimpleNamespace

import psutil
import pytest

from dinfer.config import ConfigError
from dinfer.transport import gloo, interface
from dinfer.transport.interface import (
    NoInterface,
    check_own_address,
    check_route,
    interface_for_peers,
    own_address_towards,
)

ADDRESSES = {"lo": "127.0.0.1", "eth0": "10.0.0.5", "wlan0": "192.168.1.5", "down0": ""}


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with these interfaces, whose own name resolves to loopback."""
    routes = {"10.0.0.1": "10.0.0.5", "192.168.1.1": "192.168.1.5", "myself": "127.0.1.1"}

    def own(host: str) -> str:
        if host not in routes:
            raise OSError(101, "Network is unreachable")
        return routes[host]

    def addresses() -> dict[str, list[SimpleNamespace]]:
        six = SimpleNamespace(family=socket.AF_INET6, address="::2")
        return {
            name: [six, *[SimpleNamespace(family=socket.AF_INET, address=address)] * bool(address)]
            for name, address in ADDRESSES.items()
        }

    monkeypatch.setattr(interface, "own_address_towards", own)
    monkeypatch.setattr(psutil, "net_if_addrs", addresses)


def test_the_interface_of_the_route_or_the_one_wished_for() -> None:
    assert interface_for_peers("10.0.0.1") == "eth0"
    assert interface_for_peers("192.168.1.1") == "wlan0"
    assert interface_for_peers("10.0.0.1", "wlan0") == "wlan0"


@pytest.mark.parametrize(
    ("address", "wished", "words"),
    [
        ("myself", "", "leads to this host's loopback"),
        ("10.0.0.1", "lo", "loopback"),
        (
            "10.9.9.9",
            "",
            "there is no route to 10.9.9.9 .Network is unreachable.: check --master-addr",
        ),
        ("10.0.0.1", "eth7", "eth7 is not an interface"),
        ("10.0.0.1", "down0", "down0 is not an interface with an IPv4 address"),
    ],
)
def test_what_others_cannot_reach_is_refused(address: str, wished: str, words: str) -> None:
    with pytest.raises(NoInterface, match=words):
        interface_for_peers(address, wished)


def test_loopback_is_reached_by_loopback() -> None:
    assert own_address_towards("127.0.0.1") == "127.0.0.1"  # the real one: imported before it was replaced


def test_gloo_talks_over_the_interface_to_where_the_ranks_meet_now_unless_the_user_has_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gloo, "_chosen", "")
    monkeypatch.setenv(gloo.INTERFACE, "")
    monkeypatch.delenv(gloo.INTERFACE)
    for address, name in (("10.0.0.1", "eth0"), ("192.168.1.1", "wlan0"), ("10.9.9.9", "wlan0")):
        gloo._choose_interface(address)
        assert os.environ[gloo.INTERFACE] == name
    monkeypatch.setenv(gloo.INTERFACE, "eth7")
    gloo._choose_interface("10.0.0.1")
    assert os.environ[gloo.INTERFACE] == "eth7"


@pytest.mark.parametrize(
    ("address", "words"),
    [
        (
            "no-such-host.invalid",
            r"master_addr 'no-such-host.invalid' cannot be resolved \(.+\): give the address",
        ),
        (
            "192.0.2.77",
            r"ranks cannot meet at '192.0.2.77' .*Cannot assign requested .*it has 127.0.0.1, 10.0.0.5",
        ),
    ],
)
def test_where_ranks_cannot_meet_is_said_before_they_start(address: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_own_address(address)


def test_a_name_that_takes_too_long_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()

    def answer_late(*_: object, **__: object) -> list[object]:
        over.wait()
        return []

    monkeypatch.setattr(socket, "getaddrinfo", answer_late)
    monkeypatch.setattr(interface, "RESOLVE_S", 0.05)
    with pytest.raises(ConfigError, match=r"cannot be resolved \(no answer within 0\.05 s\)"):
        check_own_address("slow.example")
    over.set()


def test_a_host_that_does_not_reach_itself_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def time_out(*_: object) -> None:
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", time_out)
    with pytest.raises(ConfigError, match=r"ranks cannot meet at .*: timed out\. master_addr must be"):
        check_own_address("127.0.0.1")


def test_ranks_meet_at_loopback_and_its_name() -> None:
    check_own_address("127.0.0.1")
    check_own_address("localhost")


def test_rank_0_without_a_route() -> None:
    with pytest.raises(
        ConfigError, match=r"no route to rank 0's host '10\.9\.9\.9' .*Network is unreachable"
    ):
        check_route("10.9.9.9")
