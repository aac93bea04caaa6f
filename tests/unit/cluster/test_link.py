"""The session's end of the line: who may speak on it, and what it makes of what is said."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pytest
import zmq
from msgspec import to_builtins
from msgspec.msgpack import encode as packb
from msgspec.structs import replace
from zmq.utils.monitor import recv_monitor_message

from dinfer.cluster.link import Link
from dinfer.cluster.ranks import RankRefused
from dinfer.messages import (
    Beat,
    Command,
    Freeze,
    GetStand,
    Gone,
    RankReport,
    Refused,
    Reply,
    Rewind,
    Stand,
    Status,
    StoreOpened,
    TextPiece,
    pack_report,
    unpack_command,
    unpack_request,
)

DEADLINE_S = 120
REFUSED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
REFUSED |= zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_DISCONNECTED
STATUS = Status("prefill", 0, Stand((3,), (True,), (5,)), process="R", cpu_s=0.5)


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
        say(stranger, replace(STATUS, phase="decode"))
        assert monitor.poll(DEADLINE_S * 1000), "the stranger was not refused"
        assert recv_monitor_message(monitor)["event"] & REFUSED
        yield
        stranger.disable_monitor()
        monitor.close()


@contextmanager
def to_call(link: Link, **changes: Any) -> Iterator[zmq.Socket[bytes]]:
    part = {**to_builtins(link.job_part(0, launcher=1)), **changes}
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.IDENTITY, b"rank 0")
        if part["server_key"] is not None:
            dealer.curve_serverkey = part["server_key"].encode()
            dealer.curve_publickey = part["public_key"].encode()
            dealer.curve_secretkey = part["secret_key"].encode()
        yield dealer


def say(dealer: zmq.Socket[bytes], report: RankReport) -> None:
    """What a watcher sends."""
    dealer.send_multipart(pack_report(report))


def heard(link: Link, condition: Callable[[], bool]) -> bool:
    """Whether the condition comes true in time."""
    with link.changed:
        return link.changed.wait_for(condition, DEADLINE_S)


def strangers() -> list[dict[str, Any]]:
    """What callers without this session's keys come with."""
    public, secret = (key.decode() for key in zmq.curve_keypair())
    return [{"server_key": None}, {"public_key": public, "secret_key": secret}, {"server_key": public}]


STRANGERS = pytest.mark.parametrize("changes", strangers(), ids=["no keys", "other keys", "another server's"])


@STRANGERS
def test_who_has_not_the_keys_is_never_heard(link: Link, changes: dict[str, Any]) -> None:
    with refused(link, **changes):
        assert link.ranks[0].heard == 0
        with caller(link) as watcher:
            say(watcher, STATUS)
            assert heard(link, lambda: link.ranks[0].heard > 0)
    assert link.ranks[0].phase == "prefill"


@STRANGERS
def test_who_has_not_the_keys_cannot_take_a_ranks_name(link: Link, changes: dict[str, Any]) -> None:
    """A rank that is started again takes over its own name; that is for who has the keys."""
    with caller(link) as watcher:
        say(watcher, STATUS)
        assert heard(link, lambda: link.ranks[0].heard > 0)
        with refused(link, **changes):
            number = link.begin({0: Freeze()})[0]
            assert next_command(watcher) == (number, Freeze())
        with caller(link) as again:
            say(again, replace(STATUS, phase="decode"))
            assert heard(link, lambda: link.ranks[0].phase == "decode")
            number = link.begin({0: Freeze()})[0]
            assert next_command(again) == (number, Freeze())


def test_states_texts_and_reports_are_kept(link: Link) -> None:
    with caller(link) as watcher:
        say(watcher, STATUS)
        say(watcher, TextPiece("中"))
        say(watcher, TextPiece("🙂"))
        say(watcher, StoreOpened(7))
        say(watcher, Gone())
        state = link.ranks[0]
        assert heard(link, lambda: state.gone)
    assert state.stand is not None
    assert (state.stand.positions, state.stand.started, state.stand.limits) == ((3,), (True,), (5,))
    assert (state.process, state.cpu_s) == ("R", 0.5)
    assert state.store == StoreOpened(7)
    assert [piece.text for piece in link.new_texts()] == ["中", "🙂"]
    assert link.new_texts() == []


def test_only_what_moves_counts_as_progress(link: Link) -> None:
    with caller(link) as watcher:
        say(watcher, STATUS)
        assert heard(link, lambda: link.ranks[0].heard > 0)
        first, moved = link.ranks[0].heard, link.ranks[0].progressed
        say(watcher, replace(STATUS, cpu_s=0.7))
        assert heard(link, lambda: link.ranks[0].heard > first)
        assert link.ranks[0].progressed == moved
        say(watcher, replace(STATUS, stand=Stand((4,), (True,), (5,))))
        assert heard(link, lambda: link.ranks[0].progressed > moved)


def test_a_command_is_answered(link: Link) -> None:
    with caller(link) as watcher:
        say(watcher, STATUS)
        assert heard(link, lambda: link.ranks[0].heard > 0)
        number = link.begin({0: Freeze()})[0]
        assert next_command(watcher) == (number, Freeze())
        asked = link.begin({0: Freeze()}), link.begin({0: Rewind(((0,),))})
        say(watcher, Reply(number + 1, Stand((0,), (False,), (2,))))
        say(watcher, Refused(number + 2, "it stands elsewhere"))
        assert link.finish(asked[0], DEADLINE_S)[0].limits == (2,)
        with pytest.raises(RuntimeError, match="rank 0: it stands elsewhere"):
            link.finish(asked[1], DEADLINE_S)


def test_silence_is_told_in_time(link: Link) -> None:
    with pytest.raises(TimeoutError, match=r"no answer from rank 0 within 0\.1 s"):
        link.ask({0: Freeze()}, timeout=0.1)


def test_who_waits_for_a_rank_that_died_learns_it(link: Link) -> None:
    def check() -> None:
        raise ChildProcessError("rank 0 was killed")

    with pytest.raises(ChildProcessError):
        link.ask({0: Freeze()}, timeout=DEADLINE_S, check=check)


def test_a_report_of_another_version_is_told(link: Link) -> None:
    with caller(link) as watcher:
        watcher.send_multipart([packb({"type": "Dance"})])
        assert heard(link, lambda: link.ranks[0].error is not None)
    assert link.ranks[0].error
    assert "Dance" in link.ranks[0].error.message


def next_command(watcher: zmq.Socket[bytes]) -> tuple[int, Command[Any]]:
    """The next message that is not the session's heartbeat."""
    while watcher.poll(DEADLINE_S * 1000):
        request = unpack_request(watcher.recv())
        command = unpack_command(request.command)
        if not isinstance(command, Beat):
            return request.number, command
    raise AssertionError("no command came")


def test_a_link_that_is_closed_refuses_in_words_and_may_be_closed_again() -> None:
    link = Link(1)
    link.close()
    link.close()
    with pytest.raises(RankRefused, match="the session has left its ranks: it is closed"):
        link.send(0, GetStand())


def test_an_address_that_cannot_be_bound_leaves_nothing_open() -> None:
    before = threading.active_count(), psutil.Process().num_fds()
    with pytest.raises(zmq.ZMQError):
        Link(1, "203.0.113.1")  # of no machine (RFC 5737)
    assert (threading.active_count(), psutil.Process().num_fds()) == before
