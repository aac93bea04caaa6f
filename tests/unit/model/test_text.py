"""Tokenizers, prompts and text streams, with a tokenizer of one token a byte."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinfer.errors import ModelError
from dinfer.model.text import TextStream, encode, load_tokenizer
from tests.support.tiny import byte_tokenizer, tiny_checkpoint

TOKENIZER = byte_tokenizer()
END = TOKENIZER.eos_token_id


def pieces(text: str) -> list[str]:
    """Return what comes out for each byte of `text`."""
    stream = TextStream(TOKENIZER)
    return [stream.push(token) for token in encode(TOKENIZER, text)]


def test_a_character_comes_out_with_its_last_byte() -> None:
    assert pieces("a你b") == ["a", "", "", "你", "b"]
    assert pieces("👩‍💻") == ["", "", "", "👩", "", "", "\u200d", "", "", "", "💻"]


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab é你好，世界🙂👩‍💻\n", min_size=1))
def test_the_stream_is_the_text_in_whole_characters(text: str) -> None:
    out = pieces(text)
    assert "".join(out) == text
    assert "\ufffd" not in "".join(out)


def test_flush_drops_a_character_that_was_never_finished_and_starts_afresh() -> None:
    first, second, third = encode(TOKENIZER, "你")
    stream = TextStream(TOKENIZER)
    assert [stream.push(first), stream.push(second), stream.flush()] == ["", "", ""]
    assert stream.flush() == ""
    assert [stream.push(first), stream.push(second), stream.push(third)] == ["", "", "你"]
    assert stream.flush() == ""


def test_bytes_that_make_no_character_do_not_stop_the_stream() -> None:
    broken = encode(TOKENIZER, "你")[0]
    stream = TextStream(TOKENIZER)
    assert stream.push(broken) == ""
    assert stream.push(encode(TOKENIZER, "a")[0]) == "\ufffda"
    assert stream.push(encode(TOKENIZER, "b")[0]) == "b"


def test_special_tokens_are_left_out_unless_asked_for() -> None:
    ids = [*encode(TOKENIZER, "ab"), END, *encode(TOKENIZER, "c")]
    stream = TextStream(TOKENIZER)
    assert [stream.push(token) for token in ids] == ["a", "b", "", "c"]
    shown = TextStream(TOKENIZER, skip_special_tokens=False)
    assert [shown.push(token) for token in ids] == ["a", "b", "<|end|>", "c"]


def test_chat_goes_through_the_template() -> None:
    ids = encode(TOKENIZER, "hi", chat=True)
    assert TOKENIZER.decode(ids) == "<|user|>hi\n<|assistant|>"
    assert ids[0] == TOKENIZER.convert_tokens_to_ids("<|user|>")


def test_prompts_that_cannot_be_encoded_are_refused() -> None:
    with pytest.raises(ModelError, match="no tokenizer, so give token ids"):
        encode(None, "hi")
    with pytest.raises(ModelError, match="the prompt is empty"):
        encode(TOKENIZER, "")
    plain = byte_tokenizer()
    plain.chat_template = None
    with pytest.raises(ModelError, match="no chat template; encode the prompt as plain text"):
        encode(plain, "hi", chat=True)


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('a system message is needed') }}", {"tool_use": "{{ 1 }}"}]
)
def test_a_chat_template_that_fails_is_no_traceback(template: Any) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(
        ModelError, match=r"chat template failed: .*encode the prompt as plain text \(chat=False\)"
    ):
        encode(tokenizer, "x", chat=True)


def test_a_tekken_tokenizer_streams_and_lays_out_chats(tmp_path: Path) -> None:
    data = Path(pytest.importorskip("mistral_common").__file__).parent / "data"
    shutil.copy(data / "tekken_240911.json", tmp_path / "tekken.json")
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}', encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    text = "Lima is 471. 中文 🙂!"
    stream = TextStream(tokenizer)
    assert "".join([*map(stream.push, encode(tokenizer, text)), stream.flush()]) == text
    begin, open_, *hello, close = encode(tokenizer, "hello", chat=True)
    assert [begin, open_, close] == [1, 3, 4]
    assert hello == encode(tokenizer, "hello")[1:]


def test_load_tokenizer_reads_what_the_checkpoint_has(tmp_path: Path, folder: Path) -> None:
    assert load_tokenizer(folder) is None
    path = tiny_checkpoint(tmp_path / "with", "llama", layers=1, tokenizer=True)
    tokenizer = load_tokenizer(path)
    assert tokenizer is not None
    assert encode(tokenizer, "né", chat=True) == encode(TOKENIZER, "né", chat=True)
    (path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"the tokenizer in .* cannot be loaded"):
        load_tokenizer(path)
