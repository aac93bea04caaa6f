"""Asks a model for facts in its prompt and says which it recalled.

Decoding is greedy, and an answer is right only if the model stops by itself after it.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dinfer.model.demo.task import FACTS, Language, Recall, recall

FIRST_SEED = 1_000_000
"""Where the seeds of prompts for scoring start; no training used them."""

ROOM = 8
"""New tokens at most: three digits, the end, and a few more so that a failure to stop shows."""


def samples(count: int, language: Language, facts: int = FACTS) -> list[Recall]:
    """So many prompts that no training used."""
    return [recall(FIRST_SEED + index, language, facts) for index in range(count)]


def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]) -> list[str]:
    """What the model adds to each prompt, its end token included.

    All prompts must have the same length in tokens.
    """
    tokens = torch.tensor([tokenizer.encode(prompt) for prompt in prompts])
    with torch.inference_mode():
        output: torch.Tensor = model.generate(  # type: ignore[operator]
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=ROOM, do_sample=False
        )
    said = [str(tokenizer.decode(row)) for row in output[:, tokens.shape[1] :]]
    return [text.replace(str(tokenizer.pad_token), "") for text in said]


def recalled(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, asked: Sequence[Recall]
) -> list[bool]:
    """For each prompt, whether the model added exactly the answer and then stopped."""
    said = answers(model, tokenizer, [one.prompt for one in asked])
    return [text == f"{one.answer}{tokenizer.eos_token}" for text, one in zip(said, asked, strict=True)]
