"""Three hosts on one machine: network namespaces on a bridge, which is in a namespace of its own. Not a test.

Needs root and iproute2. Nothing outside the namespaces made here is given an address or changed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Host:
    """A network namespace with one interface, eth0, plugged into the bridge."""

    namespace: str
    address: str

    def inside(self, *command: str) -> tuple[str, ...]:
        """The command that runs `command` on this host."""
        return ("ip", "netns", "exec", self.namespace, *command)

    def cut_off(self) -> None:
        """Take its interface down: packets vanish, connections are not closed."""
        _ip("-n", self.namespace, "link", "set", "eth0", "down")


def why_not() -> str:
    """Why no hosts can be made here; "" if they can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "needs root, to make network namespaces"
    if shutil.which("ip") is None:
        return "needs iproute2 (apt-get install iproute2), to make network namespaces"
    name = f"dinfer-try-{uuid.uuid4().hex[:6]}"
    try:
        _ip("netns", "add", name)
        _ip("netns", "delete", name)
    except subprocess.CalledProcessError as error:
        return f"network namespaces cannot be made here: {error.stderr.strip()}"
    return ""


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """That many hosts that reach one another; all is gone at the end. End what runs in them before."""
    mark = uuid.uuid4().hex[:6]
    hub = f"dinfer-{mark}-hub"
    made = [Host(f"dinfer-{mark}-{n}", f"10.77.0.{n + 1}") for n in range(count)]
    try:
        _ip("netns", "add", hub)
        _ip("-n", hub, "link", "add", "bridge", "type", "bridge")
        _ip("-n", hub, "link", "set", "bridge", "up")
        for n, host in enumerate(made):
            _plug_in(host, hub, f"port{n}")
        yield made
    finally:
        for name in [*(host.namespace for host in made), hub]:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _plug_in(host: Host, hub: str, port: str) -> None:
    _ip("netns", "add", host.namespace)
    _ip("-n", host.namespace, "link", "set", "lo", "up")
    _ip(
        *("-n", host.namespace, "link", "add", "eth0", "type", "veth"),
        *("peer", "name", port, "netns", hub),
    )
    _ip("-n", hub, "link", "set", port, "master", "bridge", "up")
    _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
    _ip("-n", host.namespace, "link", "set", "eth0", "up")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True, timeout=30)
