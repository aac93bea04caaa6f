"""Sampling: greedy, transformers' warpers, and draws that depend on seed and step alone."""

from collections import Counter

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from dinfer.errors import ModelError
from dinfer.model.sampling import Sampler, Sampling

LOGITS = torch.tensor([0.5, 2.0, -1.0, 1.5, 1.9, -3.0])


def draws(sampling: Sampling, count: int = 2000) -> Counter[int]:
    """Return how often each token came in `count` steps."""
    sampler = Sampler(sampling)
    return Counter(sampler(LOGITS, step) for step in range(count))


def test_greedy_takes_the_largest() -> None:
    assert Sampler(Sampling())(LOGITS, 0) == 1
    assert Sampler(Sampling(temperature=0.0, top_k=2, seed=9))(LOGITS.bfloat16(), 5) == 1


@pytest.mark.parametrize("temperature", [1e-30, 1e-39, 5e-324])
def test_a_temperature_that_overflows_is_greedy(temperature: float) -> None:
    assert draws(Sampling(temperature=temperature), 20) == Counter({1: 20})
    assert draws(Sampling(temperature=temperature, top_k=3, top_p=0.9), 20) == Counter({1: 20})


def test_draws_follow_the_probabilities() -> None:
    expected = (LOGITS / 0.8).softmax(-1)
    counts = draws(Sampling(temperature=0.8))
    for token, probability in enumerate(expected.tolist()):
        assert abs(counts[token] / 2000 - probability) < 0.04


@pytest.mark.parametrize(
    "sampling", [Sampling(1.0, top_k=2), Sampling(1.3, top_p=0.7), Sampling(2.0, top_k=4, top_p=0.9)]
)
def test_only_tokens_that_transformers_keeps_are_drawn(sampling: Sampling) -> None:
    scores = TemperatureLogitsWarper(sampling.temperature)(None, LOGITS[None])
    scores = TopKLogitsWarper(sampling.top_k or len(LOGITS))(None, scores)
    scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    kept = set(scores[0].isfinite().nonzero().flatten().tolist())
    assert set(draws(sampling)) == kept
    assert len(kept) < len(LOGITS)


def test_a_draw_depends_on_seed_and_step_alone() -> None:
    sampling = Sampling(temperature=1.0, seed=3)
    torch.manual_seed(0)
    forwards = [Sampler(sampling)(LOGITS, step) for step in range(50)]
    torch.manual_seed(1)
    one = Sampler(sampling)
    assert [one(LOGITS, step) for step in reversed(range(50))] == forwards[::-1]
    assert [Sampler(Sampling(1.0, seed=4))(LOGITS, step) for step in range(50)] != forwards
    assert len(set(forwards)) > 2


def test_seed_and_step_do_not_stand_for_each_other() -> None:
    shifted = [Sampler(Sampling(1.0, seed=seed))(LOGITS, 0) for seed in range(50)]
    assert shifted != [Sampler(Sampling(1.0, seed=0))(LOGITS, step) for step in range(50)]


def test_a_draw_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    Sampler(Sampling(1.0))(LOGITS, 0)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0: give 0 for greedy"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1: give 0 for no limit"),
        ({"top_p": 0.0}, "top_p=0.0: give a probability above 0"),
        ({"top_p": 1.5}, "top_p=1.5"),
    ],
)
def test_impossible_parameters_are_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Sampling(**wrong)  # type: ignore[arg-type]
