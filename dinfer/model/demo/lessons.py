"""Training batches for the demo model: facts, then several questions, each answered and ended.

Only the answers count in the loss. Everything random here comes from the number of the lesson.
"""

from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dinfer.model.demo.task import FIRST_TRAINING_SEED, LANGUAGES, WORDINGS, Language, recall

QUESTIONS = 8
"""At most so many of a lesson's facts are asked for."""

IGNORED = -100
"""The label that transformers leaves out of its loss."""


@dataclass(frozen=True)
class Lesson:
    """One sequence and its labels, equally long."""

    tokens: list[int]
    labels: list[int]


def lesson(number: int, language: Language, facts: int, tokenizer: PreTrainedTokenizerFast) -> Lesson:
    """The lesson of this number: so many facts, then questions for some of them in random order."""
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
    """Tokens and labels, each [lessons, length] and of about `tokens` tokens, of the lessons from `first` on.

    The languages take turns; shorter lessons are padded at the end.
    """
    longest = len(lesson(first, "en", facts, tokenizer).tokens)
    numbers = range(first, first + max(2, tokens // longest // 2 * 2))
    made = [lesson(number, LANGUAGES[number % 2], facts, tokenizer) for number in numbers]
    return (
        torch.tensor([one.tokens + [tokenizer.pad_token_id] * (longest - len(one.tokens)) for one in made]),
        torch.tensor([one.labels + [IGNORED] * (longest - len(one.labels)) for one in made]),
    )
