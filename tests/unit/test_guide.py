"""README, guide and what describes the project: short, without a broken link, and true where it repeats the code."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.main import get_command

from dinfer.cli import app
from dinfer.rank.debugger import FIRST_PORT
from dinfer.trace.events import KINDS, WHATS, Event
from dinfer.verdict.waits import HUNG, stuck_after
from tests.support.guide import GUIDE, PAGES, ROOT, blocks

README = (ROOT / "README.md").read_text(encoding="utf-8")
ADDRESS = "https://example.org/owner/dinfer"


def loaded(name: str) -> ModuleType:
    """A module of env/docs."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "env" / "docs" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    """env/docs/readme.py, or as much of it as works without hatchling, which only builds need."""
    source = ast.parse((ROOT / "env" / "docs" / "readme.py").read_text(encoding="utf-8"))
    source.body = [
        node
        for node in source.body
        if not isinstance(node, ast.ClassDef) and "hatchling" not in ast.unparse(node)
    ]
    module = ModuleType("readme")
    exec(compile(source, "readme.py", "exec"), module.__dict__)
    return module


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= 1200


@pytest.mark.parametrize("address", ["", ADDRESS])
def test_what_an_index_shows_has_no_relative_link_or_picture(hook: ModuleType, address: str) -> None:
    shown = hook.for_index(README, address)
    links = re.findall(r"\]\(([^)]+)\)", shown)
    assert [link for link in links if not link.startswith("https://")] == []
    assert ("![" in shown) == bool(address)
    assert "Why does it hang?" in shown
    assert (len(links) == len(re.findall(r"\]\(([^)]+)\)", README))) == bool(address)


def test_addresses_come_from_pyproject(hook: ModuleType) -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert settings["tool"]["dinfer"]["address"] == ""  # to be set when there is a public one
    assert hook.urls_of("") == {}
    assert hook.urls_of(ADDRESS)["Source"] == ADDRESS


def test_relative_links_lead_somewhere() -> None:
    script = [sys.executable, str(ROOT / "env" / "docs" / "links.py")]
    ran = subprocess.run(script, capture_output=True, text=True, timeout=60, check=False)
    assert (ran.returncode, ran.stdout) == (0, ""), ran.stderr


def test_a_broken_link_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    links = loaded("links")
    monkeypatch.setattr(links, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("# A `b` c?\n[1](#a-b-c) [2](#no) [3](none.md) [4](https://x) `[5](no.md)`\n", "utf-8")
    found = list(links.broken(page))
    assert found == ["this page has no heading #no", "there is no file none.md"]


def test_the_reference_is_laid_out_whole(tmp_path: Path) -> None:
    """Every command with every flag, every module, and the description of saved runs."""
    script = [sys.executable, str(ROOT / "env" / "docs" / "pages.py"), str(tmp_path)]
    subprocess.run(script, timeout=100, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    guide = tmp_path / "notebooks" / "guide"
    commands = (guide / "cli.md").read_text(encoding="utf-8")
    for name, command in vars(get_command(app))["commands"].items():
        assert f"## dinfer {name}\n" in commands
        flags = [flag for it in command.params for flag in it.opts if flag.startswith("--")]
        assert [flag for flag in flags if f"`{flag}`" not in commands and flag != "--help"] == []
    described = "\n".join(page.read_text(encoding="utf-8") for page in (guide / "api").glob("*.md"))
    modules = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "dinfer").rglob("*.py")]
    named = [".".join(path.parts).removesuffix(".__init__") for path in modules if path.name != "__main__"]
    assert [name for name in named if f".. automodule:: {name}\n" not in described] == []
    assert "digests.safetensors" in (guide / "formats.md").read_text(encoding="utf-8")


def test_workflows_run_scripts_that_are_there() -> None:
    yaml = importlib.import_module("yaml")  # it ships no types
    for path in sorted((ROOT / ".github" / "workflows").glob("*.yml")):
        jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
        commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
        scripts = [script for command in commands for script in re.findall(r"\benv/\w+", command)]
        assert [script for script in scripts if not (ROOT / script).is_file()] == [], path


def test_docstrings_become_text_without_other_markup() -> None:
    docstrings = loaded("docstrings")
    given = ["Of `*args`, *all*:", "", "* one `a", "  b`", "* two_", "", "    x = 1", "", "And|so on."]
    assert [line for line in docstrings.as_rst(given) if line] == [
        r"Of \ ``*args``\ , \*all\*:",
        r"* one \ ``a b``\ ",
        r"* two\_",
        "::",
        "        x = 1",
        r"And\|so on.",
    ]
    assert docstrings.is_noise(pytest.Item)
    assert not docstrings.is_noise(stuck_after)


def test_every_page_of_the_guide_is_in_its_table_of_contents() -> None:
    index = (GUIDE / "index.md").read_text(encoding="utf-8").splitlines()
    assert [page.stem for page in GUIDE.glob("*.md") if page.stem not in ("index", *index)] == []


def test_pages_are_plain_where_they_are_no_notebooks() -> None:
    """A page with cells says in its head that it is one, so that it opens as a notebook."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert ("{code-cell}" in text) == text.startswith("---\njupytext:"), page


def test_the_hang_page_names_every_kind() -> None:
    text = (GUIDE / "hang.md").read_text(encoding="utf-8")
    assert [kind for kind in HUNG - {"stuck"} if f"`{kind}`" not in text] == []


def test_the_formats_page_names_every_field_of_an_event() -> None:
    text = (GUIDE / "formats.md").read_text(encoding="utf-8")
    words = [*Event.__dataclass_fields__, *KINDS, *filter(None, WHATS)]
    assert [word for word in words if f"`{word}`" not in text] == []


def test_the_reference_names_classes_that_are_there() -> None:
    rows = re.findall(r"\| `(\w+)` \| `([\w.]+)` \|$", (GUIDE / "api.md").read_text("utf-8"), re.MULTILINE)
    assert len(rows) >= 10
    assert [row for row in rows if not hasattr(importlib.import_module(row[1]), row[0])] == []


def test_the_vscode_page_has_the_ports() -> None:
    assert str(FIRST_PORT) in (GUIDE / "vscode.md").read_text(encoding="utf-8")


def written_commands() -> list[list[str]]:
    """The words of every `dinfer …` in the shell blocks of README and guide."""
    texts = (block.replace("\\\n", " ") for page in PAGES for block in blocks(page, "sh"))
    lines = (line for text in texts for line in text.splitlines())
    parts = (part for line in lines for part in re.split(r"\||&&|>", line.partition(" #")[0]))
    words = (shlex.split(part) for part in parts if part.strip().startswith("dinfer "))
    return [list(found) for found in dict.fromkeys(map(tuple, words))]


@pytest.mark.parametrize("words", written_commands(), ids=lambda words: "-".join(words[1:])[:40])
def test_commands_are_taken_as_written(words: list[str]) -> None:
    """tests/cluster/test_guide.py runs them; those of which others run the like, only with the slow tests."""
    command: Any = get_command(app)  # of click, or of typer's own copy of it
    context, rest = None, words[1:]
    while hasattr(command, "commands"):
        context = command.make_context(words[0], rest, context)
        _, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
    command.make_context(words[0], rest, context)
