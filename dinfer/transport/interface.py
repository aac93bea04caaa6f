"""Which of this host's network interfaces leads to another host. Imports no torch and sends nothing."""

import socket
import sys
from contextlib import closing

import psutil

LOOPBACK = "127.0.0.1"


def own_address_towards(host: str) -> str:
    """This host's IPv4 address on the route to `host`. Raises OSError without a route."""
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
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
        print(f"dinfer: {error}", file=sys.stderr)
        return 2
    print(f"dinfer: talking over {name} ({_addresses()[name][0]})", file=sys.stderr)
    print(name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
