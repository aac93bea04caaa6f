"""The house, checked in its source: who imports whom, what works without torch, how long files are."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import networkx as nx
import pytest

import dinfer

PACKAGE = Path(dinfer.__file__).parent
FRONT_DOOR = ""  # dinfer/__init__.py: names from all rooms
ROOMS = (
    "errors",
    "config",
    "plan",
    "trace",
    "verdict",
    "model",
    "engine",
    "session",
    "views",
    "magics",
    "cli",
    "__main__",
)
FORBIDDEN = {
    "model": set(ROOMS) - {"errors", "model"},
    "verdict": {"config"},
    "views": {"engine"},
}  # though they stand earlier
PUBLIC = ["__version__", "connect", "load_ipython_extension", "open"]
MAX_LINES = 350


class Import(NamedTuple):
    """One name that a module imports: absolute, as deep as the statement says ("torch.distributed.send")."""

    name: str
    line: int
    at_load: bool  # when the module loads: neither in a function nor for type checkers only


def module_name(path: Path) -> str:
    """dinfer/plan/ops.py → dinfer.plan.ops; dinfer/plan/__init__.py → dinfer.plan."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room_of(module: str) -> str:
    """dinfer.plan.ops → plan; dinfer → FRONT_DOOR."""
    return module.split(".")[1] if "." in module else FRONT_DOOR


@cache
def tree_of(module: str) -> ast.Module:
    """The module's syntax tree."""
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


@cache
def imports_of(module: str) -> tuple[Import, ...]:
    """Every import statement of the module, wherever it stands."""
    return tuple(_imports(module, tree_of(module), at_load=True))


def _imports(module: str, node: ast.AST, *, at_load: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(alias.name, node.lineno, at_load) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = _base_of(module, node)
        yield from (Import(f"{base}.{alias.name}", node.lineno, at_load) for alias in node.names)
    deferred = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or _is_type_checking(
        node
    )
    for child in ast.iter_child_nodes(node):
        yield from _imports(module, child, at_load=at_load and not deferred)


def _base_of(module: str, node: ast.ImportFrom) -> str:
    """What `from … import` names, with leading dots resolved."""
    if not node.level:
        return node.module or ""
    package = module.split(".") + (["__init__"] if MODULES[module].name == "__init__.py" else [])
    return ".".join([*package[: -node.level], *([node.module] if node.module else [])])


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def target_of(imported: Import) -> str | None:
    """The module of dinfer that an import reaches; None for other packages."""
    parts = imported.name.split(".")
    if parts[0] != "dinfer":
        return None
    names = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next(name for name in names if name in MODULES)


def is_within(name: str, package: str) -> bool:
    """Whether `name` is the package or something in it."""
    return name == package or name.startswith(f"{package}.")


def importers_of(package: str) -> dict[str, int]:
    """The modules that import the package or say its full name: module → line."""
    found = {}
    for module in MODULES:
        said = (node for node in ast.walk(tree_of(module)) if isinstance(node, ast.Attribute))
        lines = [i.line for i in imports_of(module) if is_within(i.name, package)]
        lines += [node.lineno for node in said if ast.unparse(node) == package]
        if lines:
            found[module] = min(lines)
    return found


def in_fresh_python(program: str, *arguments: str) -> None:
    """Run a program in a Python of its own; its output is the failure's message."""
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(
        command, cwd=PACKAGE.parent, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def rooms_open_to(room: str) -> set[str]:
    """The rooms that a room may import from."""
    earlier = set(ROOMS[: ROOMS.index(room) + 1]) - FORBIDDEN.get(room, set())
    return earlier | {FRONT_DOOR} if room in {"magics", "cli", "__main__"} else earlier


def test_every_module_is_in_a_room() -> None:
    rooms = {room_of(module) for module in MODULES}
    assert rooms <= {FRONT_DOOR, *ROOMS}


def test_imports_go_up_the_house_only() -> None:
    wrong = []
    for module in MODULES:
        if module == "dinfer":
            continue
        allowed = rooms_open_to(room_of(module))
        for imported in imports_of(module):
            target = target_of(imported)
            if target is None or imported.name == "dinfer.__version__" or room_of(target) in allowed:
                continue
            wrong.append(f"{module}:{imported.line} imports {imported.name}")
    assert not wrong, "\n".join(wrong)


def test_no_import_cycles() -> None:
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_edges_from(
        (module, target)
        for module in MODULES
        for imported in imports_of(module)
        if imported.at_load and (target := target_of(imported)) not in (None, module)
    )
    assert nx.is_directed_acyclic_graph(graph), nx.find_cycle(graph)


def test_plan_trace_verdict_and_config_work_without_torch() -> None:
    modules = [module for module in MODULES if room_of(module) in {"plan", "trace", "config", "verdict"}]
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


def test_only_session_talks_to_ipyparallel() -> None:
    assert [m for m in importers_of("ipyparallel") if room_of(m) != "session"] == []


def test_only_comm_talks_to_torch_distributed() -> None:
    others = [m for m in importers_of("torch.distributed") if not m.startswith("dinfer.transport.gloo")]
    assert others == []


def test_plan_and_verdict_use_the_standard_library_only() -> None:
    wrong = [
        f"{module}:{imported.line} imports {imported.name}"
        for module in MODULES
        if room_of(module) in {"plan", "verdict"}
        for imported in imports_of(module)
        if imported.name.split(".")[0] not in {*sys.stdlib_module_names, "dinfer"}
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is_for_and_stays_short(module: str) -> None:
    assert ast.get_docstring(tree_of(module)), f"{module} has no docstring"
    lines = len(MODULES[module].read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{module} has {lines} lines: what second thing does it do?"
