"""The interface and the address that gloo uses on this host, and whether ports can be opened there."""

import os
import socket
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

import psutil

from dinfer.doctor.report import LET_LOOPBACK_PASS, Check
from dinfer.transport.interface import LOOPBACK, own_address_towards

RESOLVE_S, CONNECT_S = 5.0, 3.0

FEW_PORTS = 100


class Network(NamedTuple):
    """This host's interfaces, names and addresses."""

    interfaces: Mapping[str, str]  # name → first IPv4 address, "" for none
    ifname: str  # GLOO_SOCKET_IFNAME, "" if unset
    host: str
    resolved: Sequence[str]  # what the host's name resolves to
    own: str  # the address from which this host reaches others, "" for none


def network_checks() -> list[Check]:
    seen = look()
    ports = port_check(try_ports(seen.own), seen.own)
    return [interface_check(seen), host_name_check(seen), ports]


def look() -> Network:
    """Sends nothing but the question to the name server, whose answer it awaits for up to RESOLVE_S seconds."""
    host = socket.gethostname()
    interfaces = {
        name: next((one.address for one in addresses if one.family == socket.AF_INET), "")
        for name, addresses in psutil.net_if_addrs().items()
    }
    return Network(interfaces, os.environ.get("GLOO_SOCKET_IFNAME", ""), host, _resolve(host), _own_address())


def _resolve(host: str) -> list[str]:
    """The host's IPv4 addresses; none if no name server answers within RESOLVE_S seconds."""
    found: list[str] = []

    def ask() -> None:
        with suppress(OSError):
            answers = socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)
            found.extend(str(answer[4][0]) for answer in answers)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(RESOLVE_S)
    return list(found)


def _own_address() -> str:
    """The address of the default route."""
    try:
        address = own_address_towards("198.51.100.1")  # reserved for documentation
    except OSError:
        return ""
    return "" if ip_address(address).is_loopback or address == "0.0.0.0" else address


def interface_check(network: Network) -> Check:
    """The interface over which ranks of this host meet."""
    known = network.interfaces
    name = network.ifname.split(",")[0]  # of a list of devices, dinfer uses the first
    if not name:
        loopback = next((n for n in ("lo", "lo0") if n in known), "the loopback")
        return Check("interface", "ok", f"{loopback}, {LOOPBACK}: ranks of one host meet there")
    if name not in known:
        found = f"GLOO_SOCKET_IFNAME is {name}, but this host has only {', '.join(known)}"
        return Check("interface", "fail", found, "unset GLOO_SOCKET_IFNAME")
    if not known[name]:
        found = f"{name}, by GLOO_SOCKET_IFNAME, has no IPv4 address"
        return Check("interface", "warn", found, "unset GLOO_SOCKET_IFNAME")
    return Check("interface", "ok", f"{name}, {known[name]}: set by GLOO_SOCKET_IFNAME")


def host_name_check(network: Network) -> Check:
    """The address at which ranks of other hosts find this one: gloo resolves the host's name."""
    host, own = network.host, network.own
    if network.ifname:
        return Check("host name", "ok", f"{host}; gloo uses GLOO_SOCKET_IFNAME instead")
    if not own:
        return Check("host name", "ok", f"{host}; this host has no network but the loopback")
    interface = next((name for name, address in network.interfaces.items() if address == own), "")
    if own in network.resolved:
        return Check("host name", "ok", f"{host} is {own}{f' on {interface}' if interface else ''}")
    resolved = f"resolves to {network.resolved[0]}" if network.resolved else "does not resolve"
    found = f"{host} {resolved}: enough for ranks of this host, but ranks of other hosts need {own}"
    export = f"export GLOO_SOCKET_IFNAME={interface or f'(the interface of {own})'}"
    return Check("host name", "warn", found, f"for runs over several hosts: {export}")


# -- ports


class Ports(NamedTuple):
    """Whether ports can be opened. `loopback`, `own`: the error at that address, "" for none."""

    loopback: str
    own: str
    span: range | None  # the system's range of free ports; None if unknown
    used: frozenset[int] = frozenset()


def try_ports(own: str, proc: Path = Path("/proc")) -> Ports:
    """Open a port on the loopback and on the host's own address, and connect to each."""
    span, used = None, set[int]()
    with suppress(OSError, ValueError):
        low, high = (proc / "sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()
        span = range(int(low), int(high) + 1)
    with suppress(psutil.Error, OSError):  # this user may not see them (macOS), or the system has no tables
        used = {socket.laddr.port for socket in psutil.net_connections("tcp") if socket.laddr}
    return Ports(
        _connect(LOOPBACK), _connect(own) if own else "", span, frozenset(used.intersection(span or ()))
    )


def _connect(address: str) -> str:
    """Open a port at that address and connect to it; the error, "" for none."""
    try:
        with socket.create_server((address, 0)) as server:
            server.settimeout(CONNECT_S)
            with socket.create_connection(server.getsockname(), timeout=CONNECT_S), server.accept()[0]:
                return ""
    except OSError as error:
        return str(error)


def port_check(ports: Ports, own: str) -> Check:
    """Runs use free ports by default (`master_port` 0), so there must be enough of them."""
    if ports.loopback:
        found = f"none can be used on {LOOPBACK}: {ports.loopback}"
        return Check("ports", "fail", found, LET_LOOPBACK_PASS)
    count = ""
    if ports.span:
        free = len(ports.span) - len(ports.used)
        count = f"; {free:,} of {len(ports.span):,} are free"
        if free < FEW_PORTS:
            return Check("ports", "warn", f"few are left{count}", "end what holds them: ss -tanp names it")
    if ports.own:
        fix = f"for runs over several hosts: let the firewall pass connections to {own}"
        return Check("ports", "warn", f"can be opened on {LOOPBACK}{count}; but on {own}: {ports.own}", fix)
    where = f"{LOOPBACK} and {own}" if own else LOOPBACK
    return Check("ports", "ok", f"can be opened on {where}{count}")
