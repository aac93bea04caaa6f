"""Which of this host's network interfaces leads to another host. Imports no torch and sends nothing."""

import socket
import struct
import sys
from contextlib import closing

LOOPBACK = "127.0.0.1"

_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface


def own_address_towards(host: str) -> str:
    """This host's IPv4 address on the route to `host`. Raises OSError without a route."""
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        probe.connect((host, 9))  # on a datagram socket this looks up the route and sends nothing
        return str(probe.getsockname()[0])


def address_of(interface: str) -> str:
    """An interface's IPv4 address, "" if it has none or the system does not tell."""
    try:
        import fcntl

        with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
            packed = struct.pack("256s", interface[:15].encode())
            return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, packed)[20:24])
    except (ImportError, OSError):
        return ""


def interface_towards(host: str) -> str:
    """The name of the interface that leads to `host`, "" if unknown. Raises OSError without a route."""
    own = own_address_towards(host)
    return next((name for _, name in socket.if_nameindex() if address_of(name) == own), "")


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
    name = wished or interface_towards(address)
    known = ", ".join(f"{name} {address_of(name) or '-'}" for _, name in socket.if_nameindex())
    if wished and not address_of(wished):
        raise NoInterface(f"{wished} is not an interface with an IPv4 address on this host; it has: {known}.")
    used = address_of(name) if name else own
    if used.startswith("127.") or own.startswith("127."):
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
    print(f"dinfer: talking over {name} ({address_of(name)})", file=sys.stderr)
    print(name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
