"""Errors that can be found before a rank starts are found then, and say what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dinfer.config import Config, ConfigError
from dinfer.errors import ModelError
from dinfer.job import prepare, threads_per_rank
from dinfer.model import memory
from dinfer.plan.ops import PlanError
from tests.support.tiny import byte_tokenizer, tiny_checkpoint

IDS = "1,2,3,4,5,6,7,8,9,10"


MODEL = {"layers": 4, "max_position_embeddings": 32}


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a tokenizer."""
    folder = tmp_path_factory.mktemp("talking")
    return tiny_checkpoint(folder, layers=4, max_position_embeddings=32, tokenizer=True)


def config(model: Path, **values: object) -> Config:
    """A config that is right but for `values`."""
    return Config.of({"model_path": model, "prompt_ids": IDS, "chunk_size": 4, "threads": 1, **values})


def test_a_job_holds_prompt_plan_and_proof(model: Path) -> None:
    job = prepare(config(model))
    assert job.ids == tuple(range(1, 11))
    assert (job.plan.shape.layers, job.plan.shape.tokens, job.plan.world_size) == (4, 10, 3)
    assert job.verdict.proved


def test_threads_are_settled(model: Path) -> None:
    assert prepare(config(model)).config.threads == 1
    assert prepare(config(model, threads=0)).config.threads == threads_per_rank(3) >= 1


def test_the_backend_is_settled(model: Path) -> None:
    job = prepare(config(model))
    assert job.config.backend == "gloo"
    assert not job.plan.is_lowered


def test_for_nccl_the_plan_is_lowered_and_proved_so(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinfer.job.choose_backend", lambda given: given.with_(backend="nccl"))
    job = prepare(config(model))
    assert job.plan.is_lowered
    assert job.verdict.proved


def test_text_is_encoded(talking: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("中文", encoding="utf-8")
    from_file = config(talking, prompt_ids="", prompt_file=tmp_path / "prompt.txt")
    given = config(talking, prompt_ids="", prompt="中文")
    assert prepare(from_file).ids == prepare(given).ids
    assert len(prepare(given).ids) == len("中文".encode())


def test_a_tokenizer_of_another_model(folder: Path) -> None:
    """Its tokens are checked as the user's own ids are, before a rank sees them."""
    byte_tokenizer().save_pretrained(folder)
    with pytest.raises(
        ConfigError, match=r"made token \d{3} of the prompt; .* from 0 to 127\. .*another model"
    ):
        prepare(config(folder, prompt_ids="", prompt="中文", world_size=1, layer_split=()))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"prompt_ids": ""}, r"the prompt is empty: give prompt, prompt_file or prompt_ids"),
        ({"prompt_ids": "", "prompt": " \n"}, r"the prompt is empty"),
        ({"prompt_ids": "", "prompt": "hello"}, r"has no tokenizer: give prompt_ids"),
        ({"prompt_ids": ",".join(["1"] * 33)}, r"has 33 tokens; .* has 32 positions: shorten the prompt"),
        ({"prompt_ids": "1,128"}, r"prompt_ids has 128; token ids of this model go from 0 to 127"),
        ({"world_size": 5}, r"world_size is 5, but .* has 4 layers .*: use at most 4 ranks"),
    ],
)
def test_what_the_checkpoint_cannot_do_is_refused(model: Path, values: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        prepare(config(model, **values))


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (
            0,
            r"gpu_ids names 0, 5, but torch finds no GPU on this machine: change gpu_ids, or leave it out",
        ),
        (2, r"gpu_ids names 5, but GPU ids here go from 0 to 1: change gpu_ids"),
    ],
)
def test_gpus_that_are_not_there_are_named(
    model: Path, monkeypatch: pytest.MonkeyPatch, count: int, words: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(ConfigError, match=words):
        prepare(config(model, gpu_ids="0,0,5"))


def test_what_does_not_fit_into_memory_is_refused_with_what_to_change(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free", lambda _: 100_000)
    with pytest.raises(
        ModelError, match=r"3 ranks on cpu with 32 tokens .* 97\.7 KiB are free, .* too little"
    ):
        prepare(config(model))


def test_a_split_that_leaves_a_rank_without_layers_is_refused(model: Path) -> None:
    with pytest.raises(PlanError, match=r"every stage must own at least one layer"):
        prepare(config(model, layer_split="2,2"))


def test_a_refuted_schedule_is_told_with_its_cycle(model: Path) -> None:
    with pytest.raises(PlanError) as caught:
        prepare(config(model, schedule="batched"))
    story = str(caught.value)
    assert "deadlock with rendezvous sends: rank 0 sends block c0 l0 to rank 1 and waits" in story
    assert story.endswith("Choose another schedule, or pass unsafe=True (--unsafe) to watch it hang.")
    assert not prepare(config(model, schedule="batched", unsafe=True)).verdict.proved


def change(folder: Path, **entries: Any) -> None:
    """Overwrite entries of a checkpoint's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", layers=3)
    weights = folder / "model.safetensors"
    with pytest.raises(ModelError, match=r"folder .* does not exist"):
        prepare(config(tmp_path / "nowhere"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    with pytest.raises(ModelError, match=r"model\.safetensors .* is truncated: .* 10 bytes are missing"):
        prepare(config(folder))
    weights.unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-00001-of-00002.safetensors").write_bytes(whole)
    with pytest.raises(ModelError, match=r"lacks 1 of 2 weight files: model-00002-of-00002\.safetensors"):
        prepare(config(folder))
    change(folder, model_type="gpt_bigcode")
    with pytest.raises(ModelError, match=r"gpt_bigcode"):
        prepare(config(folder))
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json, so it is not a checkpoint\. It holds: "):
        prepare(config(folder))
