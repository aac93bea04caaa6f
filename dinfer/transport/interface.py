"""Which of this host's network interfaces leads to another host. No torch, sends nothing."""

import socket
import struct
import sys
from contextlib import closing

LOOPBACK = "127.0.0.1"

_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface


def own_address_towards(host: str) -> str:
    """The IPv4 address from which this host would talk to `host`. Raises OSError where there is no way."""
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        probe.connect((host, 9))  # of a datagram socket: looks the route up, sends nothing
        return str(probe.getsockname()[0])


def address_of(interface: str) -> str:
    """An interface's IPv4 address, "" where there is none or the system does not say."""
    try:
        import fcntl

        with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
            packed = struct.pack("256s", interface[:15].encode())
            return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, packed)[20:24])
    except (ImportError, OSError):
        return ""


def interface_towards(host: str) -> str:
    """The name of the interface that leads to `host`, "" where there is no telling. Raises OSError without a way."""
    own = own_address_towards(host)
    return next((name for _, name in socket.if_nameindex() if address_of(name) == own), "")


class NoInterface(RuntimeError):
    """Other hosts cannot be reached as asked; the message says what to do."""


def interface_for_peers(address: str, wished: str = "") -> str:
    """The interface over which this host and others meet at `address`; `wished` where given. Raises NoInterface.

    Never loopback: gloo would take it without a word, and no other host could reach this one.
    """
    try:
        own = own_address_towards(address)
    except OSError as error:
        raise NoInterface(
            f"there is no way to {address} from here ({error.strerror or error}): check --master-addr."
        ) from None
    name = wished or interface_towards(address)
    known = ", ".join(f"{name} {address_of(name) or '-'}" for _, name in socket.if_nameindex())
    if wished and not address_of(wished):
        raise NoInterface(f"there is no interface {wished} with an IPv4 address here; there are: {known}.")
    used = address_of(name) if name else own
    if used.startswith("127.") or own.startswith("127."):
        raise NoInterface(
            f"{address} leads to this machine's loopback, which no other machine can reach: give the address "
            f"of rank 0's machine in the network that all share. Here there are: {known}."
        )
    if not name:
        raise NoInterface(f"no interface here has the address {own}: name one with --interface ({known}).")
    return name


def main(arguments: list[str]) -> int:
    """`python -m dinfer.transport.interface ADDRESS [INTERFACE]` prints the interface that gloo is to use."""
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
