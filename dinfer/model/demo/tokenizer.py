"""Builds the demo model's tokenizer: a token for each word of the task and each digit, and bytes for other text.

It has no merges: text that is not a known word becomes bytes, so any text can be encoded and decoded unchanged.
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
