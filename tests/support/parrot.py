"""A checkpoint that says one thing over and over: for tests of text on its way. Not a test.

What each launcher is tested with: a Chinese prompt in a C locale, answered in characters of 2, 3 and 4 tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.expected_tokens import expected
from tests.support.runs import Run
from tests.support.tiny import tiny_checkpoint

PROMPT = "请详细介绍一下人工智能的发展历史。"
SAYING = "中好😊é。"
"""goes on from the last byte of the prompt"""
NEW_TOKENS = 2 * len(SAYING.encode())
CHUNK = 16
C_LOCALE = {"LC_ALL": "C", "LANG": "C"}
FLAGS: dict[str, Any] = {
    "prompt": PROMPT,
    "chunk_size": CHUNK,
    "max_new_tokens": NEW_TOKENS,
    "log_level": "DEBUG",
}


def check_parroted(run: Run, model: Path) -> None:
    """The run's text is the saying twice, on every rank, wherever it went, and nothing of it is broken."""
    result = run.result()
    ids = AutoTokenizer.from_pretrained(model).encode(PROMPT)
    want = expected(model, tuple(ids), CHUNK, NEW_TOKENS)
    assert result["text"] == SAYING * 2
    assert [(rank["kv_sha256"], rank["tokens"]) for rank in result["ranks"]] == [tuple(want)] * len(
        result["ranks"]
    )
    assert f"\n{SAYING * 2}\n" in run.out
    kept = [*run.logs.glob("*.log"), run.logs / "trace.jsonl", run.folder / "result.json"]
    assert len(kept) >= 3
    for text in (run.out, run.err, *(file.read_text(encoding="utf-8") for file in kept)):
        assert "\ufffd" not in text
        assert r"\ufffd" not in text.lower()


def parrot_checkpoint(folder: Path, saying: str) -> Path:
    """Write a model of which each token says the next one of `saying`, byte by byte and round in a circle.

    No byte may occur twice in `saying`. Attention and MLP are switched off, so the last token alone decides.
    """
    tiny_checkpoint(folder, layers=3, tokenizer=True)
    tokens = AutoTokenizer.from_pretrained(folder).encode(saying)
    assert len(set(tokens)) == len(tokens)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
                weight.zero_()
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        model.model.norm.weight.fill_(1.0)
        for token, following in zip(tokens, [*tokens[1:], tokens[0]], strict=True):
            head[following] = embedding[token] / embedding[token].norm()
    model.save_pretrained(folder)
    return folder
