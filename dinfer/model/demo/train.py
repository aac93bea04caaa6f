"""Trains the demo model and writes its checkpoint: `python -m dinfer.model.demo.train --out DIR --seed 0`.

The same seed and thread count give the same weights on the same machine. Training starts with two facts a prompt and
adds more whenever the model recalls those; without this curriculum it keeps guessing among the facts.
"""

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dinfer.model.demo.lessons import batch
from dinfer.model.demo.score import recalled, samples
from dinfer.model.demo.task import LANGUAGES
from dinfer.model.demo.tokenizer import build

POSITIONS = 4096

STEPS, LESSONS = 1_000_000, 1_000
"""above the steps of any training and the lessons of any step, so that all lessons have different numbers"""

SCORED = 100
"""prompts in each language for scoring the trained model"""


@dataclass(frozen=True)
class Recipe:
    """The parameters of training."""

    learning_rate: float = 1.5e-3
    warmup: int = 50
    tokens: int = 4096
    first_facts: int = 2
    more_facts: int = 2
    most_facts: int = 24
    learned: float = 0.06
    smoothing: float = 0.05
    polish: int = 300
    most_steps: int = 6000


@dataclass
class Curriculum:
    """The number of facts and the learning rate of each step: more facts when the smoothed loss is small.

    Once the model recalls the most facts, the learning rate falls to zero over the last `polish` steps.
    """

    recipe: Recipe
    facts: int = field(init=False)
    smoothed: float = 2.3
    step: int = 0
    left: int | None = None

    def __post_init__(self) -> None:
        self.facts = self.recipe.first_facts

    @property
    def done(self) -> bool:
        """Whether to stop, after the last step or after too many."""
        return self.left == 0 or self.step == self.recipe.most_steps

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step: it rises at the start and falls at the end."""
        fading = 1.0 if self.left is None else self.left / self.recipe.polish
        return self.recipe.learning_rate * fading * min(1.0, (self.step + 1) / self.recipe.warmup)

    def draw(self, random: Random) -> int:
        """The number of facts of the next batch: sometimes fewer, so that these are not forgotten."""
        return random.randint(max(self.recipe.first_facts, (self.facts + 1) // 2), self.facts)

    def learn(self, loss: float) -> None:
        """Update by the loss of one step."""
        self.step += 1
        self.smoothed += self.recipe.smoothing * (loss - self.smoothed)
        if self.left is not None:
            self.left -= 1
        elif self.smoothed < self.recipe.learned:
            self.advance()

    def advance(self) -> None:
        """Go on to more facts or, after the most, to the last steps."""
        if self.facts == self.recipe.most_facts:
            self.left = self.recipe.polish
        self.facts = min(self.facts + self.recipe.more_facts, self.recipe.most_facts)
        self.smoothed = max(self.smoothed, 0.3)


def shape(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """Six layers with two KV heads, under 4 MiB in float32."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def train(recipe: Recipe, seed: int, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Train a model; prints progress."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(shape(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    curriculum = Curriculum(recipe)
    start = time.monotonic()
    while not curriculum.done:
        number = seed * STEPS + curriculum.step + 1
        facts = curriculum.draw(Random(number))
        tokens, labels = batch(number * LESSONS, facts, recipe.tokens, tokenizer)
        loss = descend(model, optimizer, curriculum.learning_rate, tokens, labels)
        curriculum.learn(loss)
        if curriculum.step % 50 == 0:
            report(curriculum, time.monotonic() - start)
    model.train(mode=False)
    return model


def descend(
    model: Qwen3ForCausalLM,
    optimizer: torch.optim.Optimizer,
    learning_rate: float,
    tokens: torch.Tensor,
    labels: torch.Tensor,
) -> float:
    """One step of the optimizer; returns the loss before it."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    loss: torch.Tensor = model(input_ids=tokens, labels=labels, use_cache=False).loss
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def report(curriculum: Curriculum, seconds: float) -> None:
    """Print one line of progress."""
    left = "" if curriculum.left is None else f", {curriculum.left} steps left"
    progress = f"{curriculum.facts} facts, loss {curriculum.smoothed:.3f}, {seconds:.0f} s{left}"
    print(f"step {curriculum.step}: {progress}", flush=True)


def score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Print how many unseen prompts of each language the model answers correctly."""
    for language in LANGUAGES:
        good = sum(recalled(model, tokenizer, samples(SCORED, language)))
        print(f"recall {language}: {good} of {SCORED}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model and write its checkpoint.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer = build(POSITIONS)
    model = train(Recipe(), options.seed, tokenizer)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    score(model, tokenizer)


if __name__ == "__main__":
    main()
