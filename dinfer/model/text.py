"""Text and token ids: a checkpoint's tokenizer, encoding a prompt, streaming new tokens as text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dinfer.errors import ModelError
from dinfer.model.checkpoint import has_tokenizer, in_one_line, resolve

_REPLACEMENT = "\ufffd"  # what a tokenizer decodes the bytes of an unfinished character to


def load_tokenizer(path: str | Path) -> Any | None:
    """The tokenizer of a checkpoint, None if it has none. Raises `ModelError` if it cannot be loaded."""
    folder = resolve(path)
    if not has_tokenizer(folder):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (KeyboardInterrupt, SystemExit):
        raise
    # The tokenizers library raises bare Exception, and where it panics even less.
    except BaseException as error:
        raise ModelError(f"the tokenizer in {folder} cannot be loaded: {in_one_line(error)}") from error


def encode(tokenizer: Any | None, prompt: str, chat: bool = False) -> list[int]:
    """The token ids of `prompt`; with `chat`, of a conversation with `prompt` as the user's message.

    Raises `ModelError` without a tokenizer, without a chat template for `chat`, and for a prompt of no tokens.
    """
    if tokenizer is None:
        raise ModelError("this checkpoint has no tokenizer, so give token ids instead of text")
    if chat and not _has_template(tokenizer):
        raise ModelError("this tokenizer has no chat template; encode the prompt as plain text (chat=False)")
    try:
        ids = [int(token) for token in (_chat_ids if chat else _plain_ids)(tokenizer, prompt)]
    except (KeyboardInterrupt, SystemExit):
        raise
    # A template is a program and may raise anything; the tokenizers library may panic.
    except BaseException as error:
        what = "chat template failed" if chat else "encoding of the prompt failed"
        advice = "; encode the prompt as plain text (chat=False)" * chat
        raise ModelError(f"this tokenizer's {what}: {in_one_line(error)}{advice}") from error
    if not ids:
        raise ModelError("the prompt is empty: it must have at least one token")
    return ids


def _has_template(tokenizer: Any) -> bool:
    """Whether it can lay out a chat. That of tekken.json (mistral-common) does so without a template."""
    return (
        bool(getattr(tokenizer, "chat_template", None)) or type(tokenizer).__name__ == "MistralCommonBackend"
    )


def _chat_ids(tokenizer: Any, prompt: str) -> Any:
    # Ids and not text: that of tekken.json does not read its control tokens from text.
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False
    )


def _plain_ids(tokenizer: Any, prompt: str) -> Any:
    return tokenizer.encode(prompt, add_special_tokens=True)


class TextStream:
    """Turns new tokens into text as they come, in whole characters only.

    A character may be split over tokens (Chinese, emoji, byte fallback): its text comes with its last token. Tokens are
    decoded together with those of the piece before, since a tokenizer may write a token differently at the start of a
    text, as in vLLM and text-generation-inference. `tokenizers.DecodeStream` returns the same pieces, but not what it
    still holds when the tokens end, and it takes only tokenizers of its own library.
    """

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._shown: list[int] = []  # the tokens of the last piece that came out: context only
        self._held: list[int] = []  # the tokens whose text has not come out yet

    def push(self, token_id: int) -> str:
        """Take one token; return the text that is complete now, which may be empty."""
        self._held.append(int(token_id))
        text = self._held_text()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        self._shown, self._held = self._held, []
        return text

    def flush(self) -> str:
        """Return what is still held, but for a character that was never finished, and hold nothing."""
        text = self._held_text().rstrip(_REPLACEMENT)
        if self._held:
            # Not a context for what follows: its last character is none.
            self._shown, self._held = [], []
        return text

    def _held_text(self) -> str:
        before, all_of_it = (
            self._tokenizer.decode(ids, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False)
            for ids in (self._shown, self._shown + self._held)
        )
        return str(all_of_it)[len(str(before)) :]


def texts_of(tokenizer: Any | None, ids: Sequence[int], ranges: Sequence[range]) -> list[str]:
    """The text of each range of `ids`, in whole characters; empty texts without a tokenizer."""
    if tokenizer is None:
        return [""] * len(ranges)
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids]
    return ["".join(pieces[rows.start : rows.stop]) for rows in ranges]
