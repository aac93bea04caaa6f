"""The session's end of the line: who may speak on it, and what it makes of what is said."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from dinfer.cluster.link import Link

DEADLINE_S = 120
REFUSED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
REFUSED |= zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_DISCONNECTED
STATE = {
    "type": "state",
    "rank": 0,
    "phase": "prefill",
    "decoded": 0,
    "positions": [3],
    "started": [True],
    "limits": [5],
    "process": "R",
    "cpu_s": 0.5,
}


@pytest.fixture
def link() -> Iterator[Link]:
    """A link for one rank."""
    made = Link(1)
    yield made
    made.close()


@contextmanager
def caller(link: Link, **changes: Any) -> Iterator[zmq.Socket[bytes]]:
    """A DEALER that calls as rank 0's watcher does, but for `changes` to what it was given; None: without."""
    with to_call(link, **changes) as dealer:
        dealer.connect(link.endpoint)
        yield dealer


@contextmanager
def refused(link: Link, **changes: Any) -> Iterator[None]:
    """While somebody who has called so, and been refused, goes on trying."""
    with to_call(link, **changes) as stranger:
        # Before the call: one that speaks another language is refused once, and does not try again.
        monitor = stranger.get_monitor_socket(REFUSED)
        stranger.connect(link.endpoint)
        say(stranger, {**STATE, "phase": "decode"})
        assert monitor.poll(DEADLINE_S * 1000), "the stranger was not refused"
        assert recv_monitor_message(monitor)["event"] & REFUSED
        yield
        stranger.disable_monitor()
        monitor.close()


@contextmanager
def to_call(link: Link, **changes: Any) -> Iterator[zmq.Socket[bytes]]:
    part = {**link.job_part(0, launcher=1), **changes}
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.IDENTITY, b"rank 0")
        if part["server_key"] is not None:
            dealer.curve_serverkey = part["server_key"].encode()
            dealer.curve_publickey = part["public_key"].encode()
            dealer.curve_secretkey = part["secret_key"].encode()
        yield dealer


def say(dealer: zmq.Socket[bytes], message: dict[str, Any]) -> None:
    """What a watcher sends."""
    dealer.send_multipart([b"", json.dumps(message).encode()])


def heard(link: Link, condition: Callable[[], bool]) -> bool:
    """Whether the condition comes true in time."""
    with link.changed:
        return link.changed.wait_for(condition, DEADLINE_S)


def strangers() -> list[dict[str, Any]]:
    """What callers without this session's keys come with."""
    public, secret = (key.decode() for key in zmq.curve_keypair())
    return [
        {"server_key": None},
        {"public_key": public, "secret_key": secret},
        {"server_key": public},
    ]


STRANGERS = pytest.mark.parametrize("changes", strangers(), ids=["no keys", "other keys", "another server's"])


@STRANGERS
def test_who_has_not_the_keys_is_never_heard(link: Link, changes: dict[str, Any]) -> None:
    with refused(link, **changes):
        assert link.ranks[0].heard == 0
        with caller(link) as watcher:
            say(watcher, STATE)
            assert heard(link, lambda: link.ranks[0].heard > 0)
    assert link.ranks[0].phase == "prefill"


@STRANGERS
def test_who_has_not_the_keys_cannot_take_a_ranks_name(link: Link, changes: dict[str, Any]) -> None:
    """A rank that is started again takes over its own name; that is for who has the keys."""
    with caller(link) as watcher:
        say(watcher, STATE)
        assert heard(link, lambda: link.ranks[0].heard > 0)
        with refused(link, **changes):
            number = link.send(0, "freeze")
            assert next_command(watcher)["id"] == number
        with caller(link) as again:
            say(again, {**STATE, "phase": "decode"})
            assert heard(link, lambda: link.ranks[0].phase == "decode")
            number = link.send(0, "freeze")
            assert next_command(again)["id"] == number


def test_states_texts_and_reports_are_kept(link: Link) -> None:
    with caller(link) as watcher:
        say(watcher, STATE)
        say(watcher, {"type": "text", "rank": 0, "text": "中"})
        say(watcher, {"type": "text", "rank": 0, "text": "🙂"})
        say(watcher, {"type": "store", "rank": 0, "port": 7})
        say(watcher, {"type": "gone", "rank": 0})
        state = link.ranks[0]
        assert heard(link, lambda: state.gone)
    assert state.stand is not None
    assert (state.stand.positions, state.stand.started, state.stand.limits) == ((3,), (True,), (5,))
    assert (state.process, state.cpu_s) == ("R", 0.5)
    assert state.reports["store"]["port"] == 7
    assert link.new_texts() == ["中", "🙂"]
    assert link.new_texts() == []


def test_only_what_moves_counts_as_progress(link: Link) -> None:
    with caller(link) as watcher:
        say(watcher, STATE)
        assert heard(link, lambda: link.ranks[0].heard > 0)
        first, moved = link.ranks[0].heard, link.ranks[0].progressed
        say(watcher, {**STATE, "cpu_s": 0.7})
        assert heard(link, lambda: link.ranks[0].heard > first)
        assert link.ranks[0].progressed == moved
        say(watcher, {**STATE, "positions": [4]})
        assert heard(link, lambda: link.ranks[0].progressed > moved)


def test_a_command_is_answered(link: Link) -> None:
    with caller(link) as watcher:
        say(watcher, STATE)
        assert heard(link, lambda: link.ranks[0].heard > 0)
        number = link.send(0, "freeze")
        command = next_command(watcher)
        assert (command["do"], command["id"]) == ("freeze", number)
        say(watcher, {"type": "reply", "rank": 0, "id": number + 1, "limits": [2]})
        assert link.ask({0: {"do": "freeze"}}, DEADLINE_S)[0]["limits"] == [2]
        say(watcher, {"type": "reply", "rank": 0, "id": number + 2, "error": "it stands elsewhere"})
        with pytest.raises(RuntimeError, match="rank 0: it stands elsewhere"):
            link.ask({0: {"do": "rewind", "positions": [0]}}, DEADLINE_S)


def test_silence_is_told_in_time(link: Link) -> None:
    with pytest.raises(TimeoutError, match=r"no answer from rank 0 within 0\.1 s"):
        link.ask({0: {"do": "freeze"}}, timeout=0.1)


def test_who_waits_for_a_rank_that_died_learns_it(link: Link) -> None:
    def check() -> None:
        raise ChildProcessError("rank 0 was killed")

    with pytest.raises(ChildProcessError):
        link.ask({0: {"do": "freeze"}}, timeout=DEADLINE_S, check=check)


def next_command(watcher: zmq.Socket[bytes]) -> dict[str, Any]:
    """The next message that is not the session's heartbeat."""
    while watcher.poll(DEADLINE_S * 1000):
        command: dict[str, Any] = json.loads(watcher.recv())
        if command["do"] != "beat":
            return command
    raise AssertionError("no command came")
