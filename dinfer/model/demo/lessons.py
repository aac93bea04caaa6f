"""Training batches for the demo model: facts, then several questions with answers and end tokens.

Only the answers count in the loss. All randomness is seeded by the number of the lesson.
"""

from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dinfer.model.demo.task import FIRST_TRAINING_SEED, LANGUAGES, WORDINGS, Language, recall

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
