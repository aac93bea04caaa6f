"""What import-linter's contracts in pyproject.toml cannot say: docstrings, names, and what an import sets off."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

import dinfer

PACKAGE = Path(dinfer.__file__).parent
WITHOUT_TORCH = {"plan", "planner", "trace", "config", "verdict"}
PUBLIC = ["__version__", "connect", "label", "load_ipython_extension", "open", "tap", "watch"]


def module_name(path: Path) -> str:
    """dinfer/plan/ops.py → dinfer.plan.ops; dinfer/plan/__init__.py → dinfer.plan."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def tree_of(module: str) -> ast.Module:
    """The module's syntax tree."""
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def in_fresh_python(program: str, *arguments: str) -> None:
    """Run a program in a Python of its own; its output is the failure's message."""
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(
        command, cwd=PACKAGE.parent, capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_plan_trace_verdict_and_config_work_without_torch() -> None:
    modules = [
        module for module in MODULES if module.split(".")[1:2] and module.split(".")[1] in WITHOUT_TORCH
    ]
    program = """
import importlib, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers"}:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
for name in sys.argv[1:]:
    importlib.import_module(name)
"""
    in_fresh_python(program, *modules)


def test_importing_dinfer_starts_nothing() -> None:
    program = """
import sys, threading
started = []
EVENTS = ("subprocess.Popen", "os.fork", "os.posix_spawn", "os.system", "socket.__new__", "ctypes.dlopen")
sys.addaudithook(lambda event, args: started.append((event, args)) if event in EVENTS else None)
import dinfer
heavy = {"torch", "transformers", "ipyparallel", "IPython", "numpy"} & set(sys.modules)
assert not heavy, heavy
assert not started, started
assert threading.active_count() == 1, threading.enumerate()
"""
    in_fresh_python(program)


def test_the_export_list_is_short_and_known() -> None:
    assert dinfer.__all__ == PUBLIC
    assert len(dinfer.__all__) <= 12
    assert all(hasattr(dinfer, name) for name in dinfer.__all__)


def test_only_transport_talks_to_torch_distributed() -> None:
    """Which a contract cannot say: import-linter sees torch as one module. The watch's probe listens to
    it, and its debug server has a page of dinfer."""
    allowed = ("dinfer.transport", "dinfer.watch.probe", "dinfer.watching.debug_server")
    others = [m for m in MODULES if not m.startswith(allowed) and _names(m, "torch.distributed")]
    assert others == []


def _names(module: str, package: str) -> bool:
    """Whether the module imports that package, or says its full name."""
    return any(
        f"{name}.".startswith(f"{package}.") for node in ast.walk(tree_of(module)) for name in _named(node)
    )


def _named(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return [ast.unparse(node)] if isinstance(node, ast.Attribute) else []


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is_for(module: str) -> None:
    assert ast.get_docstring(tree_of(module)), f"{module} has no docstring"


def test_no_type_name_is_defined_twice() -> None:
    """Neither a class nor an alias such as `Block = tuple[int, int]`."""
    found = defaultdict[str, list[str]](list)
    for module in MODULES:
        classes = [node.name for node in ast.walk(tree_of(module)) if isinstance(node, ast.ClassDef)]
        for name in (*classes, *_aliases(tree_of(module))):
            found[name].append(module)
    assert {name: modules for name, modules in found.items() if len(modules) > 1} == {}


def _aliases(tree: ast.Module) -> list[str]:
    """Names in CamelCase that a module gives to types."""
    found = [node.targets[0] for node in tree.body if isinstance(node, ast.Assign)]
    return [at.id for at in found if isinstance(at, ast.Name) and at.id[0].isupper() and not at.id.isupper()]


def test_names_of_older_versions_still_work_and_say_what_they_are_called_now(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(
        sys.modules, "dinfer.session.application", raising=False
    )  # another test may import it
    with pytest.warns(DeprecationWarning, match="dinfer.engine.ops"):
        from dinfer.engine import handlers
    with pytest.warns(DeprecationWarning, match="dinfer.launch.application"):
        from dinfer.session.application import open_engine

    assert "recv" in handlers.HANDLERS
    assert open_engine.__module__ == "dinfer.launch.application"


@pytest.mark.parametrize("text", ["dinfer/__init__.py", "notebooks/guide/architecture.md"])
def test_every_floor_of_the_house_is_told(text: str) -> None:
    root = PACKAGE.parent
    contracts = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    floors = next(
        one["layers"] for one in contracts if one["type"] == "layers" and one["containers"] == ["dinfer"]
    )
    rooms = set(re.findall(r"\w+", " ".join(floors))) - {"__main__"}
    told = set(re.findall(r"`(\w+)`", (root / text).read_text("utf-8")))
    assert not rooms - told
