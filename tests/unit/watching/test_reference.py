"""What a watched model of transformers computed, beside a reference run of the same checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

import dinfer
from dinfer.errors import NotPossible
from dinfer.model.demo import CHECKPOINT
from dinfer.watch.probe import tensors
from dinfer.watch.probe.reading import read
from dinfer.watch.probe.rows import RowsTaken, read_rows
from dinfer.watch.probe.start import Probe
from dinfer.watching.comparison import WatchedComparison
from dinfer.watching.held_rows import layers_of
from dinfer.watching.kv import WatchedKv
from dinfer.watching.reference import compare

IDS = list(range(20, 44))
CHUNKS = [IDS[:10], IDS[10:20], IDS[20:]]


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    """The demo model, with one thread as the reference has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    torch.set_num_threads(before)


class Watcher:
    """Runs a model under watch as one rank does."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch, self.count = folder, monkeypatch, 0

    def rows(self, run: Callable[[], object], *, compares: bool = True) -> list[RowsTaken]:
        self.count += 1
        folder = self.folder / str(self.count)
        self.monkeypatch.setenv(tensors.COMPARE_VARIABLE, "1" if compares else "")
        probe = Probe(folder)
        try:
            with torch.no_grad():
                run()
        finally:
            probe.stop()
        (process,) = read(folder)
        assert process.problems == []
        return read_rows(folder, process)


@pytest.fixture
def watcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watcher:
    return Watcher(tmp_path, monkeypatch)


def in_chunks(model: Any, chunks: Sequence[Sequence[int]] = CHUNKS) -> Callable[[], None]:
    def run() -> None:
        cache = DynamicCache(config=model.config)
        for chunk, ids in enumerate(chunks):
            output = model(input_ids=torch.tensor([list(ids)]), past_key_values=cache)
            dinfer.tap("logits", output.logits, layer=0, chunk=chunk)

    return run


def hooked(model: Any, layer: int, chunk: int, alter: Callable[[Tensor], object]) -> Callable[[], None]:
    """The same, in which what leaves a layer is changed in one chunk."""

    def run() -> None:
        seen = iter(range(len(CHUNKS)))

        def changed(*given: Any) -> None:
            if next(seen) == chunk:
                alter(given[-1])

        hook = model.model.layers[layer].mlp.register_forward_hook(changed)
        try:
            in_chunks(model)()
        finally:
            hook.remove()

    return run


def compared(rows: dict[int, list[RowsTaken]], **options: Any) -> WatchedComparison:
    return compare(rows, **options)


def test_a_run_in_the_reference_s_chunks_is_equal_bit_for_bit(model: Any, watcher: Watcher) -> None:
    rows = watcher.rows(in_chunks(model))
    found = compared({0: rows, 1: rows})
    assert found.kind == "equal", str(found)
    assert found.verdict.startswith("equal: ranks 0 and 1 computed what transformers' own forward makes")
    assert "hidden, K, V, output, logits of 6 layers" in str(found)


def test_of_several_prompts_without_a_cache_the_last_counts(model: Any, watcher: Watcher) -> None:
    def run() -> None:
        for ids in (range(20, 32), range(5)):
            model(input_ids=torch.tensor([list(ids)]), use_cache=False)

    found = compared({0: watcher.rows(run)})
    assert found.kind == "equal", str(found)
    assert "5 tokens" in str(found)


def test_a_value_that_the_compute_gets_wrong_is_named(model: Any, watcher: Watcher) -> None:
    def alter(tensor: Tensor) -> None:
        tensor[0, 3] *= 1.5

    right = watcher.rows(in_chunks(model))
    wrong = watcher.rows(hooked(model, 2, 1, alter))
    found = compared({0: right, 1: wrong})
    assert found.first
    assert (found.first.ranks, found.first.right) == ((1,), (0,))
    assert (found.first.layer, found.first.chunk, found.first.tensor, found.first.token) == (
        2,
        1,
        "output",
        13,
    )
    assert 0.01 < found.first.difference < 1
    alone = compared({1: wrong})
    assert alone.kind == "compute"
    assert alone.verdict.startswith(
        "the compute differs: what leaves layer 2, chunk 1, token 13, on rank 1: about"
    )


def test_other_chunks_than_the_reference_s_are_within_tolerance(model: Any, watcher: Watcher) -> None:
    rows = watcher.rows(in_chunks(model))
    of_others = [one for one in rows if not one.name.startswith("ids")]
    first = [one for one in of_others if one.layer == 0]
    assert first
    whole = watcher.rows(in_chunks(model, [IDS]))
    mixed = [one for one in whole if one.name.startswith("ids")]
    found = compared({0: [*of_others, *mixed]}, ids=IDS)
    assert found.within_tolerance, str(found)
    fed = watcher.rows(in_chunks(model, [IDS]))
    assert compared({0: [one for one in fed if one.name != "logits"]}).kind == "equal"


def test_bytes_that_change_on_the_way_are_told_from_compute(watcher: Watcher, model: Any) -> None:
    """A pipeline of two stages: what the first has made is right, and what enters the second is not."""
    rows = watcher.rows(in_chunks(model))

    def spoiled() -> None:
        cache = DynamicCache(config=model.config)
        for chunk, ids in enumerate(CHUNKS):
            output = model(input_ids=torch.tensor([ids]), past_key_values=cache, output_hidden_states=True)
            entered = output.hidden_states[3].clone()
            if chunk == 1:
                entered[0, 2, 5] += 1
            dinfer.tap("hidden", entered, layer=3, chunk=chunk)

    second = [one for one in watcher.rows(spoiled, compares=False) if one.name == "hidden"]
    first = [one for one in rows if (one.layer or 0) < 3 and one.name != "logits"]
    found = compared({0: first, 1: second})
    assert found.kind == "wire", str(found)
    assert "what enters layer 3, chunk 1, token 12, on rank 1" in found.verdict
    assert "what left layer 2 is the reference's" in found.verdict


class Misplacing(DynamicCache):
    """Puts a token's row in another one's place, in one layer and chunk."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *given: Any, **options: Any
    ) -> Any:
        if layer_idx == 4 and self.get_seq_length(4) == 10:
            key_states[:, :, 5], value_states[:, :, 5] = key_states[:, :, 2], value_states[:, :, 2]
        return super().update(key_states, value_states, layer_idx, *given, **options)


def test_rows_of_another_token_are_placement(watcher: Watcher, model: Any) -> None:
    def run() -> None:
        cache = Misplacing(config=model.config)
        for ids in CHUNKS:
            model(input_ids=torch.tensor([ids]), past_key_values=cache)

    found = compared({0: watcher.rows(run)})
    assert found.kind == "placement", str(found)
    assert "layer 4, K, chunk 1, token 15, on rank 0: it holds what belongs to row 12" in found.verdict


def test_digests_alone_say_where_and_that_they_do_not_know_how_much(watcher: Watcher, model: Any) -> None:
    rows = watcher.rows(hooked(model, 0, 0, lambda tensor: tensor.mul_(1.2)), compares=False)
    found = compared({0: [one for one in rows if one.name == "kv"]}, checkpoint="demo", ids=IDS)
    assert found.first
    assert (found.first.layer, found.first.tensor, found.first.token) == (1, "K", 0)
    assert "only digests were taken" in found.verdict


def test_what_is_not_known_is_asked_for(watcher: Watcher, model: Any) -> None:
    rows = [one for one in watcher.rows(in_chunks(model)) if not one.name.startswith("ids")]
    with pytest.raises(NotPossible, match=r'which checkpoint is not known: .* checkpoint="folder"'):
        compared({0: rows})
    with pytest.raises(NotPossible, match=r"the token ids are not known: .* ids=\[…\]"):
        compared({0: rows}, checkpoint="demo")
    with pytest.raises(NotPossible, match="compare=True"):
        compared({0: []})
    with pytest.raises(NotPossible, match="dtype 'int8' has no reference"):
        compared({0: rows}, checkpoint="demo", ids=IDS, dtype="int8")


def test_a_tap_that_the_reference_does_not_have_is_named(watcher: Watcher, model: Any) -> None:
    def run() -> None:
        in_chunks(model)()
        dinfer.tap("router", torch.zeros(3, 4), layer=1)

    found = compared({0: watcher.rows(run)})
    assert found.not_compared == ["router"]
    assert "not compared: router" in str(found)


def padded(model: Any, side: str, *, generates: bool = True) -> Callable[[], None]:
    """Two prompts, the second one shorter, with padding on one side, and two more tokens behind."""
    prompts = [list(range(20, 30)), list(range(40, 46))]

    def run() -> None:
        pads = [10 - len(one) for one in prompts]
        rows = [
            [0] * count + one if side == "left" else one + [0] * count
            for one, count in zip(prompts, pads, strict=True)
        ]
        mask = torch.tensor([[int(at != 0) for at in one] for one in rows])
        if generates:
            model.generate(torch.tensor(rows), attention_mask=mask, max_new_tokens=3, min_new_tokens=3)
        else:
            model(torch.tensor(rows), mask, past_key_values=DynamicCache(config=model.config))

    return run


@pytest.mark.parametrize("generates", [True, False], ids=["positions given", "positions counted"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_are_compared_with_their_mask_and_positions(
    side: str, generates: bool, model: Any, watcher: Watcher
) -> None:
    found = compared({0: watcher.rows(padded(model, side, generates=generates))})
    assert found.within_tolerance, str(found)
    assert "of which 4 of all 2 sequences are padding and are left out" in str(found)


def test_what_goes_wrong_beside_padding_is_found(model: Any, watcher: Watcher) -> None:
    def alter(*given: Any) -> Tensor:
        output: Tensor = given[-1].clone()
        output[1, 7] *= 1.5
        return output

    hook = model.model.layers[2].mlp.register_forward_hook(alter)
    try:
        rows = watcher.rows(padded(model, "left", generates=False))
    finally:
        hook.remove()
    found = compared({0: rows})
    assert found.kind == "compute", str(found)
    assert found.first
    assert (found.first.layer, found.first.tensor, found.first.token) == (2, "output", 7)


def test_a_mask_of_another_form_is_said_once_to_be_ignored(
    model: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv(tensors.COMPARE_VARIABLE, "1")
    probe = Probe(tmp_path)
    try:
        with torch.no_grad():
            for _ in range(2):
                model(torch.tensor([IDS]), attention_mask=torch.zeros(1, 1, len(IDS), len(IDS)))
    finally:
        probe.stop()
    (process,) = read(tmp_path)
    assert process.problems == [
        'a mask that has not the form [batch, tokens]: compare("reference") ignores it'
    ]


def test_replicas_with_prompts_that_begin_alike_have_no_finding(model: Any, watcher: Watcher) -> None:
    """Data-parallel ranks with one system prompt; of the users' parts, one token is the same at the same place."""
    system = IDS[:14]
    users = ([50, 51, 52, 53, 54, 55], [60, 61, 52, 63, 64, 65])

    def rows(user: list[int]) -> list[RowsTaken]:
        return watcher.rows(in_chunks(model, [system[:10], [*system[10:], *user]]), compares=False)

    found = WatchedKv({rank: layers_of(rows(user)) for rank, user in enumerate(users)})
    assert found.diff() == []
    assert "ranks 0 and 1 have other prompts from token 14 on" in str(found)
