"""Builds the demo model's tokenizer: a token for each word of the task and each digit, bytes for other text.

There are no merges: a piece of text that is not a known word becomes its bytes, so any text comes back
unchanged.
"""

import re

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dinfer.model.demo.task import WORDINGS

END = "<|endoftext|>"

PAD = "<|pad|>"

ENGLISH = r" ?[A-Za-z]+"

DIGIT = r" ?[0-9]"


def words() -> list[str]:
    """The words and marks of the task that get a token of their own."""
    english = [f" {name}" for name in WORDINGS["en"].names]
    english += ["The", " The", " code", " of", " is", " What", " the"]
    chinese = [*WORDINGS["zh"].names, "的", "密码", "是", "多少", "。", "？"]
    return [*english, *(f" {digit}" for digit in range(10)), *chinese]


def pieces() -> str:
    """The regular expression of what the text is cut into; what it does not match stays together."""
    chinese = sorted((re.escape(word) for word in words() if not word.isascii()), key=len, reverse=True)
    return "|".join([DIGIT, ENGLISH, r"[.?]", *chinese])


def vocabulary() -> dict[str, int]:
    """Bytes, words and the two special tokens, in the byte-level spelling of `tokenizers`."""
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelled = [spell.pre_tokenize_str(word)[0][0] for word in words()]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return {token: index for index, token in enumerate([END, PAD, *alphabet, *spelled])}


def build(positions: int) -> PreTrainedTokenizerFast:
    """The tokenizer of a model with so many positions."""
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
