"""Which of this host's network interfaces leads to another host. Imports no torch and sends nothing."""

import os
import socket
import sys
import threading
from contextlib import closing

import psutil

from dinfer.config import ConfigError
from dinfer.severity import Severity

LOOPBACK = "127.0.0.1"

RESOLVE_S = 5.0
"""how long a name may take to be resolved, and a connection of this host to itself"""


def resolved(address: str) -> str:
    """The numeric address of a host, IPv4 where it has one. Raises ConfigError within RESOLVE_S seconds."""
    found: list[tuple[int, str]] = []
    errors = [f"no answer within {RESOLVE_S:g} s"]

    def look_up() -> None:
        try:
            all_ = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)
            found.extend(sorted((family != socket.AF_INET, str(where[0])) for family, *_, where in all_))
        except OSError as error:
            errors[0] = error.strerror or str(error)

    thread = threading.Thread(target=look_up, name="dinfer look-up", daemon=True)
    thread.start()
    thread.join(RESOLVE_S)
    if not found:
        raise ConfigError(
            f"master_addr {address!r} cannot be resolved ({errors[0]}): give the address of rank 0's host as numbers, "
            "or a name that all hosts know."
        )
    return found[0][1]


def check_own_address(address: str) -> None:
    """Raises ConfigError, within a few seconds, unless ranks on this host can meet at that address of it."""
    where = resolved(address)
    family = socket.AF_INET6 if ":" in where else socket.AF_INET
    try:
        with socket.create_server((where, 0), family=family) as door:
            socket.create_connection(door.getsockname()[:2], RESOLVE_S).close()
    except OSError as error:
        loopback = ", and its loopback interface must be up" if where == LOOPBACK else ""
        why = os.strerror(error.errno) if error.errno else error  # a timeout has no number
        own = ", ".join(one for addresses in _addresses().values() for one in addresses)
        raise ConfigError(
            f"ranks cannot meet at {address!r} ({where}): {why}. master_addr must be an "
            f"address of this machine{loopback}; it has {own or 'none'}."
        ) from None


def check_route(address: str) -> None:
    """Raises ConfigError, within a few seconds, where no route leads from this host to rank 0's."""
    where = resolved(address)
    try:
        own_address_towards(where)
    except OSError as error:
        raise ConfigError(
            f"there is no route to rank 0's host {address!r} ({where}): {error.strerror or error}. Check master_addr."
        ) from None


def own_address_towards(host: str) -> str:
    """This host's address on the route to `host`. Raises OSError without a route."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with closing(socket.socket(family, socket.SOCK_DGRAM)) as probe:
        probe.connect((host, 9))  # on a datagram socket this looks up the route and sends nothing
        return str(probe.getsockname()[0])


def interface_towards(host: str) -> str:
    """The name of the interface that leads to `host`, "" if unknown. Raises OSError without a route."""
    own = own_address_towards(host)
    return next((name for name, addresses in _addresses().items() if own in addresses), "")


def _addresses() -> dict[str, list[str]]:
    """The IPv4 addresses of each interface of this host."""
    found = psutil.net_if_addrs()
    return {
        name: [one.address for one in all_ if one.family == socket.AF_INET] for name, all_ in found.items()
    }


class NoInterface(RuntimeError):
    """No usable interface leads to the other hosts; the message says what to do."""


def interface_for_peers(address: str, wished: str = "") -> str:
    """The interface for meeting other hosts at `address`: `wished`, or the one on the route. Raises NoInterface.

    It is never loopback, which gloo would accept silently and no other host could reach.
    """
    try:
        own = own_address_towards(address)
    except OSError as error:
        raise NoInterface(
            f"there is no route to {address} ({error.strerror or error}): check --master-addr."
        ) from None
    name, addresses = wished or interface_towards(address), _addresses()
    known = ", ".join(f"{one} {' '.join(its) or '-'}" for one, its in addresses.items())
    if wished and not addresses.get(wished):
        raise NoInterface(f"{wished} is not an interface with an IPv4 address on this host; it has: {known}.")
    if any(used.startswith("127.") for used in (own, *addresses.get(name, ())[:1])):
        raise NoInterface(
            f"{address} leads to this host's loopback, which no other host can reach: give the address of rank 0's "
            f"host in the network that all hosts share. Interfaces here: {known}."
        )
    if not name:
        raise NoInterface(
            f"no interface of this host has the address {own}: name one with --interface ({known})."
        )
    return name


def main(arguments: list[str]) -> int:
    """`python -m dinfer.transport.interface ADDRESS [INTERFACE]`: print the interface for gloo."""
    try:
        name = interface_for_peers(*arguments)
    except NoInterface as error:
        print(f"dinfer: {Severity.ERROR.marked(str(error))}", file=sys.stderr)
        return 2
    print(f"dinfer: talking over {name} ({_addresses()[name][0]})", file=sys.stderr)
    print(name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
