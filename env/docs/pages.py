"""Lays out the pages of the site: a copy of the notebooks and the guide, with the reference written into it.

`python env/docs/pages.py FOLDER` writes FOLDER/notebooks, which is what Sphinx reads, and beside it the files of the
repository to which pages link, so that every relative link means the same there as in the repository.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from links import slug
from typer.main import get_command

from dinfer.cli import app
from dinfer.saved.format import DESCRIPTION

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "dinfer"
LINKED = ("README.md", "LICENSE", "env", ".github")
COMMANDS, MODULES, SAVED_RUN = "<!-- commands -->", "<!-- modules -->", "<!-- saved run -->"
"""the lines of cli.md, api.md and formats.md that are replaced"""


def lay_out(folder: Path) -> None:
    """Write all pages, in place of what was there."""
    shutil.rmtree(folder, ignore_errors=True)
    ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "*.pyc")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=ignored)
    for name in LINKED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / name)
    for notebook in (folder / "notebooks").rglob("*.ipynb"):
        _use_site_anchors(notebook)
    guide = folder / "notebooks" / "guide"
    _replace(guide / "cli.md", COMMANDS, "\n".join(commands()))
    _replace(guide / "formats.md", SAVED_RUN, saved_run())
    pages = api_pages()
    (guide / "api").mkdir()
    for name, text in pages.items():
        (guide / "api" / f"{name}.md").write_text(text, encoding="utf-8")
    listed = "\n".join(f"api/{name}" for name in pages)
    _replace(guide / "api.md", MODULES, f"```{{toctree}}\n:maxdepth: 1\n\n{listed}\n```")


def _use_site_anchors(notebook: Path) -> None:
    """Links to headings of a notebook are written for Jupyter, whose anchors keep their case and punctuation."""
    values = json.loads(notebook.read_text(encoding="utf-8"))
    for cell in values["cells"]:
        if cell["cell_type"] == "markdown":
            text = "".join(cell["source"])
            cell["source"] = re.sub(r"\]\(#([^)]+)\)", lambda it: f"](#{slug(it[1])})", text)
    notebook.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")


def _replace(page: Path, mark: str, text: str) -> None:
    old = page.read_text(encoding="utf-8")
    if mark not in old:
        raise SystemExit(f"env/site: {page.name} has no line {mark!r} to replace.")
    page.write_text(old.replace(mark, text), encoding="utf-8")


def saved_run() -> str:
    """What FORMAT.md in a saved run's folder says, without its title, one heading deeper."""
    _, _, text = DESCRIPTION.partition("\n")
    return re.sub(r"^#", "##", text, flags=re.MULTILINE)


# -- the command line, from typer


def commands() -> Iterator[str]:
    """A section for each command: what it does, its usage, its arguments and options."""
    root: Any = get_command(app)
    for name in sorted(root.commands):
        yield from _command(name, root.commands[name])


def _command(name: str, command: Any) -> Iterator[str]:
    arguments = [it for it in command.params if it.param_type_name == "argument"]
    options = [it for it in command.params if it.param_type_name == "option" and it.name != "help"]
    words = ["dinfer", name, *(_usage(it) for it in arguments), *(["[OPTIONS]"] if options else [])]
    yield from (f"## dinfer {name}", "", _cell(command.help or ""), "")
    yield from ("```console", f"$ {' '.join(words)}", "```", "")
    if arguments or options:
        yield from ("| | | default |", "| --- | --- | --- |")
        yield from (_row(f"`{it.name.upper()}`", it) for it in arguments)
        yield from (_row(_flags(it), it) for it in options)
        yield ""


def _usage(argument: Any) -> str:
    shown = argument.name.upper() + ("..." if argument.nargs == -1 else "")
    return shown if argument.required else f"[{shown}]"


def _flags(option: Any) -> str:
    pair = [", ".join(f"`{it}`" for it in option.opts), ", ".join(f"`{it}`" for it in option.secondary_opts)]
    return " / ".join(filter(None, pair))


def _row(head: str, parameter: Any) -> str:
    text, default = _cell(parameter.help or ""), parameter.default
    if parameter.required:
        shown = "required"
    else:
        shown = "" if default in (None, "", False) or callable(default) else f"`{default}`"
    if not shown and "; default: " in text:  # `dinfer run` says it in its text
        text, _, value = text.rpartition("; default: ")
        shown = f"`{value}`"
    return f"| {head} | {text} | {shown} |"


def _cell(text: str) -> str:
    """Text in one line, in which flags stand as code and nothing is taken for markup."""
    escaped = " ".join(text.split()).replace("|", "\\|").replace("<", "\\<").replace("*", "\\*")
    return re.sub(r"(?<![\w`-])(--[a-z][\w-]*)", r"`\1`", escaped)


# -- the reference, from docstrings


def api_pages() -> dict[str, str]:
    """By name, a page for the package itself and one for each package or module in it, whatever there is."""
    found = {"dinfer": ["dinfer"]}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] == "__main__" or len(parts) < 2 or parts == ("dinfer", "__init__"):
            continue
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found.setdefault(".".join(parts[:2]), []).append(module)
    return {name: _api_page(name, sorted(modules)) for name, modules in found.items()}


def _api_page(name: str, modules: list[str]) -> str:
    """The package's own docstring first, then its modules."""
    pieces = [f"# {name}\n"]
    for module in modules:
        head = "" if module == name else f"## {module.removeprefix(f'{name}.')}\n\n"
        pieces.append(f"{head}```{{eval-rst}}\n.. automodule:: {module}\n{_options(module)}```\n")
    return "\n".join(pieces)


def _options(module: str) -> str:
    """The command line's functions have signatures for typer, not for people: cli.md says what they take."""
    return "   :no-members:\n" if module.startswith("dinfer.cli") or not _has_members(module) else ""


def _has_members(module: str) -> bool:
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    body = ast.parse(file.read_text(encoding="utf-8")).body
    return any(isinstance(it, ast.ClassDef | ast.FunctionDef | ast.Assign | ast.AnnAssign) for it in body)


if __name__ == "__main__":
    lay_out(Path(sys.argv[1]))
