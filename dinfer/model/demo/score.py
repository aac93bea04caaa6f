"""Scores a model by the facts of its prompts that it recalls.

Decoding is greedy. An answer is correct only if the model ends the text after it.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dinfer.model.demo.task import FACTS, Language, Recall, recall

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
