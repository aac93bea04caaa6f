"""Waiting: the machines of one run wait here until all have come, and say who is missing. No torch.

`python -m dinfer.launch.wait NODES RANK ADDRESS PORT SECONDS`. Machine 0 listens at the port at which
torchrun will; the others connect and name themselves. Once all are there it lets them go and frees the port.
"""

import select
import socket
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack

from dinfer.errors import DinferError
from dinfer.severity import Severity

PATIENCE_S = 5.0
"""how long to wait in silence"""

RETRY_S = 0.2

HELLO, GO = "dinfer machine", b"go\n"

SayLine = Callable[[str], None]


class NotAllCame(DinferError, RuntimeError):
    """Who is missing, or what is in the way."""


def gather(nodes: int, address: str, port: int, timeout: float, say: SayLine) -> None:
    """On machine 0: wait for all others. Raises NotAllCame."""
    if nodes == 1:
        return
    deadline, spoken = time.monotonic() + timeout, time.monotonic()
    with ExitStack() as stack:
        door = stack.enter_context(_open(address, port))
        guests: dict[int, socket.socket] = {}
        while missing := [rank for rank in range(1, nodes) if rank not in guests]:
            now = time.monotonic()
            if now > deadline:
                raise NotAllCame(f"machine {_listed(missing)} did not come within {timeout:g} s.")
            if now - spoken > PATIENCE_S:
                spoken = now
                say(f"waiting for machine {_listed(missing)} at {address}:{port}")
            guests = {rank: guest for rank, guest in guests.items() if not _has_left(guest)}
            door.settimeout(RETRY_S)
            try:
                guest = stack.enter_context(door.accept()[0])
                rank = _named(guest, nodes)
            except (TimeoutError, OSError):
                continue
            if rank is not None:
                guests[rank] = guest
        for guest in guests.values():
            guest.sendall(GO)
        for guest in guests.values():  # they hang up first, so that the port is free again
            guest.settimeout(PATIENCE_S)
            _has_ended(guest)
    say(f"all {nodes} machines are here")


def come(rank: int, address: str, port: int, timeout: float, say: SayLine) -> None:
    """On another machine: go to machine 0 and wait until all are there. Raises NotAllCame."""
    deadline, spoken = time.monotonic() + timeout, time.monotonic()
    trouble = ""
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((address, port), timeout=PATIENCE_S) as door:
                door.sendall(f"{HELLO} {rank}\n".encode())
                door.settimeout(max(RETRY_S, deadline - time.monotonic()))
                say("machine 0 is there; waiting for the others")
                if door.recv(16) == GO:
                    return
                trouble = "it hung up"
        except OSError as error:
            trouble = error.strerror or str(error)
        if time.monotonic() - spoken > PATIENCE_S:
            spoken = time.monotonic()
            say(f"waiting for machine 0 at {address}:{port} ({trouble})")
        time.sleep(RETRY_S)
    raise NotAllCame(
        f"machine 0 at {address}:{port} did not let this one in within {timeout:g} s ({trouble})."
    )


def _open(address: str, port: int) -> socket.socket:
    try:
        return socket.create_server((address, port))
    except OSError as error:
        raise NotAllCame(
            f"{address}:{port} cannot be opened ({error.strerror}): --master-addr must be an address of machine 0, "
            "and --master-port a free port there."
        ) from None


def _named(guest: socket.socket, nodes: int) -> int | None:
    """The rank that a guest says; None for somebody else, who is sent away."""
    guest.settimeout(PATIENCE_S)
    words = guest.recv(64).decode("ascii", "replace").rpartition(" ")
    if words[0] == HELLO and words[2].strip().isdigit() and 0 < int(words[2]) < nodes:
        return int(words[2])
    guest.close()
    return None


def _has_left(guest: socket.socket) -> bool:
    return bool(select.select([guest], [], [], 0)[0]) and _has_ended(guest)


def _has_ended(guest: socket.socket) -> bool:
    try:
        return guest.recv(1) == b""
    except OSError:
        return True


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))


def main(arguments: list[str]) -> int:
    nodes, rank, address = int(arguments[0]), int(arguments[1]), arguments[2]
    port, seconds = int(arguments[3]), float(arguments[4])

    def say(text: str) -> None:
        print(f"dinfer: machine {rank}: {text}", file=sys.stderr, flush=True)

    try:
        if rank == 0:
            gather(nodes, address, port, seconds, say)
        else:
            come(rank, address, port, seconds, say)
    except NotAllCame as error:
        say(Severity.ERROR.marked(str(error)))
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
