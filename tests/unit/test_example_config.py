"""env/run.example.toml has every parameter with its default, and is a valid config."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from dinfer.config import Config, read_toml

EXAMPLE = Path(__file__).parents[2] / "env" / "run.example.toml"


def test_the_example_names_every_parameter() -> None:
    named = re.findall(r"^(?:# )?(\w+) = ", EXAMPLE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(named) == sorted(item.name for item in fields(Config))


def test_the_example_is_a_config_of_defaults_but_for_the_prompt() -> None:
    config = Config.from_toml(EXAMPLE)
    assert config == Config(prompt=config.prompt)
    assert all(getattr(config, name) == value for name, value in read_toml(EXAMPLE).items())
