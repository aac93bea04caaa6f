"""Parameters, TOML files and prompts that others have damaged or made: taken, or refused with one error."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dinfer.config import Config, ConfigError, read_toml
from tests.support.hostile import LIMITED, ODD, mutated_bytes, read_limited, read_or_refused

EXAMPLE = Path("env/run.example.toml").read_bytes()

on_disk = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@on_disk
@given(mutated_bytes(EXAMPLE))
def test_a_damaged_toml_file_is_taken_or_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "run.toml").write_bytes(data)
    read_or_refused(lambda: Config.from_toml(tmp_path / "run.toml"))


@pytest.mark.parametrize("name", get_type_hints(Config))
def test_every_parameter_takes_a_value_or_refuses_it(name: str) -> None:
    for value in (
        *ODD,
        "9" * 5000,
        float("nan"),
        float("inf"),
        int("f" * 5000, 16),
        [int("f" * 5000, 16)],
        "\ud800",
    ):
        said = read_or_refused(lambda given=value: Config.of({name: given}))  # type: ignore[misc]
        assert len(said) < 1000
        if said:
            assert name in said or "is given" in said or "are given" in said


@given(st.dictionaries(st.sampled_from(list(get_type_hints(Config))), st.sampled_from(ODD), max_size=3))
def test_parameters_together_are_taken_or_refused(values: dict[str, Any]) -> None:
    read_or_refused(lambda: Config.of(values))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a = " + "[" * 100_000, "nested too deeply"),
        ("world_size = " + "9" * 5000, "not valid TOML"),
        ("world_size = 0x" + "f" * 5000, "world_size"),
        ("timeout = nan", "finite"),
        ("timeout = 1e300", "at most"),
        ("seed = 99999999999999999999", "at most"),
        ("gpu_ids = [[0]]", "whole numbers"),
        ("prompt_ids = [99999999999]", "from 0 to"),
        ('log_dir = "a\\u0000b"', "NUL"),
        ("[table]\na = 1", "unknown parameter 'table'"),
        ("a = 1\na = 2", "not valid TOML"),
        ("\ud800", "not UTF-8"),
        ("x = 1\n" * 1_000_000, "more than"),
    ],
)
def test_what_toml_may_hold_and_no_run_takes(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "run.toml").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ConfigError) as caught:
        Config.from_toml(tmp_path / "run.toml")
    assert words in str(caught.value)
    assert len(str(caught.value)) < 1000


@on_disk
@given(mutated_bytes("Lima 是秘鲁的首都.\r\n".encode()))
def test_a_damaged_prompt_is_taken_or_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "prompt.txt").write_bytes(data)
    config = Config(prompt_file=str(tmp_path / "prompt.txt"))
    if not read_or_refused(config.prompt_text):
        config.prompt_text().encode()


def test_a_prompt_that_is_no_text_is_named_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_bytes(b"one\ntwo\nth\xffree")
    with pytest.raises(ConfigError, match=r"line 3 is not UTF-8 text: byte 0xff"):
        Config(prompt_file=str(tmp_path / "prompt.txt")).prompt_text()


def test_ends_of_lines_are_as_python_reads_them(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert Config(prompt_file=str(tmp_path / "prompt.txt")).prompt_text() == "one\ntwo\nthree"


@LIMITED
@pytest.mark.timeout(300)
def test_a_hostile_config_or_prompt_costs_little(tmp_path: Path) -> None:
    texts = {
        "large": b"#" * (70 << 20),
        "keys": b"a." * 1_000_000 + b"b = 1",
        "arrays": b"a = [" + b"[]," * 500_000 + b"]",
        "tables": b"[a]\n" * 400_000,
        "deep": b"a = " + b"{a = " * 300_000,
        "digits": b"a = " + b"9" * 2_000_000,
    }
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text)
    paths = [tmp_path / name for name in texts] + [Path("/dev/zero")]
    found = read_limited("from dinfer.config import Config", "Config.from_toml(path)", paths)
    assert all(said.startswith("ConfigError: ") for said in found.values()), found
    assert len(found) == len(paths)
    found = read_limited("from dinfer.config import Config", "Config(prompt_file=path).prompt_text()", paths)
    assert found["large"].startswith("ConfigError: ")
    assert found["zero"].startswith("ConfigError: ")


def test_toml_without_an_end_of_line_is_read(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_bytes(b"\xef\xbb\xbfworld_size = 2\r\nprompt = 'x'")
    assert read_toml(tmp_path / "run.toml") == {"world_size": 2, "prompt": "x"}
