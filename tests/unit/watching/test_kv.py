"""KV of other people's code, by the digests of its rows."""

from dinfer.watch.probe.rows import RowsTaken
from dinfer.watching.kv import HeldRows, WatchedKv, layers_of


def rows(start: int, *digests: int, layer: int = 0, cache: int = 1, chunk: int | None = None) -> RowsTaken:
    taken = tuple((number, number + 1000) for number in digests)
    return RowsTaken("kv", cache, layer, chunk, start, (taken,), 0, 0, "float32", (1, 2, len(digests), 8))


def kv(taken: dict[int, list[RowsTaken]]) -> WatchedKv:
    return WatchedKv({rank: layers_of(rows) for rank, rows in taken.items()})


def test_ranks_that_hold_the_same_differ_in_nothing() -> None:
    held = [rows(0, 1, 2, 3), rows(3, 4), rows(0, 7, 8, layer=1)]
    found = kv({0: held, 1: held})
    assert found.diff() == []
    assert found.table().rows == [("0", "0", "4", "4"), ("1", "0", "2", "2")]


def test_rows_that_one_rank_adds_twice() -> None:
    once, twice = [rows(0, 1, 2, 3)], [rows(0, 1, 2, 3), rows(3, 1, 2, 3, chunk=0)]
    (repeated,) = kv({0: once, 1: twice}).diff()
    assert (repeated.kind, repeated.ranks, repeated.layer, repeated.chunk) == ("rows repeated", (1,), 0, 0)
    assert "rows 3–5" in repeated.text


def test_a_rank_that_lacks_rows() -> None:
    (missing,) = kv({0: [rows(0, 1, 2, 3)], 1: [rows(0, 1, 2, 3), rows(3, 4)]}).diff()
    assert (missing.kind, missing.ranks) == ("rows missing", (0, 1))


def test_a_row_that_differs_between_ranks() -> None:
    (one,) = kv({0: [rows(0, 1, 2, 3)], 1: [rows(0, 1, 9, 3)]}).diff()
    assert (one.kind, one.ranks, one.layer) == ("rows differ", (1, 0), 0)
    assert "1 of 3 rows" in one.text
    assert "token 1" in one.text


def test_ranks_that_split_heads_are_not_compared() -> None:
    assert kv({0: [rows(0, 1, 2, 3)], 1: [rows(0, 5, 6, 7)]}).diff() == []


def test_only_the_newest_cache_counts() -> None:
    """A second prompt begins anew."""
    found = kv({0: [rows(0, 1, 2, cache=1), rows(0, 1, 2, cache=2)]})
    assert found.diff() == []
    assert found.table().rows == [("0", "0", "2")]


def test_equal_tokens_that_are_written_to_their_place_again_are_no_repetition() -> None:
    assert kv({0: [rows(0, 1, 2), rows(0, 1, 2)]}).diff() == []


def test_rows_take_a_few_bytes_each_whatever_their_number() -> None:
    """A long decode adds a row at a time."""
    import tracemalloc

    tracemalloc.start()
    layers = layers_of(rows(at, at * 7919 + 2**60) for at in range(50_000))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(layers[0, 0].rows) == 50_000
    assert held < 50_000 * 20


def test_rows_are_kept_by_position() -> None:
    held, other = HeldRows(), HeldRows()
    held.put(5, [(1, 2), (3, 4)])
    held.put(2, [(9, 9)])
    held.put(6, [(7, 7)])
    assert (len(held), 2 in held, 3 in held, 6 in held) == (3, True, False, True)
    other.put(5, [(1, 2), (3, 4)])
    assert held.compared(other) == (2, [6])
    held.put(2**31 - 1, [(1, 1)])
    assert (len(held), held.dropped) == (3, 1)  # no row of a cache is there
