"""Since when each lane has not moved, and whether CPU time moves."""

from __future__ import annotations

from dinfer.cluster.ranks import RankState
from dinfer.engine.board import Stand
from dinfer.monitor.signs import Track


def at(positions: tuple[int, ...], started: tuple[bool, ...], now: float, limit: int = 9) -> RankState:
    """A rank that was heard of at that moment."""
    return RankState(stand=Stand(positions, started, (limit,) * len(positions)), progressed=now)


def test_each_lane_has_its_own_time() -> None:
    track = Track(1)
    track.look([at((0, 0), (True, False), 10.0)], 10.0)
    track.look([at((0, 1), (True, False), 12.0)], 12.1)
    assert track.still_s(0, 15.0) == (5.0, 3.0)
    track.look([at((0, 1), (True, True), 13.0)], 13.0)
    assert track.still_s(0, 15.0) == (5.0, 2.0)
    assert track.longest_s(15.0) == 5.0


def test_news_that_say_the_same_change_nothing() -> None:
    track = Track(1)
    for now in (1.0, 2.0, 3.0):
        track.look([at((4,), (True,), 1.0)], now)
    assert track.still_s(0, 3.0) == (2.0,)


def test_a_lane_that_is_let_go_begins_anew() -> None:
    """It has stood for an hour where it was told to: that is no hour in which it was stuck."""
    track = Track(1)
    track.look([at((4,), (False,), 1.0, limit=4)], 1.0)
    assert track.longest_s(3600.0) == 0.0
    track.look([at((4,), (False,), 3600.0, limit=9)], 3600.0)
    assert track.still_s(0, 3601.0) == (1.0,)


def test_another_run_has_other_lanes() -> None:
    track = Track(1)
    track.look([at((4, 5, 6), (True,) * 3, 1.0)], 1.0)
    track.look([at((0,), (True,), 5.0)], 5.0)
    assert track.still_s(0, 6.0) == (1.0,)
    assert Track(2).still_s(1, 6.0) == ()


def cpu(track: Track, samples: dict[float, float]) -> bool | None:
    for now, seconds in samples.items():
        track.look([RankState(cpu_s=seconds)], now)
    return track.cpu_moves(0)


def test_cpu_time_takes_a_second_to_tell() -> None:
    assert cpu(Track(1), {}) is None
    assert cpu(Track(1), {0.0: 1.0, 0.5: 1.0}) is None
    assert cpu(Track(1), {0.0: 1.0, 0.5: 1.0, 1.0: 1.0}) is False
    assert cpu(Track(1), {0.0: 1.0, 0.5: 1.4, 1.0: 1.9}) is True
    assert cpu(Track(1), {0.0: 1.0, 1.0: 1.02}) is False  # what an idle engine uses


def test_a_thread_that_gets_most_of_what_its_process_gets_computes() -> None:
    """On a busy machine that is little."""
    for used, moves in ((0.08, True), (0.01, False)):
        track = Track(1)
        track.add_cpu(0, 0.0, 1.0, 7.0)
        track.add_cpu(0, 2.0, 1.0 + used, 7.1)
        assert track.cpu_moves(0) is moves


def test_who_wants_the_cpu_and_gets_none_is_not_still() -> None:
    track = Track(1)
    for now in (0.0, 1.0, 2.0):
        track.look([RankState(cpu_s=1.0, wants_cpu=0.625)], now)
    assert track.cpu_moves(0) is True
    track.look([RankState(cpu_s=1.0, wants_cpu=0.5)], 2.5)
    assert track.cpu_moves(0) is False


def test_what_was_long_ago_does_not_count() -> None:
    assert cpu(Track(1), {n / 2: min(n / 2, 2.0) for n in range(20)}) is False


def test_threads_that_wait_for_the_gil_look_runnable_but_do_not_compute() -> None:
    """Of a rank whose Python does not answer: only CPU time tells, and of that less than usual is enough."""
    for used, moves in ((0.02, False), (0.1, True)):
        track = Track(1)
        for now, share in ((0.0, 0.0), (1.0, 0.5), (2.0, 1.0)):
            track.look([RankState(cpu_s=1.0 + share * used, wants_cpu=0.625)], now)
        assert track.cpu_moves(0, mute=True) is moves
        assert track.cpu_moves(0) is True


def test_on_a_slow_machine_they_use_much_together_and_then_the_busiest_thread_tells() -> None:
    for busiest, moves in ((0.02, False), (0.05, True)):
        track = Track(1)
        for now in (0.0, 1.0, 2.0):
            state = RankState(cpu_s=1.0 + 0.5 * now, wants_cpu=0.625, thread_cpu=busiest)
            track.look([state], now)
        assert track.cpu_moves(0, mute=True) is moves
        assert track.cpu_moves(0) is True
