"""Tensors: a safetensors file as it is read, one tensor at a time; what is wrong with it is told in one message."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dinfer.session.saved.format import SavedError


class Tensors:
    """Of one file, which stays open: nothing is read before it is asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with _damage_told(path):
            opened: Any = safe_open(path, framework="pt")  # its methods have no types
            self._file = opened
            self.names = frozenset(opened.keys())

    def get(self, name: str) -> Tensor | None:
        """None where it is not there. Raises SavedError."""
        if name not in self.names:
            return None
        with _damage_told(self._path):
            found: Tensor = self._file.get_tensor(name)
        return found

    def one(self, name: str) -> Tensor:
        """The same of a tensor that must be there."""
        found = self.get(name)
        if found is None:
            raise SavedError(f"{str(self._path)!r} is damaged: it has no tensor {name}.")
        return found


@contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    if not path.is_file():
        raise SavedError(f"{str(path.parent)!r} is damaged: {path.name} is missing.")
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise SavedError(f"{str(path)!r} is damaged: {error}.") from None
