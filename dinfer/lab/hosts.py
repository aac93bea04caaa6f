"""Hosts: network namespaces of this machine, with a wire between every two of them that can be cut or slowed.

Needs root and iproute2. Outside these namespaces only one interface is added, over which this machine and the hosts
reach one another. Knows no ranks.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from ipaddress import IPv4Network
from itertools import combinations

from dinfer.errors import DinferError

RANGES = ("10.77.0.0/16", "198.19.0.0/16")
"""private addresses, and addresses reserved for tests; a part to which no route leads is used"""

DEFAULT_ROUTE_BITS = 7
"""routes with prefixes of up to so many bits count as default routes"""

BURST, QUEUE = 1_600, 50_000_000
"""bytes that a slow wire passes at once, the largest packet; and bytes that it queues without dropping packets"""

BURST_OF, QUEUE_OF = (16_000, 0.0005), (250_000, 0.02)
"""the same of a limited host: bytes, or what it sends in so many seconds if that is more"""

COMMAND_S, REMOVAL_S, KILLED_S, LOOK_S = 30.0, 30.0, 10.0, 0.1

ORPHANS_S = 120.0
"""how long processes on the hosts may run on after the process that made the hosts was killed"""


@dataclass(frozen=True)
class LabHost:
    """A network namespace. eth0 leads to this machine and has the host's address; a wire leads to every other host."""

    namespace: str
    address: str

    def inside(self, *command: str) -> tuple[str, ...]:
        """The command that runs `command` on this host, in the same process (exec)."""
        return ("ip", "netns", "exec", self.namespace, *command)


@dataclass(frozen=True)
class LabNetwork:
    """`address`: this machine's, as the hosts see it; `hub`: the namespace through which all wires go. Wires are cut
    and slowed there, so that hosts notice only missing and late packets."""

    hub: str
    hosts: tuple[LabHost, ...]
    address: str

    def cut(self, one: int, other: int) -> tuple[str, ...]:
        """The command that cuts the wire between two hosts: packets are lost, both ways; connections stay open."""
        return ("ip", "-n", self.hub, "link", "set", _wire(one, other), "down")

    def slow(self, source: int, target: int, bits_per_s: int) -> tuple[str, ...]:
        """The command that slows a wire in one direction."""
        rate = ("tbf", "rate", f"{bits_per_s}bit", "burst", str(BURST), "limit", str(QUEUE))
        return ("tc", "-n", self.hub, "qdisc", "replace", "dev", _plug(target, source), "root", *rate)

    def limit(self, host: int, bits_per_s: int) -> tuple[tuple[str, ...], ...]:
        """The commands that limit what one host sends and receives, as a switch and an interface of that speed do."""
        burst, queue = (max(least, int(bits_per_s / 8 * seconds)) for least, seconds in (BURST_OF, QUEUE_OF))
        rate = ("tbf", "rate", f"{bits_per_s}bit", "burst", str(burst), "limit", str(queue))
        out = ("tc", "-n", self.hosts[host].namespace, "qdisc", "replace", "dev", "eth0", "root", *rate)
        return out, ("tc", "-n", self.hub, "qdisc", "replace", "dev", f"plug{host}", "root", *rate)

    def mend(self) -> None:
        """Undo all cuts and slowdowns."""
        for one, other in combinations(range(len(self.hosts)), 2):
            do("ip", "-n", self.hub, "link", "set", _wire(one, other), "up")
            for plug in (_plug(one, other), _plug(other, one)):
                with suppress(HostsError):  # it is not slow
                    do("tc", "-n", self.hub, "qdisc", "delete", "dev", plug, "root")


class HostsError(DinferError, RuntimeError):
    """Hosts cannot be made or used; the message says why."""


def why_not() -> str:
    """Why hosts cannot be used here, as a clause, "" if they can: makes two, uses and removes them."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "only root can make network namespaces"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"network namespaces need {tool} of iproute2 (apt-get install iproute2)"
    cannot = "network namespaces cannot be used here"
    try:
        with hosts(2) as network:
            do(*network.slow(0, 1, 1_000_000))
            do(*network.cut(0, 1))
            network.mend()
            with socket.create_server((network.address, 0)) as server:
                port = server.getsockname()[1]
                program = f"import socket; socket.create_connection(({network.address!r}, {port}), 5)"
                try:
                    do(*network.hosts[0].inside(sys.executable, "-c", program))
                except HostsError as error:
                    last = str(error).splitlines()[-1]
                    return f"{cannot}: a host cannot connect to this machine (a firewall?): {last}"
    except HostsError as error:
        return f"{cannot}: {error}"
    return ""


@contextmanager
def hosts(count: int, *, wires: bool = True) -> Iterator[LabNetwork]:
    """`count` hosts, which reach one another and this machine. At the end they are removed and their processes killed,
    also if this process is killed meanwhile. Without `wires`, all that a host sends and receives goes through eth0.
    Raises HostsError."""
    mark = uuid.uuid4().hex[:6]
    hub, outlet = f"dinfer-{mark}-hub", f"dinfer-{mark}"
    routes = json.loads(do("ip", "-4", "-j", "route", "show", "table", "all"))
    # By process, so that two labs that start at once get different addresses.
    free = free_range([route["dst"] for route in routes], os.getpid()).hosts()
    address, *addresses = (str(next(free)) for _ in range(count + 1))
    made = tuple(LabHost(f"dinfer-{mark}-{n}", own) for n, own in enumerate(addresses))
    with _removal(outlet, [*(host.namespace for host in made), hub]):
        do("ip", "netns", "add", hub)
        _add_bridge(hub, "bridge")
        for n, host in enumerate(made):
            do("ip", "netns", "add", host.namespace)
            do("ip", "-n", host.namespace, "link", "set", "lo", "up")
            _plug_in(host.namespace, "eth0", hub, f"plug{n}", "bridge")
            do("ip", "-n", host.namespace, "address", "add", f"{host.address}/32", "dev", "eth0")
            do("ip", "-n", host.namespace, "route", "add", address, "dev", "eth0", "src", host.address)
        for one, other in combinations(range(count), 2):
            if wires:
                _add_bridge(hub, _wire(one, other))
            for near, far in ((one, other), (other, one)):
                host, interface = made[near], f"to{far}" if wires else "eth0"
                if wires:
                    _plug_in(host.namespace, interface, hub, _plug(near, far), _wire(one, other))
                route = (made[far].address, "dev", interface, "src", host.address)
                do("ip", "-n", host.namespace, "route", "add", *route)
        _plug_in("", outlet, hub, "outlet", "bridge")
        do("ip", "address", "add", f"{address}/24", "dev", outlet)
        yield LabNetwork(hub, made, address)


def do(*command: str) -> str:
    """Run a command; returns its output. Raises HostsError."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=COMMAND_S)
    except subprocess.CalledProcessError as error:
        raise HostsError(f"`{' '.join(command)}` failed: {error.stderr.strip()}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostsError(str(error)) from error
    return done.stdout


def free_range(taken: Sequence[str], first: int = 0) -> IPv4Network:
    """256 addresses to which none of the routes `taken` leads; the search starts at part `first`. Raises HostsError."""
    routes = [IPv4Network(route) for route in taken if route[:1].isdigit()]
    routes = [route for route in routes if route.prefixlen > DEFAULT_ROUTE_BITS]
    for wide in RANGES:
        parts = list(IPv4Network(wide).subnets(new_prefix=24))
        turn = first % len(parts)
        for part in parts[turn:] + parts[:turn]:
            if not any(part.overlaps(route) for route in routes):
                return part
    raise HostsError(f"routes lead to all of {' and '.join(RANGES)}: no addresses are left for hosts")


# -- setup


def _add_bridge(hub: str, name: str) -> None:
    do("ip", "-n", hub, "link", "add", name, "type", "bridge")
    do("ip", "-n", hub, "link", "set", name, "up")


def _plug_in(namespace: str, interface: str, hub: str, plug: str, bridge: str) -> None:
    """Add an interface to a namespace, "" for this machine's own, that leads to a bridge in the hub."""
    within = ("-n", namespace) if namespace else ()
    do("ip", *within, "link", "add", interface, "type", "veth", "peer", "name", plug, "netns", hub)
    do("ip", "-n", hub, "link", "set", plug, "master", bridge, "up")
    do("ip", *within, "link", "set", interface, "up")


def _wire(one: int, other: int) -> str:
    """The bridge between two hosts."""
    return f"wire{min(one, other)}-{max(one, other)}"


def _plug(host: int, other: int) -> str:
    """The hub's interface to a host, for its wire to `other`."""
    return f"plug{host}-{other}"


# -- removal


@contextmanager
def _removal(outlet: str, namespaces: Sequence[str]) -> Iterator[None]:
    """A separate process removes them: its input ends when this process does, however that happens."""
    command = [sys.executable, "-m", "dinfer.lab.hosts", outlet, *namespaces]
    null = subprocess.DEVNULL
    keeper = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=null, stderr=null, start_new_session=True
    )
    try:
        yield
    finally:
        with suppress(OSError, subprocess.TimeoutExpired):
            keeper.communicate(b"now", timeout=REMOVAL_S)


def main(arguments: list[str]) -> None:
    """`python -m dinfer.lab.hosts INTERFACE NAMESPACE…`: removes them once its input has ended.

    Waits ORPHANS_S seconds for the processes in these namespaces to end, unless the input says not to, and kills those
    that do not.
    """
    outlet, *namespaces = arguments
    patience_s = 0.0 if sys.stdin.buffer.read() else ORPHANS_S
    began = time.monotonic()
    while (found := _inside(namespaces)) and time.monotonic() - began < patience_s + KILLED_S:
        if time.monotonic() - began >= patience_s:
            for pid in found:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(LOOK_S)
    for command in (("link", "delete", outlet), *(("netns", "delete", name) for name in namespaces)):
        with suppress(HostsError):
            do("ip", *command)


def _inside(namespaces: Sequence[str]) -> list[int]:
    """The ids of processes in these namespaces."""
    found = list[int]()
    for name in namespaces:
        with suppress(HostsError):  # it does not exist
            found += map(int, do("ip", "netns", "pids", name).split())
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
