"""Files: written wholly or not at all, with errors that name what the user has named."""

import errno
from collections.abc import Iterable
from pathlib import Path


def check_folder(path: str | Path) -> None:
    """Raises FileNotFoundError or NotADirectoryError where the folder that a file is to be written to is none."""
    folder = Path(path).absolute().parent
    if not folder.exists():
        raise FileNotFoundError(errno.ENOENT, f"the folder {str(folder)!r} does not exist")
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{str(folder)!r} is no folder")


def write_whole(path: str | Path, pieces: Iterable[str]) -> None:
    """Write text; an existing file is replaced only once all is written, and half a file is not left.

    Raises OSError."""
    target = Path(path)
    check_folder(target)
    part = target.with_name(target.name + ".part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.writelines(pieces)
        part.replace(target)
    except OSError as error:
        part.unlink(missing_ok=True)  # half a file on a full disk helps nobody
        raise OSError(error.errno, error.strerror, str(target)) from None  # and nobody knows of the part
