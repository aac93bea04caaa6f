"""Trains the demo model and writes its checkpoint: `python -m dinfer.model.demo.train --out DIR --seed 0`.

The same seed and thread count give the same weights on the same machine. Training starts with two facts a prompt and
adds more whenever the model recalls those; without this curriculum it keeps guessing among the facts. A lesson is
facts, then several questions with their answers; only the answers count in the loss.
"""

import argparse
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
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

IGNORED = -100
"""the label that transformers' loss ignores"""

FIRST_SEED = 1_000_000
"""the first seed of prompts for scoring; training does not use them"""

MAX_NEW_TOKENS = 8
"""three digits, the end, and a few more, so that a failure to stop shows"""

POSITIONS = 4096
TOKENS_A_STEP = 4096
END, PAD = "<|endoftext|>", "<|pad|>"

STEPS, LESSONS = 1_000_000, 1_000
"""above the steps of any training and the lessons of any step, so that all lessons have different numbers"""


def lesson(
    number: int, language: Language, facts: int, tokenizer: PreTrainedTokenizerFast
) -> tuple[list[int], list[int]]:
    """Token ids and labels of the lesson of this number: `facts` facts, then up to 8 questions in random order."""
    told = recall(FIRST_TRAINING_SEED + number, language, facts).facts
    gap = WORDINGS[language].gap
    tokens: list[int] = tokenizer.encode(gap.join(fact.sentence for fact in told))
    labels = [IGNORED] * len(tokens)
    for fact in Random(number).sample(told, min(8, facts)):
        question = tokenizer.encode(gap + fact.question)
        answer = [*tokenizer.encode(fact.answer), tokenizer.eos_token_id]
        tokens += [*question, *answer]
        labels += [*([IGNORED] * len(question)), *answer]
    return tokens, labels


def batch(first: int, facts: int, tokens: int, tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Token ids and labels of the lessons from `first` on, each [lessons, length], about `tokens` tokens in all.

    The languages alternate; shorter lessons are padded at the end.
    """
    longest = len(lesson(first, "en", facts, tokenizer)[0])
    numbers = range(first, first + max(2, tokens // longest // 2 * 2))
    made = [lesson(number, LANGUAGES[number % 2], facts, tokenizer) for number in numbers]
    return (
        torch.tensor([ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids, _ in made]),
        torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in made]),
    )


def samples(count: int, language: Language, facts: int = FACTS) -> list[Recall]:
    """`count` prompts that training does not use."""
    return [recall(FIRST_SEED + index, language, facts) for index in range(count)]


def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]) -> list[str]:
    """The text that the model adds to each prompt, with its end token. All prompts must be equally many tokens."""
    tokens = torch.tensor([tokenizer.encode(prompt) for prompt in prompts])
    with torch.inference_mode():
        output: Tensor = model.generate(  # type: ignore[operator]
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


def words() -> list[str]:
    """The words and punctuation marks of the task, which have a token each."""
    english = [f" {name}" for name in WORDINGS["en"].names]
    english += ["The", " The", " code", " of", " is", " What", " the"]
    chinese = [*WORDINGS["zh"].names, "的", "密码", "是", "多少", "。", "？"]
    return [*english, *(f" {digit}" for digit in range(10)), *chinese]


def build(positions: int) -> PreTrainedTokenizerFast:
    """The tokenizer of a model with `positions` positions.

    It has a token for each word of the task and each digit, and bytes for other text, in the byte-level spelling of
    `tokenizers`; it has no merges, so any text comes back unchanged.
    """
    chinese = sorted((re.escape(word) for word in words() if not word.isascii()), key=len, reverse=True)
    pieces = "|".join([" ?[0-9]", " ?[A-Za-z]+", "[.?]", *chinese])
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [END, PAD, *alphabet, *(spell.pre_tokenize_str(word)[0][0] for word in words())]
    ids = {token: index for index, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[], ignore_merges=True))
    cut = pre_tokenizers.Split(Regex(pieces), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, spell])
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        model_max_length=positions,
        clean_up_tokenization_spaces=False,
    )


@dataclass
class Curriculum:
    """The number of facts and the learning rate of each step: more facts when the smoothed loss is small.

    Once the model recalls the most facts, the learning rate falls to zero over the last `polish` steps. `left`: how
    many of those are left, None before.
    """

    fewest_facts: int = 2
    more_facts: int = 2
    most_facts: int = 24
    learned: float = 0.06
    smoothing: float = 0.05
    peak_rate: float = 1.5e-3
    warmup: int = 50
    polish: int = 300
    most_steps: int = 6000
    facts: int = 2
    smoothed: float = 2.3
    step: int = 0
    left: int | None = None

    @property
    def done(self) -> bool:
        """Whether to stop, after the last step or after too many."""
        return self.left == 0 or self.step == self.most_steps

    @property
    def learning_rate(self) -> float:
        """That of the next step: it rises at the start and falls at the end."""
        fading = 1.0 if self.left is None else self.left / self.polish
        return self.peak_rate * fading * min(1.0, (self.step + 1) / self.warmup)

    def draw(self, random: Random) -> int:
        """The number of facts of the next batch: sometimes fewer, so that these are not forgotten."""
        return random.randint(max(self.fewest_facts, (self.facts + 1) // 2), self.facts)

    def learn(self, loss: float) -> None:
        """Update by the loss of one step: go on to more facts or, after the most, to the last steps."""
        self.step += 1
        self.smoothed += self.smoothing * (loss - self.smoothed)
        if self.left is not None:
            self.left -= 1
        elif self.smoothed < self.learned:
            if self.facts == self.most_facts:
                self.left = self.polish
            self.facts = min(self.facts + self.more_facts, self.most_facts)
            self.smoothed = max(self.smoothed, 0.3)


def train(seed: int, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Train a model of six layers with two KV heads, under 4 MiB in float32; prints progress."""
    torch.manual_seed(seed)
    shape = Qwen3Config(
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
    model = Qwen3ForCausalLM(shape)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    curriculum = Curriculum()
    start = time.monotonic()
    while not curriculum.done:
        number = seed * STEPS + curriculum.step + 1
        facts = curriculum.draw(Random(number))
        tokens, labels = batch(number * LESSONS, facts, TOKENS_A_STEP, tokenizer)
        for group in optimizer.param_groups:
            group["lr"] = curriculum.learning_rate
        loss: Tensor = model(input_ids=tokens, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        curriculum.learn(loss.item())
        if curriculum.step % 50 == 0:
            left = "" if curriculum.left is None else f", {curriculum.left} steps left"
            progress = (
                f"{curriculum.facts} facts, loss {curriculum.smoothed:.3f}, {time.monotonic() - start:.0f} s"
            )
            print(f"step {curriculum.step}: {progress}{left}", flush=True)
    model.train(mode=False)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model and write its checkpoint.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer = build(POSITIONS)
    model = train(options.seed, tokenizer)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    for language in LANGUAGES:
        good = sum(recalled(model, tokenizer, samples(100, language)))
        print(f"recall {language}: {good} of 100", flush=True)


if __name__ == "__main__":
    main()
