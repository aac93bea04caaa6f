"""Acts once a module has been imported, so that the probe itself imports nothing heavy."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

Act = Callable[[ModuleType], None]


class _Loader(importlib.abc.Loader):
    """Loads a module as its own loader does, then acts. The module keeps its own loader."""

    def __init__(self, loader: Any, acts: Sequence[Act]) -> None:
        self._loader, self._acts = loader, acts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        found: ModuleType | None = self._loader.create_module(spec)
        return found

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        for act in self._acts:
            act(module)


class ImportWatch(importlib.abc.MetaPathFinder):
    """Calls a function with each of some modules: at once if it is imported already, else right after it is."""

    def __init__(self) -> None:
        self._acts: dict[str, list[Act]] = {}
        self._prefixes: dict[str, Act] = {}
        self._busy: set[str] = set()

    def add(self, name: str, act: Act) -> None:
        """`act` must not raise."""
        module = sys.modules.get(name)
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            act(module)
            return
        self._acts.setdefault(name, []).append(act)
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def add_within(self, package: str, act: Act) -> None:
        """The same of each module below a package, however deep. `act` must not raise."""
        prefix = f"{package}."
        for name, module in list(sys.modules.items()):
            if name.startswith(prefix) and not getattr(module.__spec__, "_initializing", False):
                act(module)
        self._prefixes[prefix] = act
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def remove(self) -> None:
        """Watch no more."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec that all other finders find, with a loader that acts."""
        acts = self._acts.get(fullname, [])
        acts = [*acts, *(act for prefix, act in self._prefixes.items() if fullname.startswith(prefix))]
        if not acts or fullname in self._busy:
            return None
        self._busy.add(fullname)
        try:
            spec = next(filter(None, self._specs(fullname, path, target)), None)
        finally:
            self._busy.discard(fullname)
        if spec is not None and spec.loader is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(spec.loader, acts)
        return spec

    def _specs(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None) -> Any:
        for finder in list(sys.meta_path):
            find = getattr(finder, "find_spec", None)
            if finder is not self and find is not None:
                yield find(fullname, path, target)
