"""Folder: a folder that is there wholly or not at all, and never in place of something that is not a saved run."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from dinfer.session.saved.format import RUN, SavedError, is_part


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A folder to write to, which takes the place of `path` once all is written, and is gone if that fails. Raises
    SavedError where something is there that is not a saved run."""
    target = Path(path).expanduser().resolve()
    check_free(target)
    part = _beside(target, "part")
    try:
        part.mkdir(parents=True)
    except OSError as error:
        raise SavedError(f"no folder can be made in {str(target.parent)!r}: {error.strerror}.") from None
    try:
        yield part
        _put(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def check_free(target: Path) -> None:
    """Raises SavedError unless nothing is there, or an empty folder, or a saved run, and the folder can be made."""
    if target.exists() and not target.is_dir():
        raise SavedError(f"{str(target)!r} is a file: a run is saved as a folder, so give another name.")
    names = sorted(one.name for one in target.iterdir()) if target.is_dir() else []
    others = [name for name in names if not is_part(name)]
    if names and (others or RUN not in names):
        found = ", ".join((others or names)[:3])
        raise SavedError(
            f"{str(target)!r} holds {found}, and is no saved run that could be replaced: give another folder."
        )
    there = next(one for one in target.parents if one.exists())  # the root at last
    if not there.is_dir():
        raise SavedError(f"{str(there)!r} is a file, so no folder can be made in it: give another name.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise SavedError(f"no folder can be made in {str(there)!r}: you may not write there.")


def _put(part: Path, target: Path) -> None:
    if not target.exists():
        part.rename(target)
        return
    old = _beside(target, "old")
    target.rename(old)
    try:
        part.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)


def _beside(target: Path, what: str) -> Path:
    return target.with_name(f".{target.name}.{uuid4().hex[:8]}.{what}")
