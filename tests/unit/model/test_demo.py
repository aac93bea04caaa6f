"""The shipped demo checkpoint: small, loads offline like any other, and answers from its prompt alone."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from dinfer.model.demo import CHECKPOINT
from dinfer.model.demo.task import (
    FIRST_TRAINING_SEED,
    LANGUAGES,
    WORDINGS,
    Language,
    Recall,
    demo_prompt,
    recall,
)
from dinfer.model.demo.train import (
    IGNORED,
    MAX_NEW_TOKENS,
    Curriculum,
    answers,
    batch,
    build,
    lesson,
    recalled,
    samples,
    words,
)

MEBIBYTE = 1 << 20
LOOKUP_LAYER = 1
"""the layer of the shipped weights that looks facts up: without its block of a fact, the answer is wrong"""
TEXTS = {
    "emoji": "a 🙂 b 👩🏽‍🚀 and 🇨🇳",
    "chinese": "请详细介绍一下人工智能的发展历史。",
    "html": "<div class='a'>The code&nbsp;of <b>Lima</b></div>\n<!-- 471 -->",
    "control": "\x00\x01\t\r\n \x1b[31m\x7f\u2028\ufeff",
    "spaces": "  The  code of \u00a0Lima is  4 7 1 .  ",
    "near words": "islands codes Limas 1234567 利马罗马的的密 code.of.is?",
    "accents": "Zürich e\u0301 naïve Ωμέγα",
    "empty": "",
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(CHECKPOINT, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, local_files_only=True)


def with_lost_block(model: Any, tokenizer: Any, told: Recall, layers: range) -> str:
    """What decode says after a prefill whose KV of the asked fact is then lost (zero) in these layers."""
    tokens = tokenizer(told.prompt, return_tensors="pt").input_ids
    per_fact = len(tokenizer.encode(f"{WORDINGS['en'].gap}{told.facts[0].sentence}"))
    lost = slice(told.asked * per_fact, (told.asked + 1) * per_fact)
    cache: Any = DynamicCache()
    said: list[int] = []
    with torch.inference_mode():
        logits = model(tokens, past_key_values=cache, use_cache=True).logits
        for layer in layers:
            cache.layers[layer].keys[:, :, lost] = 0
            cache.layers[layer].values[:, :, lost] = 0
        while len(said) < 4:
            said.append(int(logits[0, -1].argmax()))
            logits = model(torch.tensor([said[-1:]]), past_key_values=cache, use_cache=True).logits
    return str(tokenizer.decode(said)).removesuffix(tokenizer.eos_token)


def altered(one: Recall, code: str) -> Recall:
    """The same question, where the fact asked for has another code."""
    changed = replace(one.facts[one.asked], code=code)
    return replace(one, facts=(*one.facts[: one.asked], changed, *one.facts[one.asked + 1 :]))


class TestTask:
    def test_same_seed_same_prompt(self) -> None:
        assert recall(7, "en") == recall(7, "en")
        assert recall(7, "en") != recall(8, "en")

    def test_wording_is_for_people(self) -> None:
        english, chinese = recall(7, "en", facts=1), recall(7, "zh", facts=1)
        name, code = english.facts[0].name, english.facts[0].code
        assert english.prompt == (
            f"The code of {name} is {code}. What is the code of {name}? The code of {name} is"
        )
        assert english.answer == f" {code}"
        name = chinese.facts[0].name
        assert chinese.prompt == f"{name}的密码是{code}。{name}的密码是多少\uff1f{name}的密码是"
        assert chinese.answer == code

    @pytest.mark.parametrize("language", LANGUAGES)
    def test_names_and_codes_differ(self, language: Language) -> None:
        facts = recall(3, language, facts=40).facts
        assert len({fact.name for fact in facts}) == len({fact.code for fact in facts}) == 40

    def test_ask_for_another_fact(self) -> None:
        told = demo_prompt()
        assert told.ask(-1).asked == 15

    @pytest.mark.parametrize("facts", [0, 41])
    def test_impossible_number_of_facts(self, facts: int) -> None:
        with pytest.raises(ValueError, match="from 1 to 40"):
            recall(0, "zh", facts)


class TestTokenizer:
    @pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
    def test_round_trip(self, tokenizer: Any, text: str) -> None:
        assert tokenizer.decode(tokenizer.encode(text)) == text

    def test_every_word_is_one_token(self, tokenizer: Any) -> None:
        assert [len(tokenizer.encode(word)) for word in words()] == [1] * len(words())

    def test_ids_have_no_gaps(self, tokenizer: Any) -> None:
        assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))

    @pytest.mark.parametrize("language", LANGUAGES)
    def test_prompt_length(self, tokenizer: Any, language: Language) -> None:
        lengths = {len(tokenizer.encode(one.prompt)) for one in samples(20, language)}
        assert lengths == {156 if language == "en" else 138}

    def test_shipped_is_what_is_built(self, tokenizer: Any) -> None:
        built = build(tokenizer.model_max_length)
        assert json.loads(tokenizer.backend_tokenizer.to_str()) == json.loads(
            built.backend_tokenizer.to_str()
        )


class TestTraining:
    @pytest.mark.parametrize("language", LANGUAGES)
    def test_lesson_continues_the_prompt(self, language: Language) -> None:
        tokenizer = build(4096)
        told = recall(FIRST_TRAINING_SEED + 5, language, facts=4)
        tokens, _ = lesson(5, language, 4, tokenizer)
        prompts = [tokenizer.encode(told.ask(i).prompt + told.ask(i).answer) for i in range(4)]
        assert [prompt for prompt in prompts if tokens[: len(prompt)] == prompt]

    def test_only_answers_count(self) -> None:
        tokenizer = build(4096)
        tokens, labels = lesson(5, "en", 3, tokenizer)
        counted = [label for label in labels if label != IGNORED]
        assert len(counted) == 3 * 4
        assert counted.count(tokenizer.eos_token_id) == 3
        assert all(label in (IGNORED, token) for token, label in zip(tokens, labels, strict=True))

    def test_batch_is_padded(self) -> None:
        tokens, labels = batch(0, 2, 200, build(4096))
        assert tokens.shape == labels.shape == (4, 50)

    def test_curriculum_grows_then_stops(self) -> None:
        curriculum = Curriculum(most_facts=4, polish=10)
        seen = []
        while not curriculum.done:
            curriculum.learn(0.0)
            seen.append((curriculum.facts, curriculum.learning_rate))
        assert [facts for facts, _ in seen] == sorted(facts for facts, _ in seen)
        assert seen[-1] == (4, 0.0)
        assert curriculum.step < 1000

    def test_curriculum_gives_up(self) -> None:
        curriculum = Curriculum(most_steps=20)
        while not curriculum.done:
            curriculum.learn(2.3)
        assert (curriculum.step, curriculum.facts) == (20, 2)


class TestCheckpoint:
    def test_size(self) -> None:
        assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) <= 4 * MEBIBYTE

    def test_shape_and_weights(self, model: Any, tokenizer: Any) -> None:
        config = model.config
        assert config.model_type == "qwen3"
        assert (config.num_hidden_layers, config.num_key_value_heads) == (6, 2)
        assert config.max_position_embeddings >= 4096
        assert config.vocab_size == len(tokenizer)
        with safe_open(CHECKPOINT / "model.safetensors", framework="pt") as file:
            assert {file.get_tensor(name).dtype for name in list(file.keys())} == {torch.float32}
        assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())

    def test_files_and_the_end(self, tokenizer: Any) -> None:
        configs = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
        assert {file.name for file in CHECKPOINT.iterdir()} == {"model.safetensors", *configs}
        generation = json.loads((CHECKPOINT / "generation_config.json").read_text())
        assert generation["eos_token_id"] == tokenizer.eos_token_id

    def test_package_imports_no_torch(self) -> None:
        for name in ("__init__.py", "task.py"):
            source = (CHECKPOINT.parent / name).read_text()
            assert not re.search(r"^(from|import) (torch|transformers)", source, re.MULTILINE)


class TestRecall:
    @pytest.mark.parametrize("language", LANGUAGES)
    def test_demo_prompt(self, model: Any, tokenizer: Any, language: Language) -> None:
        assert recalled(model, tokenizer, [demo_prompt(language)]) == [True]

    def test_sample(self, model: Any, tokenizer: Any) -> None:
        good = [ok for language in LANGUAGES for ok in recalled(model, tokenizer, samples(20, language))]
        assert sum(good) >= 38, f"{sum(good)} of 40"

    @pytest.mark.slow
    def test_two_hundred(self, model: Any, tokenizer: Any) -> None:
        good = [ok for language in LANGUAGES for ok in recalled(model, tokenizer, samples(100, language))]
        assert sum(good) >= 190, f"{sum(good)} of 200"

    @pytest.mark.slow
    @pytest.mark.parametrize("language", LANGUAGES)
    @pytest.mark.parametrize("facts", [1, 2, 4, 8, 12, 20])
    def test_other_lengths(self, model: Any, tokenizer: Any, language: Language, facts: int) -> None:
        good = recalled(model, tokenizer, samples(40, language, facts))
        assert sum(good) >= 38, f"{sum(good)} of 40 with {facts} facts"

    @pytest.mark.parametrize("language", LANGUAGES)
    def test_every_place_in_the_prompt(self, model: Any, tokenizer: Any, language: Language) -> None:
        told = demo_prompt(language)
        good = recalled(model, tokenizer, [told.ask(i) for i in range(len(told.facts))])
        assert sum(good) >= 15, good

    @pytest.mark.parametrize("language", LANGUAGES)
    def test_answer_follows_the_fact(self, model: Any, tokenizer: Any, language: Language) -> None:
        told = [altered(one, f"{(i * 37 + 5) % 1000:03}") for i, one in enumerate(samples(20, language))]
        assert sum(recalled(model, tokenizer, told)) >= 19

    @pytest.mark.parametrize("language", LANGUAGES)
    def test_no_answer_without_the_fact(self, model: Any, tokenizer: Any, language: Language) -> None:
        told = samples(20, language)
        gap = WORDINGS[language].gap
        without = [one.prompt.replace(one.facts[one.asked].sentence + gap, "") for one in told]
        said = answers(model, tokenizer, without)
        assert not [one.prompt for one, text in zip(told, said, strict=True) if text.startswith(one.answer)]

    @pytest.mark.parametrize("language", LANGUAGES)
    def test_stops_by_itself(self, model: Any, tokenizer: Any, language: Language) -> None:
        prompt = tokenizer(demo_prompt(language).prompt, return_tensors="pt")
        output = model.generate(**prompt, max_new_tokens=50, do_sample=False)
        said = output[0, prompt.input_ids.shape[1] :]
        assert len(said) == 4 < MAX_NEW_TOKENS
        assert said[-1] == tokenizer.eos_token_id

    def test_free_text_generates(self, model: Any, tokenizer: Any) -> None:
        prompt = tokenizer(TEXTS["chinese"], return_tensors="pt")
        output = model.generate(**prompt, max_new_tokens=20, do_sample=False)
        assert isinstance(tokenizer.decode(output[0]), str)

    def test_lost_block_shows(self, model: Any, tokenizer: Any) -> None:
        told = samples(10, "en")
        intact = [with_lost_block(model, tokenizer, one, range(0)) == one.answer for one in told]
        lost = range(LOOKUP_LAYER, LOOKUP_LAYER + 1)
        broken = [with_lost_block(model, tokenizer, one, lost) != one.answer for one in told]
        assert sum(intact) >= 9
        assert sum(broken) >= 9
