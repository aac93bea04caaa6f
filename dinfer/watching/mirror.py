"""Copies the files of watched processes to another host while they grow, piece by piece.

`Changes` finds what is new in a folder, `Mirror` writes it into a folder elsewhere. A reader there sees what a reader
here would: the lines of a process come before the ops that refer to them, and segments of ops before the header that
counts them. A record of an op that is torn between two copies does not count, as one that is being written does not.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

from dinfer.errors import DinferError
from dinfer.watch.probe.records import (
    HEADER_BYTES,
    MOST_FILES,
    MOST_SEGMENTS,
    RECORD_WORDS,
    SEGMENT_BYTES,
    SEGMENTS_AT,
    WORD,
)
from dinfer.watch.probe.rows import MOST_BYTES

PIECE_BYTES = 64 * RECORD_WORDS * 8
"""of a segment of ops, which are whole records"""

MOST_PIECE_BYTES = 1 << 20
"""of what is only appended to"""

HEAD_BYTES = 64
"""of a header that says anything"""

APPENDED = (".jsonl", ".kv", ".dump")

_NAME = re.compile(r"[\w.-]{1,200}\.(jsonl|kv|dump|ops)", re.ASCII)


class FilePiece(msgspec.Struct, frozen=True, array_like=True):
    """Bytes of a file, at an offset."""

    name: str
    at: int
    data: bytes


class Changes:
    """What has changed in a folder of watched processes since it was last asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sent: dict[str, int] = {}
        """of files that are only appended to: how many bytes"""
        self._segments: dict[str, list[bytes]] = {}
        self._headers: dict[str, bytes] = {}

    def pieces(self) -> Iterator[FilePiece]:
        """What is new, in the order in which it is to be written. A piece counts as sent once the next is asked for:
        one whose sending fails comes again."""
        try:
            names = sorted(path.name for path in self._folder.iterdir() if _NAME.fullmatch(path.name))
        except OSError:
            return
        stems = [name.removesuffix(".ops") for name in names if name.endswith(".ops")]
        ops = {stem: self._read_ops(f"{stem}.ops") for stem in stems}  # before the lines that they refer to
        for name in names:
            if name.endswith(APPENDED):
                yield from self._appended(name)
        for stem, (header, segments) in ops.items():
            yield from self._of_ops(f"{stem}.ops", header, segments)

    def _appended(self, name: str) -> Iterator[FilePiece]:
        try:
            with (self._folder / name).open("rb") as file:
                file.seek(self._sent.get(name, 0))
                while data := file.read(MOST_PIECE_BYTES):
                    at = self._sent.get(name, 0)
                    yield FilePiece(name, at, data)
                    self._sent[name] = at + len(data)
        except OSError:  # it is just being made, or was taken away
            return

    def _read_ops(self, name: str) -> tuple[bytes, list[bytes]]:
        """The header, and all segments that it counts."""
        try:
            with (self._folder / name).open("rb") as file:
                header = file.read(HEAD_BYTES)
                if len(header) < HEAD_BYTES or not any(header):
                    return b"", []
                (count,) = WORD.unpack_from(header, SEGMENTS_AT * WORD.size)
                file.seek(HEADER_BYTES)
                segments = [file.read(SEGMENT_BYTES) for _ in range(min(count, MOST_SEGMENTS))]
        except OSError:
            return b"", []
        return header, [one for one in segments if len(one) == SEGMENT_BYTES]

    def _of_ops(self, name: str, header: bytes, segments: list[bytes]) -> Iterator[FilePiece]:
        known = self._segments.setdefault(name, [])
        for number, data in enumerate(segments):
            if number == len(known):
                known.append(bytes(SEGMENT_BYTES))
            before = known[number]
            if data == before:
                continue
            for at in range(0, SEGMENT_BYTES, PIECE_BYTES):
                piece = data[at : at + PIECE_BYTES]
                if piece != before[at : at + PIECE_BYTES]:
                    yield FilePiece(name, HEADER_BYTES + number * SEGMENT_BYTES + at, piece)
            known[number] = data
        if header != self._headers.get(name, b""):
            yield FilePiece(name, 0, header)
            self._headers[name] = header


class Mirror:
    """Writes what `Changes` has found elsewhere into a folder, which is made."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._names: set[str] = set()

    def write(self, piece: FilePiece) -> None:
        """Raises MirrorError for a piece that no file of a watched process has, OSError."""
        self._names.add(piece.name)
        most = HEADER_BYTES + MOST_SEGMENTS * SEGMENT_BYTES if piece.name.endswith(".ops") else MOST_BYTES
        if (
            not _NAME.fullmatch(piece.name)
            or len(self._names) > 4 * MOST_FILES
            or piece.at < 0
            or piece.at + len(piece.data) > most
        ):
            raise MirrorError(
                f"a piece of {piece.name[:80]!r} at {piece.at} is of no file of a watched process"
            )
        path = self.folder / piece.name
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
        try:
            if piece.name.endswith(".ops"):
                self._make_whole(descriptor, piece)
            os.pwrite(descriptor, piece.data, piece.at)
        finally:
            os.close(descriptor)

    def _make_whole(self, descriptor: int, piece: FilePiece) -> None:
        """Segments of which only a part has changed are there as a whole: what was not sent is zero."""
        segments = -(-max(0, piece.at + len(piece.data) - HEADER_BYTES) // SEGMENT_BYTES)
        if not piece.at and len(piece.data) >= (SEGMENTS_AT + 1) * WORD.size:
            (count,) = WORD.unpack_from(piece.data, SEGMENTS_AT * WORD.size)
            segments = max(0, min(count, MOST_SEGMENTS))
        size = HEADER_BYTES + segments * SEGMENT_BYTES
        if os.fstat(descriptor).st_size < size:
            os.truncate(descriptor, size)


class MirrorError(DinferError, ValueError):
    """What another host has sent is of no watched process."""
