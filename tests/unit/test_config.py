"""Config: what it accepts, and every error: the given value, the allowed ones, the remedy."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinfer.arguments import nearest
from dinfer.config import Config, ConfigError, read_toml
from tests.support.facts import has_facts

PROMPT = "床前明月光，疑是地上霜。🌕"


def refused(**values: Any) -> str:
    """What `Config.of` says to these values."""
    with pytest.raises(ConfigError) as caught:
        Config.of(values)
    return str(caught.value)


def test_defaults_are_a_config() -> None:
    assert Config.of({}) == Config()
    assert (Config().world_size, Config().schedule, Config().sync_strategy) == (3, "pipelined", "pairwise")


def test_every_parameter_explains_itself() -> None:
    assert all(item.metadata["help"] for item in fields(Config))


def test_a_config_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Config().world_size = 4  # type: ignore[misc]


def test_a_config_can_be_a_key() -> None:
    assert len({Config(), Config(), Config(world_size=2)}) == 2


def test_changes_make_another_config() -> None:
    config = Config()
    assert config.with_(world_size="2", gpu_ids="0,0") == Config(world_size=2, gpu_ids=(0, 0))
    assert config == Config()


def test_changes_are_checked() -> None:
    with pytest.raises(ConfigError, match="chunk_size is 0; it must be at least 1"):
        Config().with_(chunk_size=0)
    with pytest.raises(ConfigError, match="unknown parameter 'chunk'"):
        Config().with_(chunk=2)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("world_size", "4", 4),
        ("world_size", " 4 ", 4),
        ("temperature", "0.7", 0.7),
        ("temperature", 1, 1.0),
        ("timeout", "1e3", 1000.0),
        ("chat", "true", True),
        ("chat", "Yes", True),
        ("chat", "1", True),
        ("chat", 0, False),
        ("chat", "no", False),
        ("schedule", "lockstep", "lockstep"),
        ("model_path", Path("/models/qwen"), "/models/qwen"),
        ("prompt", "5", "5"),
        ("prompt_ids", "5,17,3", (5, 17, 3)),
        ("prompt_ids", " 5 , 17 ", (5, 17)),
        ("prompt_ids", "", ()),
        ("prompt_ids", [5, 17], (5, 17)),
        ("prompt_ids", 5, (5,)),
        ("prompt_ids", ["5", "17"], (5, 17)),
    ],
)
def test_text_and_objects_become_values(name: str, text: Any, value: object) -> None:
    converted = getattr(Config.of({name: text}), name)
    assert (converted, type(converted)) == (value, type(value))


@given(st.lists(st.integers(0, 10**6)))
def test_numbers_as_text_and_back(numbers: list[int]) -> None:
    assert Config.of({"prompt_ids": ",".join(map(str, numbers))}).prompt_ids == tuple(numbers)


def test_a_chinese_prompt_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text(PROMPT, encoding="utf-8")
    assert Config(prompt=PROMPT).prompt_text() == PROMPT
    assert Config(prompt_file=str(path)).prompt_text() == PROMPT


@pytest.mark.parametrize("added", ["\n", "\r\n"])
def test_what_editors_add_to_a_file_is_no_part_of_the_prompt(tmp_path: Path, added: str) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes(f"{PROMPT}{added}".encode("utf-8-sig"))
    assert Config(prompt_file=str(path)).prompt_text() == PROMPT
    path.write_bytes(f"{PROMPT}{added * 2}".encode())
    assert Config(prompt_file=str(path)).prompt_text() == f"{PROMPT}\n", "an empty last line was typed"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "below": ({"world_size": 0}, "world_size is 0; it must be at least 1."),
    "below, as text": ({"chunk_size": "-3"}, "chunk_size is -3 … at least 1"),
    "below, not whole": ({"timeout": 0.5}, "timeout is 0.5 … at least 1"),
    "above": ({"master_port": 65536}, "master_port is 65536 … at most 65535"),
    "above 1": ({"top_p": 1.5}, "top_p is 1.5 … at most 1"),
    "top_p of 0": ({"top_p": 0}, "top_p is 0.0 … above 0 and at most 1"),
    "negative top_p": ({"top_p": -1}, "top_p is -1.0 … above 0 and at most 1"),
    "text for a whole number": ({"world_size": "three"}, "world_size is 'three' … whole number"),
    "a float for a whole number": ({"world_size": 3.0}, "world_size is 3.0 … whole number"),
    "a bool for a whole number": ({"world_size": True}, "world_size is True … whole number"),
    "text for a number": ({"temperature": "warm"}, "temperature is 'warm' … number"),
    "None for a number": ({"temperature": None}, "temperature is None … number"),
    "infinite": ({"timeout": "inf"}, "timeout is 'inf' … finite"),
    "NaN": ({"temperature": "nan"}, "temperature is 'nan' … finite"),
    "text for a bool": ({"chat": "maybe"}, "chat is 'maybe' … true or false"),
    "a number for text": ({"prompt": 5}, "prompt is 5 … text"),
    "unknown choice": ({"schedule": "eager"}, "schedule is 'eager' … pipelined, lockstep, batched"),
    "nearly a choice": ({"schedule": "pipeline"}, "schedule is 'pipeline' … Did you mean pipelined?"),
    "a choice of three": ({"backend": "mpi"}, "backend is 'mpi' … auto, gloo, nccl"),
    "a choice with a dash": ({"device_mode": "single-node"}, "'single-node' … Did you mean single_node?"),
    "text among numbers": ({"gpu_ids": "0,one,2"}, "gpu_ids is '0,one,2' … whole numbers … 0,1,2"),
    "floats for whole numbers": ({"prompt_ids": [1.5]}, "prompt_ids is [1.5] … whole numbers"),
    "bools for whole numbers": ({"prompt_ids": [True]}, "prompt_ids is [True] … whole numbers"),
    "a bool for whole numbers": ({"prompt_ids": True}, "prompt_ids is True … whole numbers"),
    "None for whole numbers": ({"prompt_ids": None}, "prompt_ids is None … whole numbers"),
    "negative numbers": ({"prompt_ids": "5,-1"}, "prompt_ids is [5, -1] … from 0 to"),
    "two prompts": ({"prompt": PROMPT, "prompt_ids": "1,2"}, "prompt and prompt_ids … leave the others out"),
    "layer_split for other ranks": ({"layer_split": "14"}, "layer_split takes 2 numbers for 3 ranks … got 1"),
    "GPUs for other ranks": ({"world_size": 2, "gpu_ids": "0,1,2"}, "world_size is 2 … gpu_ids names 3"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_the_value_and_what_is_allowed(name: str) -> None:
    values, facts = REFUSED[name]
    message = refused(**values)
    assert has_facts(message, facts), message


@pytest.mark.parametrize(
    ("ranks", "given", "facts"),
    [
        (1, (3,), "no numbers for 1 rank"),
        (2, (), ""),
        (2, (1, 2), "1 number for 2 ranks … stage 1)"),
        (5, (1,), "stages 1 to 4"),
    ],
)
def test_a_layer_split_names_the_stages_that_it_starts(
    ranks: int, given: tuple[int, ...], facts: str
) -> None:
    if not facts:
        assert Config(world_size=ranks, layer_split=given).layer_split == given
        return
    with pytest.raises(ConfigError) as caught:
        Config(world_size=ranks, layer_split=given)
    assert has_facts(str(caught.value), f"layer_split takes … {facts} … got {len(given)}"), str(caught.value)


def test_an_unknown_parameter_names_the_nearest_and_all() -> None:
    known = ", ".join(item.name for item in fields(Config))
    assert refused(chunk_sise=5) == (
        f"unknown parameter 'chunk_sise'. Did you mean chunk_size? The parameters are {known}."
    )
    assert refused(zzz=5) == f"unknown parameter 'zzz'. The parameters are {known}."


def test_a_flag_is_near_its_field() -> None:
    assert nearest("chunk-size", ["chunk_size", "seed"]) == " Did you mean chunk_size?"
    assert nearest("zzz", ["chunk_size", "seed"]) == ""


def test_a_number_too_large_for_a_float() -> None:
    assert refused(temperature=10**400).endswith("it must be a number.")


# -- files


def written(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_toml(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        f"""
        world_size = 2
        schedule = "lockstep"  # a comment
        prompt = "{PROMPT}"
        temperature = 1
        gpu_ids = [0, 1]
        chat = true
        """,
    )
    config = Config.from_toml(path)
    assert config == Config(
        world_size=2, schedule="lockstep", prompt=PROMPT, temperature=1.0, gpu_ids=(0, 1), chat=True
    )
    assert isinstance(config.temperature, float)


def test_toml_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes("chunk_size = 4".encode("utf-8-sig"))
    assert read_toml(path) == {"chunk_size": 4}


def test_changes_go_on_top_of_toml(tmp_path: Path) -> None:
    path = written(tmp_path, 'world_size = 2\nschedule = "lockstep"\n')
    assert Config.from_toml(str(path), world_size="5") == Config(world_size=5, schedule="lockstep")


def test_every_parameter_can_be_written_as_toml(tmp_path: Path) -> None:
    def toml(value: Any) -> str:
        return str(list(value)) if isinstance(value, tuple) else repr(value).replace("True", "true")

    lines = [f"{item.name} = {toml(getattr(Config(), item.name))}" for item in fields(Config)]
    text = "\n".join(lines).replace("False", "false")
    assert Config.from_toml(written(tmp_path, text)) == Config()


def test_unknown_keys_of_toml_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown parameter 'word_size'\. Did you mean world_size\?"):
        Config.from_toml(written(tmp_path, "word_size = 2"))


def test_a_table_is_no_parameter(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown parameter 'run'"):
        Config.from_toml(written(tmp_path, "[run]\nworld_size = 2"))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "nowhere.toml"
    with pytest.raises(ConfigError) as caught:
        read_toml(path)
    assert str(caught.value) == f"config file {str(path)!r} cannot be read: No such file or directory."


@pytest.mark.parametrize("content", [b"world_size 2", b"\xff\xfe", b"a = 1\na = 2"])
def test_a_file_that_is_not_toml(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_toml(path)
    message = str(caught.value)
    assert message.startswith(f"config file {str(path)!r} is not valid TOML: ")
    assert message.endswith(".")


def test_a_prompt_file_that_is_not_there(tmp_path: Path) -> None:
    path = str(tmp_path / "nowhere.txt")
    with pytest.raises(ConfigError) as caught:
        Config(prompt_file=path).prompt_text()
    assert str(caught.value) == (f"prompt_file {path!r} cannot be read: No such file or directory.")


def test_a_prompt_file_that_is_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes(PROMPT.encode("gb18030"))
    with pytest.raises(ConfigError) as caught:
        Config(prompt_file=str(path)).prompt_text()
    assert f"prompt_file {str(path)!r} cannot be taken: line 1 is not UTF-8 text" in str(caught.value)


def test_bytes_that_a_c_locale_has_read_as_ascii_become_text_again() -> None:
    text = "请详细介绍一下人工智能的发展历史。"
    read = text.encode().decode("ascii", "surrogateescape")
    assert Config.of({"prompt": read}).prompt == text
    assert Config.of({"prompt": text}).prompt == text
    with pytest.raises(ConfigError, match=r"prompt is .*, which is not UTF-8 text"):
        Config.of({"prompt": "\udcff"})


@pytest.mark.parametrize("policy", ["pause", "fail"])
def test_what_to_do_about_changed_bytes_takes_digests(policy: str) -> None:
    with pytest.raises(ConfigError, match=f"on_corruption is {policy}, but digests is off"):
        Config.of({"digests": "no", "on_corruption": policy})
    assert Config.of({"on_corruption": policy}).digests
    assert not Config.of({"digests": "no"}).digests
