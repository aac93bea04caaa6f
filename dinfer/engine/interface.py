"""Which of this host's network interfaces leads to another host. No torch, sends nothing."""

import socket
import struct
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
