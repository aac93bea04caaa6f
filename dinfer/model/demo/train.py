"""Trains the demo model and writes its checkpoint: `python -m dinfer.model.demo.train --out DIR --seed 0`.

The same seed and thread count give the same weights on the same machine. Training starts with two facts a prompt and
adds more whenever the model recalls those; without this curriculum it keeps guessing among the facts. A lesson is
facts, then several
questions with their answers; only the answers count in the loss. The tokenizer has a token for each word of the task
and each digit, and bytes for other text; it has no merges, so any text can be encoded and decoded unchanged.
"""

import argparse
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dinfer.model.demo.task import FACTS, FIRST_TRAINING_SEED, LANGUAGES, WORDINGS, Language, Recall, recall

QUESTIONS = 8
"""the most questions of one lesson"""

IGNORED = -100
"""the label that transformers' loss ignores"""


@dataclass(frozen=True)
class Lesson:
    """One sequence of token ids, and its labels, of the same length."""

    tokens: list[int]
    labels: list[int]


def lesson(number: int, language: Language, facts: int, tokenizer: PreTrainedTokenizerFast) -> Lesson:
    """The lesson of this number: `facts` facts, then questions about some of them in random order."""
    told = recall(FIRST_TRAINING_SEED + number, language, facts).facts
    gap = WORDINGS[language].gap
    tokens: list[int] = tokenizer.encode(gap.join(fact.sentence for fact in told))
    labels = [IGNORED] * len(tokens)
    for fact in Random(number).sample(told, min(QUESTIONS, facts)):
        question = tokenizer.encode(gap + fact.question)
        answer = [*tokenizer.encode(fact.answer), tokenizer.eos_token_id]
        tokens += [*question, *answer]
        labels += [*([IGNORED] * len(question)), *answer]
    return Lesson(tokens, labels)


def batch(first: int, facts: int, tokens: int, tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Token ids and labels of the lessons from `first` on, each [lessons, length], about `tokens` tokens in all.

    The languages alternate; shorter lessons are padded at the end.
    """
    longest = len(lesson(first, "en", facts, tokenizer).tokens)
    numbers = range(first, first + max(2, tokens // longest // 2 * 2))
    made = [lesson(number, LANGUAGES[number % 2], facts, tokenizer) for number in numbers]
    return (
        torch.tensor([one.tokens + [tokenizer.pad_token_id] * (longest - len(one.tokens)) for one in made]),
        torch.tensor([one.labels + [IGNORED] * (longest - len(one.labels)) for one in made]),
    )


FIRST_SEED = 1_000_000
"""the first seed of prompts for scoring; training does not use them"""

MAX_NEW_TOKENS = 8
"""three digits, the end, and a few more, so that a failure to stop shows"""


def samples(count: int, language: Language, facts: int = FACTS) -> list[Recall]:
    """`count` prompts that training does not use."""
    return [recall(FIRST_SEED + index, language, facts) for index in range(count)]


def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]) -> list[str]:
    """The text that the model adds to each prompt, with its end token.

    All prompts must have the same length in tokens.
    """
    tokens = torch.tensor([tokenizer.encode(prompt) for prompt in prompts])
    with torch.inference_mode():
        output: torch.Tensor = model.generate(  # type: ignore[operator]
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=MAX_NEW_TOKENS, do_sample=False
        )
    texts = [str(tokenizer.decode(row)) for row in output[:, tokens.shape[1] :]]
    return [text.replace(str(tokenizer.pad_token), "") for text in texts]


def recalled(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, asked: Sequence[Recall]
) -> list[bool]:
    """For each prompt, whether the model added exactly the answer and then stopped."""
    texts = answers(model, tokenizer, [one.prompt for one in asked])
    return [text == f"{one.answer}{tokenizer.eos_token}" for text, one in zip(texts, asked, strict=True)]


END = "<|endoftext|>"

PAD = "<|pad|>"

ENGLISH = r" ?[A-Za-z]+"

DIGIT = r" ?[0-9]"


def words() -> list[str]:
    """The words and punctuation marks of the task, which have a token each."""
    english = [f" {name}" for name in WORDINGS["en"].names]
    english += ["The", " The", " code", " of", " is", " What", " the"]
    chinese = [*WORDINGS["zh"].names, "的", "密码", "是", "多少", "。", "？"]
    return [*english, *(f" {digit}" for digit in range(10)), *chinese]


def pieces() -> str:
    """A regular expression that splits text into words; text that it does not match stays together."""
    chinese = sorted((re.escape(word) for word in words() if not word.isascii()), key=len, reverse=True)
    return "|".join([DIGIT, ENGLISH, r"[.?]", *chinese])


def vocabulary() -> dict[str, int]:
    """The token ids of bytes, words and the two special tokens, in the byte-level spelling of `tokenizers`."""
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelled = [spell.pre_tokenize_str(word)[0][0] for word in words()]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return {token: index for index, token in enumerate([END, PAD, *alphabet, *spelled])}


def build(positions: int) -> PreTrainedTokenizerFast:
    """The tokenizer of a model with `positions` positions."""
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary(), merges=[], ignore_merges=True))
    cut = pre_tokenizers.Split(Regex(pieces()), behavior="isolated")
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, spell])
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        model_max_length=positions,
        clean_up_tokenization_spaces=False,
    )


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
