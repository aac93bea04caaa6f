"""KV of other people's code, by the digests of its rows."""

import pytest

from dinfer.watch.probe.rows import RowsTaken
from dinfer.watching.held_rows import HeldRows, layers_of
from dinfer.watching.kv import WatchedKv


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
    assert repeated.text == "rank 1 holds 6 rows of layer 0, rank 0 3: rows 3–5 repeat rows 0–2"


def added_at(line: int, one: RowsTaken) -> RowsTaken:
    return one._replace(file="/home/me/infer.py", line=line, function="stage")


def test_a_finding_names_the_line_that_added_the_rows() -> None:
    """That of the rows it is about, whoever added those before, which came one by one, too."""
    once = [added_at(3, rows(at, at + 1)) for at in range(4)]
    twice = [*once[:3], added_at(9, rows(3, 3)), added_at(3, rows(4, 4))]
    found = kv({0: once, 1: once, 2: twice}).diff()
    assert [(one.kind, one.line) for one in found] == [("rows repeated", "infer.py:9")]
    assert found[0].text.endswith(" (added at infer.py:9 in stage)")
    assert found[0].as_dict()["line"] == "infer.py:9"
    wrong = [*once[:2], added_at(5, rows(2, 77)), once[3]]
    (differs,) = kv({0: once, 1: once, 2: wrong}).diff()
    assert (differs.kind, differs.line) == ("rows differ", "infer.py:5")
    (alone,) = kv({2: [added_at(3, rows(0, 1, 2)), added_at(5, rows(2, 1, 2))]}).diff()
    assert (alone.kind, alone.line) == ("rows repeated", "infer.py:5")


def test_lines_that_differ_do_not_part_what_was_fed_alike_nor_a_finding_of_several_layers() -> None:
    once = [rows(at, at + 1, layer=layer) for layer in (0, 1) for at in range(3)]
    lines = [added_at(number, one) for number, one in enumerate(once, 1)]
    assert kv({0: once, 1: lines}).layers[1][0, 0].pieces(3) == kv({0: once}).layers[0][0, 0].pieces(3)
    again = [*lines, *(added_at(7 + layer, rows(3, 3, layer=layer)) for layer in (0, 1))]
    (found,) = kv({0: once, 1: again}).diff()
    assert "layers 0, 1" in found.text or "layers 0–1" in found.text
    assert found.line == "infer.py:7"


def test_a_rank_that_lacks_rows() -> None:
    (missing,) = kv({0: [rows(0, 1, 2, 3)], 1: [rows(0, 1, 2, 3), rows(3, 4)]}).diff()
    assert (missing.kind, missing.ranks) == ("rows missing", (0, 1))


def test_a_row_that_differs_between_ranks() -> None:
    (one,) = kv({0: [rows(0, 1, 2, 3)], 1: [rows(0, 1, 9, 3)]}).diff()
    assert (one.kind, one.ranks, one.layer) == ("rows differ", (1, 0), 0)
    assert "1 of 3 rows" in one.text
    assert "token 1" in one.text


def test_a_finding_names_the_sequences_where_there_are_several() -> None:
    """Each finding is of all its layers in all its sequences; of what differs in others there is another."""
    right, wrong = ((1, 1001), (2, 1002), (3, 1003)), ((1, 1001), (9, 1009), (3, 1003))

    def batch(*sequences: tuple[tuple[int, int], ...], layer: int) -> RowsTaken:
        return rows(0, 1, 2, 3, layer=layer)._replace(digests=sequences, shape=(3, 2, 3, 8))

    good = [batch(right, right, right, layer=layer) for layer in range(3)]
    bad = [good[0], batch(right, wrong, wrong, layer=1), batch(right, right, wrong, layer=2)]
    first, second = kv({0: good, 1: bad}).diff()
    assert "in 1 of 3 rows of layer 1 of sequence 1, the first at token 1" in first.text
    assert "in 1 of 3 rows of layers 1–2 of sequence 2, the first at token 1" in second.text
    (both,) = kv({0: good, 1: [*good[:2], batch(right, wrong, wrong, layer=2)]}).diff()
    assert "rows of layer 2 of sequences 1–2, the first" in both.text


def test_a_row_that_differs_behind_a_prefix_that_one_rank_shares() -> None:
    whole, shared = rows(0, 1, 2, 3, 4, 5), rows(2, 3, 9, 5)._replace(is_paged=True)
    whole = whole._replace(is_paged=True)
    (one,) = kv({0: [whole], 1: [shared]}).diff()
    assert (one.kind, one.ranks) == ("rows differ", (1, 0))
    assert "1 of 3 rows of layer 0, the first at token 3" in one.text


def test_ranks_that_split_heads_are_not_compared() -> None:
    assert kv({0: [rows(0, 1, 2, 3)], 1: [rows(0, 5, 6, 7)]}).diff() == []


def test_only_the_newest_cache_counts() -> None:
    """A second prompt begins anew."""
    found = kv({0: [rows(0, 1, 2, cache=1), rows(0, 1, 2, cache=2)]})
    assert found.diff() == []
    assert found.table().rows == [("0", "0", "2")]


def test_a_tapped_store_counts_beside_the_newest_cache() -> None:
    """Rows that are tapped are of no cache that has a number."""
    tapped, cached = rows(0, 1, 2, 3, layer=0, cache=0), rows(0, 7, 8, layer=5)
    for order in (
        [tapped, cached],
        [cached, tapped],
        [rows(0, 9, layer=6), tapped, cached._replace(cache=2)],
    ):
        assert kv({0: order}).table().rows == [("0", "0", "3"), ("5", "0", "2")]


def test_of_a_layer_that_is_tapped_and_in_a_cache_the_last_used_counts() -> None:
    tapped, cached = rows(0, 1, 2, 3, cache=0), rows(0, 7, 8)
    assert kv({0: [tapped, cached]}).table().rows == [("0", "0", "2")]
    assert kv({0: [cached, tapped]}).table().rows == [("0", "0", "3")]


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
    assert held < 50_000 * 24


def test_rows_are_kept_by_position() -> None:
    held, other = HeldRows(), HeldRows()
    held.put(5, [(1, 2), (3, 4)])
    held.put(2, [(9, 9)])
    held.put(6, [(7, 7)])
    assert (len(held), 2 in held, 3 in held, 6 in held) == (3, True, False, True)
    other.put(5, [(1, 2), (3, 4)])
    assert (held[5], held[2], list(held)) == ((1, 2), (9, 9), [2, 5, 6])
    assert held != other
    held.put(2**31 - 1, [(1, 1)])
    assert (len(held), held.dropped) == (3, 1)  # no row of a cache is there


def test_rows_that_a_rank_alone_repeats() -> None:
    (repeated,) = kv({1: [rows(0, 1, 2, 3), rows(3, 1, 2, 3, chunk=4)]}).diff()
    assert (repeated.kind, repeated.ranks, repeated.chunk) == ("rows repeated", (1,), 4)
    assert repeated.text == "rank 1: rows 3–5 of layer 0 repeat rows 0–2"


def test_the_same_in_several_layers_is_one_finding() -> None:
    once = [rows(0, 1, 2, layer=n) for n in (0, 1, 2, 5)]
    twice = [one for n in (0, 1, 2, 5) for one in (rows(0, 1, 2, layer=n), rows(2, 1, 2, layer=n))]
    (repeated,) = kv({0: once, 1: once, 2: twice}).diff()
    assert repeated.text == "rank 2 holds 4 rows of layers 0–2, 5, ranks 0 and 1 2: rows 2–3 repeat rows 0–1"
    assert (repeated.ranks, repeated.layer) == ((2,), 0)


def test_a_chunk_that_holds_the_chunk_before() -> None:
    right = [rows(0, 1, 2, 3), rows(3, 4, 5, 6)]
    (stale,) = kv({0: right, 1: right, 2: [rows(0, 1, 2, 3), rows(3, 1, 2, 3, chunk=1)]}).diff()
    assert (stale.kind, stale.ranks, stale.chunk) == ("rows stale", (2,), 1)
    assert stale.text == "rank 2 in layer 0: stale: rows 3–5 hold rows 0–2 of the chunk before"


def test_rows_that_lie_one_place_later() -> None:
    right, late = [rows(0, 1, 2, 3, 4, 5)], [rows(0, 9, 1, 2, 3, 4)]
    found = kv({0: right, 1: right, 2: late}).diff()
    assert [(one.kind, one.ranks) for one in found] == [("rows shifted", (2,)), ("rows differ", (2, 0))]
    assert found[0].text == "rank 2 in layer 0: rows 1–4 are shifted by +1"


def test_most_ranks_are_taken_to_be_right() -> None:
    (one,) = kv({0: [rows(0, 1, 9, 3)], 1: [rows(0, 1, 2, 3)], 2: [rows(0, 1, 2, 3)]}).diff()
    assert (one.kind, one.ranks) == ("rows differ", (0, 1))


def test_a_row_missing_in_the_middle_moves_those_behind_it() -> None:
    (found,) = kv({0: [rows(0, 1, 2, 3, 4)], 1: [rows(0, 1, 3, 4)]}).diff()
    assert (found.kind, found.ranks) == ("rows missing", (1,))
    assert found.text == "rank 1 holds 3 rows of layer 0, rank 0 4: row 1 of the others is missing"


def test_rows_behind_repeated_ones_are_not_told_besides() -> None:
    (found,) = kv(
        {0: [rows(0, 1, 2, 3, 4)], 1: [rows(0, 1, 2), rows(2, 1, 2, chunk=0), rows(4, 3, 4)]}
    ).diff()
    assert (found.kind, found.chunk) == ("rows repeated", 0)


def test_rows_of_an_older_chunk_that_are_returned_again() -> None:
    """A stale cache: what chunk 0 has made, in the place of chunk 2."""
    fresh = [rows(0, 1, 2), rows(2, 3, 4), rows(4, 5, 6, chunk=2)]
    stale = [rows(0, 1, 2), rows(2, 3, 4), rows(4, 1, 2, chunk=2)]
    (found,) = kv({0: fresh, 1: stale}).diff()
    assert (found.kind, found.ranks, found.layer, found.chunk) == ("rows repeated", (1,), 0, 2)
    assert found.text == "rank 1 in layer 0: rows 4–5 repeat rows 0–1"


def test_rows_that_lie_a_few_places_behind_those_of_another_rank() -> None:
    straight = [rows(0, 1, 2, 3, 4, 5, 6, 7, 8)]
    behind = [rows(0, 1, 2, 99, 98, 3, 4, 5, 6, 7, 8)]
    found = kv({0: straight, 1: behind}).diff()[0]
    assert (found.kind, found.ranks, found.layer) == ("rows shifted", (1,), 0)


def test_a_token_that_decoding_repeats_is_no_stale_row() -> None:
    assert kv({0: [rows(0, 1, 2), rows(2, 7), rows(3, 8), rows(4, 7)]}).diff() == []


PREFIX = tuple(range(1, 7))


def prompt(*own: int, layers: int = 3, spoiled: tuple[int, int] | None = None) -> list[RowsTaken]:
    """A rank's rows of a prompt that begins as others do. In layer 0 a row is its token's; in all behind it, each row
    depends on all tokens before. `spoiled`: layer and place of a row that has become another."""
    made = []
    for layer in range(layers):
        tokens = [*PREFIX, *own]
        digests = [
            token if not layer else hash((layer, *tokens[: at + 1])) >> 8 for at, token in enumerate(tokens)
        ]
        if spoiled and spoiled[0] == layer:
            digests[spoiled[1]] += 1
        made.append(rows(0, *(abs(one) for one in digests), layer=layer))
    return made


def test_data_parallel_ranks_whose_prompts_begin_alike_have_no_finding() -> None:
    """One token is by chance the same at the same place, which only layer 0 shows."""
    held = {0: prompt(20, 21, 22, 23), 1: prompt(30, 31, 22, 33), 2: prompt(40, 41, 42, 43, 44, 23)}
    found = kv(held)
    assert found.diff() == []
    assert "ranks 0 and 1 have other prompts from token 6 on (sequence 0): compared before it" in str(found)


def test_prompts_of_several_lengths_may_round_otherwise() -> None:
    """Their matrices are of other shapes."""
    rounded = kv({0: prompt(20, 21, 22), 1: prompt(30, 31, 32, 33, spoiled=(1, 2))})
    assert rounded.diff() == []
    assert "from token 6 on (sequence 0): not compared, as they were fed in other pieces" in str(rounded)


def test_of_one_layer_alone_it_holds_too() -> None:
    assert kv({0: prompt(20, 21, 22, 23, layers=1), 1: prompt(30, 31, 22, 33, layers=1)}).diff() == []


def test_replicas_that_decode_other_tokens_have_no_finding() -> None:
    assert kv({0: prompt(20, 21), 1: prompt(20, 31), 2: prompt(20, 21)}).diff() == []


def test_what_is_spoiled_before_the_prompts_part_is_found() -> None:
    (one,) = kv({0: prompt(20, 21, 22), 1: prompt(30, 31, 32, spoiled=(1, 2))}).diff()
    assert (one.kind, one.layer, one.ranks) == ("rows differ", 1, (1, 0))
    assert "hold other KV in 1 of 6 rows of layer 1, the first at token 2" in one.text


def test_rows_that_differ_to_the_end_though_the_tokens_are_the_same_are_found() -> None:
    """What a compute or a message spoils differs to the end in the layers behind it, and not in the first."""
    right = prompt(20, 21, 22)
    wrong = [right[0], *prompt(30, 21, 22)[1:]]
    (one,) = kv({0: right, 1: wrong}).diff()
    assert (one.kind, one.layer, one.ranks) == ("rows differ", 1, (1, 0))
    assert "3 of 9 rows of layers 1–2, the first at token 6" in one.text


def test_the_prompt_of_a_third_rank_hides_no_fault_between_two() -> None:
    right = prompt(20, 21, 22)
    wrong = [right[0], *prompt(30, 21, 22)[1:]]
    found = kv({0: right, 1: wrong, 2: prompt(40, 41, 42)}).diff()
    assert [(one.kind, one.layer, one.ranks) for one in found] == [("rows differ", 1, (1, 0))]


def test_a_fault_because_of_which_other_tokens_are_decoded_is_found() -> None:
    """It is the rows before these tokens that tell it."""
    right = prompt(20, 21, 22)
    wrong = [prompt(20, 21, 33)[0], *prompt(30, 31, 32)[1:]]
    (one,) = kv({0: right, 1: wrong}).diff()
    assert (one.kind, one.layer, one.ranks) == ("rows differ", 1, (1, 0))
    assert "hold other KV in 2 of 8 rows of layers 1–2, the first at token 6" in one.text


@pytest.mark.parametrize("layers", [1, 3])
def test_rows_that_nobody_has_filled_are_no_other_prompt(layers: int) -> None:
    """As of a transfer that has not come: zeros to the end, in all layers."""
    right = prompt(20, 21, 22, layers=layers)
    empty = [
        one._replace(digests=((*one.digests[0][: len(PREFIX)], *[(7, 7)] * 3),))
        for one in prompt(20, 21, 22, layers=layers)
    ]
    (one,) = kv({0: right, 1: empty}).diff()
    assert (one.kind, one.ranks) == ("rows differ", (1, 0))
    assert "the first at token 6" in one.text


def test_k_alone_that_differs_to_the_end_is_found() -> None:
    """Such as by a wrong position: another token would have another V."""
    right = prompt(20, 21, 22)
    turned = [
        one._replace(digests=(tuple((k + 500 * (at > 5), v) for at, (k, v) in enumerate(one.digests[0])),))
        for one in right[:1]
    ] + prompt(30, 31, 32)[1:]
    (one,) = kv({0: right, 1: turned}).diff()
    assert (one.kind, one.layer) == ("rows differ", 0)
    assert "3 of 9 rows of layers 0–2, the first at token 6" in one.text


def test_stages_of_data_parallel_pipelines_are_judged_by_the_first_stage() -> None:
    """The second stage holds no first layer."""
    one, other = prompt(20, 21, 22), prompt(30, 31, 32)
    healthy = kv({0: one[:1], 1: one[1:], 2: other[:1], 3: other[1:]})
    assert healthy.diff() == []
    broken = kv({0: one[:1], 1: one[1:], 2: one[:1], 3: other[1:]})
    assert [(found.kind, found.ranks) for found in broken.diff()] == [("rows differ", (3, 1))]


def test_rows_of_one_tensor_are_compared_too() -> None:
    """As those of a cache of latents, of which `dinfer.tap("kv", k=…)` gives one."""

    def latents(start: int, *digests: int) -> RowsTaken:
        return rows(start)._replace(digests=(tuple((one,) for one in digests),))

    right = [latents(0, 1, 2, 3), latents(3, 4, 5, 6)]
    (stale,) = kv({0: right, 1: [latents(0, 1, 2, 3), latents(3, 1, 2, 3)]}).diff()
    assert stale.text == "rank 1 in layer 0: stale: rows 3–5 hold rows 0–2 of the chunk before"
    (shifted, _) = kv({0: right, 1: [latents(0, 9, 1, 2, 3, 4, 5)]}).diff()
    assert shifted.text == "rank 1 in layer 0: rows 1–5 are shifted by +1"
