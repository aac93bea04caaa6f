"""Plans that others have damaged or made: read and judged, or refused with one error, within seconds and 500 MB."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinfer.plan.graph import Graph
from dinfer.plan.ops import PlanError
from dinfer.plan.partition import MAX_CELLS, partition
from dinfer.plan.plan import parse_plan
from dinfer.plan.schedule import build
from dinfer.plan.verify import any_cycle, shortest_cycle, verify
from tests.support.hostile import LIMITED, mutated_bytes, read_limited, read_or_refused

SHAPE = partition(layers=4, tokens=10, world_size=2, chunk_size=4)
TEXTS = [build(SHAPE, schedule, "ring").text() for schedule in ("pipelined", "lockstep", "batched")]
HEADER = (
    "dinfer plan 1\nlayers {}, tokens {}, chunk_size {}\nstages start at {}\nschedule s, sync_strategy t\n"
)


@given(st.sampled_from(TEXTS).flatmap(lambda text: mutated_bytes(text.encode())))
def test_a_damaged_plan_is_judged_or_refused(data: bytes) -> None:
    text = data.decode("utf-8", "surrogatepass" if b"\xed" in data and _is_wtf8(data) else "replace")
    read_or_refused(lambda: _judge(text))


def _is_wtf8(data: bytes) -> bool:
    try:
        data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return False
    return True


def _judge(text: str) -> None:
    plan = parse_plan(text)
    str(verify(plan))
    assert parse_plan(plan.text()) == plan
    assert plan.id >= 0


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((10**6, 10**12, 1, "0"), "a plan may have"),
        ((10**9, 1, 1, "0 1"), "1,000,000,000 layers"),
        ((4, "9" * 5000, 1, "0"), "should read"),
        ((4, 10**30, 1, "0"), "tokens is"),
        ((4, "NaN", 1, "0"), "should read"),
        ((4, -1, 1, "0"), "tokens is -1"),
        ((4, 10, 0, "0"), "chunk_size is 0"),
        ((4, 10, 1, ""), "stages"),
        ((4, 10, 1, "0 0"), "every stage must own"),
        ((4, 10, 1, "1"), "the first must be 0"),
    ],
)
def test_sizes_that_no_plan_has_are_refused(sizes: tuple[object, ...], words: str) -> None:
    with pytest.raises(PlanError) as caught:
        parse_plan(HEADER.format(*sizes))
    assert words in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("rank 0 lane a\nrank 0 lane a", "two lanes named 'a'"),
        ("rank 7 lane a", "rank 7 does not exist"),
        (f"rank {'9' * 5000} lane a", "should read"),
        ("rank ² lane a", "should read"),
        (f"rank 0 lane a\n  layer c{'9' * 5000} l0", "is not an op"),
        ("rank 0 lane a\n  layer c١ l0", "is not an op"),
        ("rank 0 lane \ud800", "half of a surrogate pair"),
        ("x" * 10**6, "before the first lane"),
    ],
)
def test_lines_that_no_plan_has_are_named(line: str, words: str) -> None:
    with pytest.raises(PlanError, match=r"^line \d+: ") as caught:
        parse_plan(HEADER.format(4, 10, 4, "0 2") + line)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 600


def _write(folder: Path) -> Iterator[Path]:
    """Plans that would cost minutes or gigabytes if something were made of all that they name, or of each pair."""
    many = 20_000
    one_layer = (
        HEADER.format(1, many, 1, "0") + "rank 0 lane a\n" + "".join(f"  embed c{n}\n" for n in range(many))
    )
    crowd = HEADER.format(4, 10, 4, "0 2")
    ring = "".join(
        f"rank {rank} lane n{n}\n  recv hidden c0 l0 <- {1 - rank}, 4 tokens\n"
        for rank in (0, 1)
        for n in range(many)
    )
    waits = "".join(f"rank 0 lane n{n}\n  layer c{(n + 1) % many} l0\n  embed c{n}\n" for n in range(many))
    for name, text in {
        "header": HEADER.format(1, MAX_CELLS, 1, "0"),
        "ascending": one_layer + "".join(f"  layer c{n} l0\n" for n in range(many)),
        "descending": one_layer + "".join(f"  layer c{n} l0\n" for n in reversed(range(many))),
        "a lane for each layer": one_layer
        + "".join(f"rank 0 lane n{n}\n  layer c{n} l0\n" for n in range(many)),
        "a lane for each recv": crowd + ring,
        "lanes that wait for one another": HEADER.format(1, many, 1, "0") + waits,
        "twice": crowd + "rank 0 lane a\n" + "  embed c0\n" * many,
        "empty lanes": crowd + "".join(f"rank 0 lane n{n}\n" for n in range(5 * many)),
        "one line": "dinfer plan 1\n" + "x" * 20_000_000,
        "lines": "\n" * (3 * MAX_CELLS + 1),
        "many lines": "\n" * (2 * MAX_CELLS),
    }.items():
        path = folder / name
        path.write_text(text, encoding="utf-8")
        yield path


@LIMITED
@pytest.mark.timeout(300)
def test_a_hostile_plan_costs_little(tmp_path: Path) -> None:
    paths = list(_write(tmp_path))
    found = read_limited(
        "from pathlib import Path\nfrom dinfer.plan.plan import parse_plan\nfrom dinfer.plan.verify import verify",
        "str(verify(parse_plan(Path(path).read_text())))",
        paths,
    )
    assert found.keys() == {path.name for path in paths}
    assert found["ascending"] == found["descending"] == ""
    assert "must be on one lane, and in order" in found["a lane for each layer"]
    assert "is not a plan" in found["lines"]


def test_what_an_op_of_the_lane_has_awaited_is_not_awaited_again() -> None:
    plan = build(partition(layers=2, tokens=50, world_size=1, chunk_size=1), "lockstep", "ring")
    graph = Graph(plan)
    layers = [n for n, op in enumerate(graph.ops) if op.kind == "layer"]
    assert max(len(graph.deps[n]) for n in layers) == 2
    for n in layers:
        made = [graph.ops[dep].makes() for dep in graph.deps[n]]
        assert all(need in values for need, values in zip(graph.needs(n), made, strict=True))


@given(st.dictionaries(st.integers(0, 7), st.lists(st.integers(0, 7), max_size=3, unique=True)))
def test_any_cycle_is_one_where_there_is_one(edges: dict[int, list[int]]) -> None:
    found = any_cycle(edges)
    assert bool(found) == bool(shortest_cycle(edges))
    assert all(b in edges[a] for a, b in zip(found, found[1:] + found[:1], strict=True))
    assert found[:1] == sorted(found)[:1]
