"""Files of users: read within limits, so that a wrong one costs neither memory nor time; and written to free names, so
that nothing replaces the results of another run."""

import errno
import json
import os
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

from dinfer.errors import DinferError, NotPossible


class FileError(DinferError, ValueError):
    """What is in a file cannot be taken in: it is too large, no text, or no JSON. The message says what; who reads the
    file adds its name."""


def check_working_folder() -> None:
    """Raises NotPossible where this process's working folder has been deleted: no relative path leads anywhere then."""
    try:
        os.getcwd()
    except OSError as error:
        raise NotPossible(
            f"the working folder of this process cannot be used ({error.strerror}), as after it was deleted: change to "
            "another (cd, or os.chdir in Python)."
        ) from None


def read_bytes(path: str | Path, most: int) -> bytes:
    """At most `most` bytes. Raises OSError, and FileError for more."""
    with Path(path).open("rb") as file:
        return read_stream(file, most)


def read_stream(file: BinaryIO, most: int) -> bytes:
    """As `read_bytes`, from where an open file stands."""
    found = file.read(most + 1)
    if len(found) > most:
        raise FileError(f"it has more than {most:,} bytes")
    return found


def as_text(data: bytes) -> str:
    """UTF-8 text without a byte-order mark, with \\n at the ends of lines. Raises FileError, which names the line."""
    try:
        text = data.decode("utf-8-sig")
        return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise FileError(f"line {line} is not UTF-8 text: byte 0x{data[error.start]:02x}") from None


def as_json(data: bytes) -> Any:
    """The value of a JSON text. Raises FileError, which names line and column, also for NaN and Infinity, which are no
    JSON."""
    text = as_text(data)
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise FileError("it is nested too deeply") from None
    except ValueError as error:  # also a number of more digits than Python converts
        raise FileError(f"it is not JSON: {error}") from None


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number in JSON")


# -- names to write to


class FolderError(DinferError, OSError):
    """A file that is to be written has no folder and none can be made, or is a folder itself."""

    def __str__(self) -> str:
        return str(self.strerror)


def check_folder(path: str | Path) -> None:
    """Raises FolderError where a file's folder neither exists nor can be made, and where the file is a folder. Called
    before work begins whose result goes there; nothing is made yet."""
    file = Path(path).expanduser().absolute()
    if file.is_dir():
        raise FolderError(
            errno.EISDIR, f"{str(path)!r} is a folder, and a file is to be written: add its name"
        )
    parent = file.parent
    there = next(folder for folder in (parent, *parent.parents) if folder.exists() or folder.is_symlink())
    if not there.is_dir():
        raise FolderError(errno.ENOTDIR, f"{str(there)!r} is no folder, so nothing can be written into it")
    if there != parent and not os.access(there, os.W_OK | os.X_OK):
        raise FolderError(errno.EACCES, f"no folder can be made in {str(there)!r}: permission denied")


def not_html(path: str | Path) -> str:
    """Why a report cannot be written under this name; "" if it can."""
    ending = Path(path).suffix
    if ending.lower() in ("", ".html", ".htm"):
        return ""
    return (
        f"a report is an HTML page, and {Path(path).name!r} ends in {ending}: give a name that ends in .html"
    )


def check_report(path: str | Path) -> None:
    """Raises NotPossible where a report cannot be written under this name, and FolderError as `check_folder` does."""
    if why := not_html(path):
        raise NotPossible(f"{why}.")
    check_folder(path)


def make_folder(path: str | Path) -> Path:
    """Make the folders above a file that is about to be written, and return its path. Raises FolderError."""
    found = Path(path).expanduser()
    check_folder(found)
    try:
        found.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FolderError(
            error.errno, f"no folder {str(found.parent)!r} can be made: {error.strerror}"
        ) from None
    return found


def free_path(wanted: Path) -> Path:
    """`wanted` or, if something is there, the first of `name-2`, `name-3`, … beside it that is free."""
    stem, suffix = (wanted.name, "") if wanted.is_dir() else (wanted.stem, wanted.suffix)
    found, number = wanted, 1
    while not _is_free(found):
        number += 1
        found = wanted.with_name(f"{stem}-{number}{suffix}")
    return found


def _is_free(path: Path) -> bool:
    if path.is_dir():
        return not any(path.iterdir())
    return not path.is_file() or path.stat().st_size == 0  # a device or a pipe may be written to


class WrittenPath(type(Path())):  # type: ignore[misc] # PosixPath or WindowsPath
    """The path of what was written: shells show it without `PosixPath(...)`, notebooks as a link where they can open
    it, which is below the notebook's folder."""

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        text = escape(str(self))
        try:
            address = self.absolute().relative_to(Path.cwd()).as_posix()
        except (OSError, ValueError):  # the working folder is gone, or this lies elsewhere
            return text
        return f'<a href="{quote(address)}" target="_blank">{text}</a>'


class WrittenFiles:
    """The files and folders that one run has written. It may replace these, and nothing else."""

    def __init__(self) -> None:
        self._places: dict[Path, Path] = {}
        self._stamps: dict[Path, tuple[int, int]] = {}

    def place_for(self, path: str | Path) -> Path:
        """Where to write what the user wants at `path`: there or, if something else is there, beside it under the first
        free number, which is said in a line."""
        asked = Path(path).expanduser()
        before = self._places.get(asked.absolute(), asked)
        if self._is_own(before):
            return before
        found = free_path(asked)
        if found != asked:
            print(f"{asked} is not of this run and is kept; this run's is {found.name}.")
        return found

    def add(self, path: str | Path, written: Path) -> None:
        """`written` now holds what the user wanted at `path`."""
        with suppress(OSError):  # it is gone again
            self._stamps[written.absolute()] = _stamp(written)
            self._places[Path(path).expanduser().absolute()] = written

    def _is_own(self, path: Path) -> bool:
        """Whether this run has written it, and nobody else has since."""
        return path.exists() and self._stamps.get(path.absolute()) == _stamp(path)


def _stamp(path: Path) -> tuple[int, int]:
    """Differs once a file, or a saved run as a whole, has been written again."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns
