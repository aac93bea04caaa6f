"""A run beside transformers' own forward: clean runs are equal bit for bit, and what is broken is named exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from html import escape
from pathlib import Path
from typing import Any

import pytest
import torch

from dinfer.cluster.ranks import RankRefused
from dinfer.cluster.threads import LocalRanks
from dinfer.engine.prefill import Prefill
from dinfer.kv.reference.comparison import Comparison
from dinfer.model.decoder import Decoder
from dinfer.plan.ops import PlanError
from dinfer.run.run import Run
from dinfer.session.session import Session
from tests.support.threads import session_on_threads
from tests.support.tiny import tiny_checkpoint
from tests.support.twin import prompt
from tests.unit.model.test_conformance import LAYERS as FAMILY_LAYERS
from tests.unit.model.test_conformance import TINY

LAYERS, NEW = 4, 5
IDS = list(prompt(26))


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Session]]:
    """A session of so many ranks on a checkpoint of that dtype; made once."""
    folder, made = tmp_path_factory.mktemp("comparing"), dict[tuple[int, str], Session]()
    with ExitStack() as stack:

        def session(world_size: int = 3, dtype: str = "float32") -> Session:
            if (world_size, dtype) not in made:
                model = tiny_checkpoint(folder / dtype, layers=LAYERS, dtype=dtype, tokenizer=True)
                made[world_size, dtype] = stack.enter_context(session_on_threads(world_size, model))
            return made[world_size, dtype]

        yield session


@pytest.fixture
def done(sessions: Callable[..., Session]) -> Run:
    """Three ranks, 26 tokens by 8, and 5 new ones."""
    run = sessions().prefill(IDS, chunk_size=8, max_new_tokens=NEW)
    run.decode(NEW)
    assert len(run.tokens) == NEW
    return run


def states(session: Session) -> list[Prefill]:
    assert isinstance(session.ranks, LocalRanks)
    return [host.engine.executor.state for host in session.ranks.hosts if host.engine]


def first_line(found: Comparison) -> str:
    return str(found).splitlines()[0]


# -- clean runs


@pytest.mark.parametrize(("dtype", "schedule"), [("float32", "pipelined"), ("bfloat16", "lockstep")])
@pytest.mark.parametrize(("strategy", "world_size", "chunk_size"), [
    ("pairwise", 1, 8), ("pairwise", 2, 5), ("ring", 3, 8), ("pairwise", 3, 26), ("ring", 4, 1),
])  # fmt: skip
def test_clean_runs_are_equal_bit_for_bit(
    sessions: Callable[..., Session],
    dtype: str,
    schedule: str,
    strategy: str,
    world_size: int,
    chunk_size: int,
) -> None:
    run = sessions(world_size, dtype).prefill(
        IDS, chunk_size=chunk_size, schedule=schedule, sync_strategy=strategy, max_new_tokens=NEW
    )
    run.decode(NEW)
    found = run.compare("reference")
    assert found.equal, str(found)
    assert found.within_tolerance
    assert (found.kind, found.first) == ("equal", None)
    assert first_line(found).startswith("equal: ")
    assert f"and {NEW} new tokens, fed one by one" in str(found)
    assert f"reference: {dtype}, in the run's chunks of {chunk_size} tokens, on rank 0 (cpu, 1 thread" in str(
        found
    )
    assert {(row["layer"], row["chunk"]) for row in found.rows if row["K"] is not None} == {
        (layer, chunk) for layer in range(LAYERS) for chunk in range(len(run.plan.shape.chunks) + 1)
    }
    assert all(row[name] in (0.0, None) for row in found.rows for name in ("K", "V", "hidden"))


def test_a_run_is_compared_wherever_it_stands(sessions: Callable[..., Session]) -> None:
    run = sessions().prefill(IDS, chunk_size=8, paused=True, max_new_tokens=NEW)
    with pytest.raises(PlanError, match="prefill has not begun"):
        run.compare()
    for unit, n in (("op", 7), ("layer", 3), ("wave", 2), ("chunk", 1)):
        run.step(unit, n)
        found = run.compare()
        assert found.equal, str(found)
        assert "compared so far" in str(found)
        assert run.compare(chunked=False).within_tolerance
    run.step_back("layer", 3)
    assert run.compare().equal
    for count in range(1, 4):
        run.decode(1) if count == 1 else run.step("token")
        assert run.compare().equal
    run.step_back("token", 2)
    found = run.compare()
    assert found.equal
    assert "1 new token, fed" in str(found)


def test_it_disturbs_nothing(done: Run, sessions: Callable[..., Session]) -> None:
    session = sessions()
    assert isinstance(session.ranks, LocalRanks)
    decoder = session.ranks.hosts[0].decoder
    assert isinstance(decoder, Decoder)
    before = done.sha256(), decoder.model.config.to_dict(), torch.get_rng_state(), done.edited
    for options in ({}, {"chunked": False}, {"dtype": "bfloat16"}):
        done.compare("reference", **options)
    after = done.sha256(), decoder.model.config.to_dict(), torch.get_rng_state(), done.edited
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])
    assert before[3] == after[3] == []
    done.step_back("token", 2)
    tokens = done.tokens
    assert len(tokens) == NEW - 2
    done.decode(2)
    assert done.tokens[: len(tokens)] == tokens
    assert done.compare().equal


@pytest.mark.parametrize(
    "options", [{"chunked": False}, {"dtype": "bfloat16"}, {"chunked": False, "dtype": "float16"}]
)
def test_other_chunks_and_dtypes_are_within_tolerance(done: Run, options: dict[str, Any]) -> None:
    found = done.compare("reference", **options)
    assert (found.kind, found.equal, found.within_tolerance) == ("drift", False, True)
    assert first_line(found).startswith("within tolerance: what all 3 ranks hold differs")
    assert "tolerated: 4 · √(layer + 1) · (√16" in str(found)
    assert len(str(found.table()).splitlines()) == 1 + LAYERS
    last = [row for row in found.rows if row["layer"] == LAYERS - 1]
    assert all(row["K"] > 0 and row["K_share"] <= row["tolerance"] for row in last)


@pytest.mark.parametrize("family", sorted(TINY))
def test_every_family_is_equal(tmp_path: Path, family: str) -> None:
    model = tiny_checkpoint(tmp_path, family, layers=FAMILY_LAYERS, **TINY[family])
    with session_on_threads(2, model) as session:
        run = session.prefill(IDS, chunk_size=9, max_new_tokens=3)
        run.decode(3)
        found = run.compare()
        assert found.equal, str(found)
        assert run.compare(chunked=False).within_tolerance


# -- broken by hand


def test_a_wrong_value_on_one_rank(done: Run, sessions: Callable[..., Session]) -> None:
    row = states(sessions())[2].cache.block(1, 8, 16)[3, 0, 1]
    right = float(row[7])
    row[7] = 40.0
    found = done.compare()
    first = found.first
    assert first
    assert (found.kind, found.equal, found.within_tolerance) == ("wire", False, False)
    assert (first.rank, first.ranks, first.right, first.owner) == (2, (2,), (0, 1), 0)
    assert (first.layer, first.chunk, first.tensor, first.head, first.token, first.dim) == (
        1,
        1,
        "K",
        1,
        11,
        7,
    )
    assert first.values == (40.0, right)
    assert "the wire or memory changed bytes: rank 2 at layer 1, chunk 1, K, head 1, token 11" in first_line(
        found
    )
    assert "received by pairwise hop 0→2 in chunk 1, changed afterwards in its memory" in first_line(found)
    assert "on rank 0, 2 (cpu" in str(found)


def test_a_wrong_value_in_the_owners_memory(done: Run, sessions: Callable[..., Session]) -> None:
    states(sessions())[0].cache.block(1, 8, 16)[3, 1, 0, 0] += 1
    found = done.compare()
    assert found.first
    assert (found.kind, found.first.rank, found.first.ranks, found.first.right) == ("wire", 0, (0,), (1, 2))
    assert "computed there in chunk 1, changed afterwards in its memory" in first_line(found)


def test_a_bit_that_is_no_difference_of_values(done: Run, sessions: Callable[..., Session]) -> None:
    for state in states(sessions()):
        state.cache.block(2, 0, 8)[0, 0, 0, 0] = 0.0
    done.compare()
    states(sessions())[1].cache.block(2, 0, 8)[0, 0, 0, 0] = -0.0
    found = done.compare()
    assert found.first
    assert (found.first.layer, found.first.chunk, found.first.token, found.first.dim) == (2, 0, 0, 0)


def compute_fault(
    session: Session, rank: int, chunk: int, layer: int, change: Callable[[torch.Tensor], object]
) -> None:
    """Have a rank compute a block otherwise, before anybody looks at it."""
    faults = states(session)[rank].faults

    def computed(op: Any, block: torch.Tensor) -> None:
        if (op.chunk, op.layer) == (chunk, layer):
            change(block)

    faults.computed = computed  # type: ignore[method-assign]


def test_what_all_ranks_share_was_computed_so(sessions: Callable[..., Session]) -> None:
    run = sessions().prefill(IDS, chunk_size=8, paused=True, max_new_tokens=NEW)
    compute_fault(sessions(), 1, 1, 2, lambda block: block[5, 1, 0, 3].neg_())
    run.decode(NEW)
    for chunked in (True, False):
        found = run.compare("reference", chunked=chunked)
        first = found.first
        assert first
        assert (first.layer, first.chunk, first.tensor, first.head, first.token, first.dim) == (
            2,
            1,
            "V",
            0,
            13,
            3,
        )
        assert first.ranks == (0, 1, 2)
        assert not found.within_tolerance
        assert found.kind == ("compute" if chunked else "drift")
    found = run.compare()
    assert found.first
    assert (found.first.owner, found.first.op) == (1, "layer c1 l2")
    assert first_line(found).startswith(
        "the compute differs: all 3 ranks alike at layer 2, chunk 1, V, head 0, token 13"
    )
    assert first_line(found).endswith("computed so by rank 1 at `layer c1 l2`")


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("permuted", lambda block: block.copy_(block.flip(0)), "in another order"),
        ("swapped", lambda block: block.copy_(block.flip(1)), "K holds V's rows and V holds K's rows"),
        ("heads", lambda block: block.copy_(block.roll(1, 2)), "heads shifted by 1"),
        ("empty", lambda block: block.zero_(), "all zeros"),
    ],
)
@pytest.mark.parametrize("everywhere", [False, True])
def test_rows_that_lie_wrongly(
    sessions: Callable[..., Session],
    kind: str,
    change: Callable[[torch.Tensor], Any],
    said: str,
    everywhere: bool,
) -> None:
    run = sessions().prefill(IDS, chunk_size=8, paused=True, max_new_tokens=NEW)
    if everywhere:
        compute_fault(sessions(), 1, 1, 2, change)
    run.resume()
    run.wait(60)
    if not everywhere:
        change(states(sessions())[2].block(1, 2))
    found = run.compare()
    assert found.first
    assert found.first.rows
    assert (found.kind, found.first.rows.kind, found.first.layer, found.first.chunk) == (
        "placement",
        kind,
        2,
        1,
    )
    assert found.first.ranks == ((0, 1, 2) if everywhere else (2,))
    who = "all 3 ranks" if everywhere else "rank 2"
    assert first_line(found).startswith(f"placement is wrong: on {who}, layer 2, chunk 1: ")
    assert said in first_line(found)
    assert "rows 8–15" in first_line(found)
    assert ("changed afterwards in its memory" in first_line(found)) is not everywhere


def test_a_stale_block(done: Run, sessions: Callable[..., Session]) -> None:
    state = states(sessions())[0]
    state.block(2, 3).copy_(state.block(1, 3))
    found = done.compare()
    assert found.first
    assert found.first.rows
    assert (found.kind, found.first.rows.kind, found.first.ranks) == ("placement", "stale", (0,))
    assert "layer 3, chunk 2: stale: rows 16–23 hold rows 8–15 of the chunk before" in first_line(found)


def test_rows_of_a_block_appended_twice_just_before_the_next(sessions: Callable[..., Session]) -> None:
    """They then fill the place of the next block, which is none that holds an earlier one's."""
    run = sessions().prefill(IDS, chunk_size=8)
    run.wait(60)
    state = states(sessions())[1]
    state.cache = state.cache.moved(40, 26)
    rows = state.cache.block(2, 0, 34)
    rows.copy_(rows[[*range(16), *range(8, 16), *range(16, 26)]])
    state.extra[2] = 8
    assert first_line(run.compare()) == (
        "placement is wrong: rank 1 holds 34 rows of layer 2, ranks 0, 2 and the reference 26; "
        "rows 16–23 repeat rows 8–15"
    )


def append_again(state: Prefill, layer: int, rows: int) -> None:
    """The first real fault of all: a layer's rows are there twice."""
    state.cache = state.cache.moved(2 * rows, rows)
    state.cache.block(layer, rows, 2 * rows).copy_(state.cache.block(layer, 0, rows))
    state.extra[layer] = rows


def test_rows_appended_twice_on_one_rank(sessions: Callable[..., Session]) -> None:
    run = sessions().prefill(IDS, chunk_size=8)
    run.wait(60)
    append_again(states(sessions())[0], 0, 26)
    for options in ({}, {"chunked": False}, {"dtype": "bfloat16"}):
        found = run.compare("reference", **options)
        assert (found.kind, found.equal, found.within_tolerance) == ("placement", False, False)
        assert first_line(found) == (
            "placement is wrong: rank 0 holds 52 rows of layer 0, ranks 1, 2 and the reference 26; "
            "rows 26–51 repeat rows 0–25"
        )


def test_new_rows_appended_twice_on_all_ranks_alike(done: Run, sessions: Callable[..., Session]) -> None:
    """The second: ranks agree, and the text is wrong."""
    for state in states(sessions()):
        state.cache = state.cache.moved(40, 30)
        for layer in range(LAYERS):
            rows = state.cache.block(layer, 26, 33)
            rows.copy_(rows[[0, 0, 1, 1, 2, 2, 3]])
            state.extra[layer] = 3
    found = done.compare()
    assert (found.kind, found.first and found.first.ranks) == ("placement", (0, 1, 2))
    assert first_line(found) == (
        "placement is wrong: all 3 ranks hold 33 rows of every layer, the reference 30; row 27 repeats row 26"
    )


def test_a_hidden_state_changed_on_its_way(sessions: Callable[..., Session]) -> None:
    run = sessions().prefill(IDS, chunk_size=8, paused=True)
    run.run_to(1, 1)
    state = states(sessions())[1]
    state.hidden[0, 2][0, 4, 9] += 1
    found = run.compare()
    assert found.first
    assert (found.kind, found.first.rank) == ("wire", 1)
    assert (found.first.layer, found.first.chunk, found.first.tensor) == (2, 0, "hidden")
    assert (found.first.token, found.first.dim, found.first.head) == (4, 9, None)
    assert "what enters layer 2, chunk 0, token 4" in first_line(found)


def test_bytes_that_differ_within_tolerance_are_still_the_wires(
    done: Run, sessions: Callable[..., Session]
) -> None:
    states(sessions())[2].cache.block(1, 8, 16)[3, 0, 1, 7] *= 1 + 2**-22
    found = done.compare(chunked=False)
    assert (found.kind, found.equal, found.within_tolerance) == ("wire", False, True)
    assert "the ranks hold different bytes of layer 1, chunk 1, K" in first_line(found)
    assert done.compare().kind == "wire"


def test_nan_is_no_rounding(done: Run, sessions: Callable[..., Session]) -> None:
    for state in states(sessions()):
        state.cache.block(1, 8, 16)[3, 0, 1, 7] = torch.nan
    found = done.compare(chunked=False)
    assert (found.kind, found.within_tolerance) == ("drift", False)
    assert found.first
    assert (found.first.layer, found.first.chunk, found.first.token, found.first.dim) == (1, 1, 11, 7)


def test_another_token_than_the_references(done: Run, sessions: Callable[..., Session]) -> None:
    session = sessions()
    assert isinstance(session.ranks, LocalRanks)
    for host in session.ranks.hosts:
        assert host.prompt
        assert host.prompt.tokens._decoding
        host.prompt.tokens._decoding.tokens[-1] ^= 1
    found = done.compare()
    assert (found.kind, found.within_tolerance) == ("compute", False)
    assert f"new token {26 + NEW - 1} is" in first_line(found)
    assert "the head or the sampling differs" in first_line(found)


def test_an_edited_run_says_so(sessions: Callable[..., Session]) -> None:
    run = sessions().prefill(IDS, chunk_size=8, paused=True)
    run.step("layer", 2)
    states(sessions())[0].cache.block(0, 0, 8)[0, 0, 0, 0] = 3.0
    run.step("layer")
    assert "edited by hand: KV of layer 0 on rank 0" in str(run.compare())


# -- errors, and what it says of itself


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"what": "something else"}, "'something else' cannot be compared with"),
        ({"dtype": "int8"}, "dtype 'int8' is not known; give one of float32, bfloat16, float16"),
        ({"dtype": "auto"}, "dtype 'auto' is not known"),
    ],
)
def test_what_is_not_known(done: Run, given: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        done.compare(**given)


def test_too_little_memory_is_said_before(done: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinfer.rank.reference.free", lambda _: 1000)
    with pytest.raises(
        RankRefused, match=r"the reference needs .* 1000 bytes are free: compare a shorter prompt"
    ):
        done.compare()
    with pytest.raises(
        RankRefused, match=r"the weights once more, in bfloat16 .* compare in the run's own dtype"
    ):
        done.compare(dtype="bfloat16")


def test_its_html_is_its_text(done: Run) -> None:
    found = done.compare()
    assert escape(str(found)) in found._repr_html_()
    assert done.last_call == 'run.compare("reference")'
