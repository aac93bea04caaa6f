"""Writes what a watched process leaves in its folder; see `records` for the form."""

import itertools
import json
import mmap
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .records import (
    ANSWERED_AT,
    ASKED_AT,
    BEAT_AT,
    BODY_AT,
    DONE,
    FOLLOWED,
    FORMAT_AT,
    HEADER_BYTES,
    MAGIC,
    MAGIC_AT,
    MOST_LINES_BYTES,
    MOST_NAMES,
    MOST_SEGMENTS,
    NOTHING,
    NOW_AT,
    NUMBER,
    RECORD,
    RECORD_WORDS,
    SEGMENT_BYTES,
    SEGMENT_RECORDS,
    SEGMENTS_AT,
    VERSION,
    WAIT_PLACE,
    WAITED,
)

_FIRST = HEADER_BYTES // 8 - RECORD_WORDS
"""where the record of an op 0 would be"""

MOST_SKIPPED = 16
"""open ops that are passed over in search of one that can make room"""


class OpsWriter:
    """The records of this process's ops. Any thread may write; none waits for another, but while a segment is added."""

    def __init__(self, path: Path, most_segments: int = MOST_SEGMENTS) -> None:
        """Raises OSError."""
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        # One map of the whole file, which has holes until segments are reserved: each map holds a descriptor.
        self._reserve(0, HEADER_BYTES)
        os.ftruncate(self._descriptor, HEADER_BYTES + most_segments * SEGMENT_BYTES)
        self._map = mmap.mmap(self._descriptor, HEADER_BYTES + most_segments * SEGMENT_BYTES)
        self._words = memoryview(self._map).cast("q")
        self._most, self._reserved = most_segments * SEGMENT_RECORDS, 0
        self._count, self._reused = itertools.count(1), itertools.count()  # of ops, of reused places
        # Reentrant: a signal's handler may issue an op while its thread is adding a segment.
        self._growing = threading.RLock()
        self.issued = 0
        self._words[NOW_AT] = _pair(NOTHING, NOTHING)
        self._words[FORMAT_AT] = VERSION
        self._words[MAGIC_AT] = MAGIC

    def close(self) -> None:
        """Write no more: whoever tries gets a ValueError."""
        self._words.release()
        self._map.close()
        os.close(self._descriptor)

    def begin(
        self, now: int, kind: int, is_async: bool, group: int, peer: int, tag: int, place: int, form: int,
        thread: int, nbytes: int, layer: int, chunk: int, number: int,
    ) -> tuple[int, int]:  # fmt: skip
        """Record that an op is issued: where its record is, and what it must hold to be still this op's. Numbers stand
        for what the lines of the same number say. Who does not wait later waits from now on."""
        commit = next(self._count)
        base = _FIRST + commit * RECORD_WORDS if commit <= self._reserved else self._room(commit)
        waited, wait_place = (0, 0) if is_async else (now, place)
        RECORD.pack_into(
            self._words, base * 8, commit, now, waited, 0, number, kind, is_async, group, peer, tag, place, form,
            thread, nbytes, layer, chunk, wait_place, commit,
        )  # fmt: skip
        self.issued = commit
        return base, commit

    def waiting(self, base: int, commit: int, now: int, place: int) -> None:
        """Somebody begins to wait for the op. Only the first time counts."""
        words = self._words
        if words[base] == commit and not words[base + WAITED]:
            words[base + WAIT_PLACE] = place
            words[base + WAITED] = now

    def done(self, base: int, commit: int, now: int, failed: bool = False) -> None:
        """The op is over. Only the first time counts."""
        words = self._words
        if words[base] == commit and not words[base + DONE]:
            words[base + DONE] = -now if failed else now

    def is_done(self, base: int, commit: int) -> bool:
        """Whether the op's end is recorded, or the op has made room for another."""
        return self._words[base] != commit or self._words[base + DONE] != 0

    def set_number(self, base: int, commit: int, number: int, peer: int | None = None) -> None:
        """Another number, and the rank from which a recv from any rank has received."""
        words = self._words
        if words[base] == commit:
            words[base + NUMBER] = number
            if peer is not None:
                words[base + BODY_AT] = (words[base + BODY_AT] & 0xFFFFFFFF) | (peer << 32)

    def set_followed(self, base: int, commit: int) -> None:
        """Somebody has taken the op's future."""
        words = self._words
        if words[base] == commit:
            words[base + BODY_AT] |= FOLLOWED << 8

    def beat(self, now: int) -> None:
        """A sign of life."""
        self._words[BEAT_AT] = now

    def set_now(self, layer: int, chunk: int) -> None:
        """Layer and chunk that the process is in; NOTHING for none."""
        self._words[NOW_AT] = _pair(layer, chunk)

    @property
    def asked(self) -> int:
        """The number of the request for stacks that is unanswered; 0: none."""
        asked = int(self._words[ASKED_AT])
        return asked if asked != self._words[ANSWERED_AT] else 0

    def answered(self, number: int) -> None:
        """The stacks of this request are written."""
        self._words[ANSWERED_AT] = number

    def _room(self, commit: int) -> int:
        """Where the record of this op goes, beyond what is reserved."""
        with self._growing:
            while commit > self._reserved and self._reserved < self._most:
                start = HEADER_BYTES + self._reserved * RECORD_WORDS * 8
                try:
                    self._reserve(start, SEGMENT_BYTES)
                except OSError:
                    if not self._reserved:
                        raise
                    self._most = self._reserved  # the disk is full: go on in what there is
                    break
                self._reserved += SEGMENT_RECORDS
                self._words[SEGMENTS_AT] = self._reserved // SEGMENT_RECORDS
        if commit <= self._reserved:
            return _FIRST + commit * RECORD_WORDS
        # The place of an old op, rather of one that is over: who waits is what a hang is about.
        for _ in range(MOST_SKIPPED):
            base = _FIRST + (next(self._reused) % self._reserved + 1) * RECORD_WORDS
            if self._words[base + DONE]:
                break
        self._words[base] = 0
        return base

    def _reserve(self, start: int, length: int) -> None:
        """Raises OSError where the disk is full: written to unreserved, mapped memory would end the process then
        (SIGBUS)."""
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self._descriptor, start, length)


def _pair(layer: int, chunk: int) -> int:
    return (layer & 0xFFFFFFFF) | chunk << 32


class LinesWriter:
    """The lines of this process: each is one write at the end of the file, so that threads need no lock."""

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o600)
        self._left = MOST_LINES_BYTES

    def close(self) -> None:
        """Write no more: whoever tries gets an OSError."""
        descriptor, self._descriptor = self._descriptor, -1
        os.close(descriptor)

    def write(self, what: str, **fields: Any) -> bool:
        """Append a line. Returns False where the file has reached its limit. Raises OSError."""
        line = json.dumps({"is": what, **fields}, separators=(",", ":"), default=repr).encode() + b"\n"
        self._left -= len(line)
        if self._left < 0:
            return False
        os.write(self._descriptor, line)
        return True


class NumberedNames:
    """Numbers for values that many ops share. A value's line is written before its number is used."""

    def __init__(self, lines: LinesWriter, what: str, fields: Callable[[Any], dict[str, Any]]) -> None:
        self._lines, self._what, self._fields = lines, what, fields
        self.numbers: dict[Any, int] = {}
        """those that are given; to look here first is a call less"""
        self._next = itertools.count(1)

    def number(self, value: Any) -> int:
        """Its number; 0, which stands for none, once there are too many."""
        found = self.numbers.get(value)
        if found is None:
            found = next(self._next)
            if found > MOST_NAMES or not self._lines.write(self._what, id=found, **self._fields(value)):
                return 0
            self.numbers[value] = found
        return found


def host_in_names() -> str:
    """This host, as the names of the files of its processes begin: HOST-PID, or HOST-PID-COUNT."""
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in socket.gethostname())


class Records:
    """All that this process writes."""

    def __init__(self, folder: Path, hook: str, **about: Any) -> None:
        """Makes the files, and the folder if need be. `about`: more fields of the first line. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        host, pid = socket.gethostname(), os.getpid()
        stem = f"{host_in_names()}-{pid}"
        for count in itertools.count(
            1
        ):  # a process that replaced itself (exec) has the number of the one before
            self.name = stem if count == 1 else f"{stem}-{count}"
            try:
                self.lines = LinesWriter(folder / f"{self.name}.jsonl")
                break
            except FileExistsError:
                continue
        started = time.monotonic_ns()
        self.lines.write(
            "start",
            version=VERSION,
            host=host,
            pid=pid,
            parent=os.getppid(),
            argv=list(getattr(sys, "orig_argv", sys.argv)),
            python=sys.version.split()[0],
            hook=hook,
            clock_ns=time.time_ns() - started,
            started_ns=started,
            **about,
        )
        self.ops = OpsWriter(folder / f"{self.name}.ops")
        self.groups = NumberedNames(
            self.lines, "group", lambda value: dict(zip(_GROUP_FIELDS, value[1:], strict=True))
        )
        self.places = NumberedNames(
            self.lines, "place", lambda value: dict(zip(_PLACE_FIELDS, value, strict=True))
        )
        self.forms = NumberedNames(self.lines, "form", _form_fields)
        self.threads = NumberedNames(
            self.lines, "thread", lambda value: {"name": value[1], "ident": value[0]}
        )

    def close(self) -> None:
        """Write no more, and let go of the files."""
        self.ops.close()
        self.lines.close()


def _form_fields(form: Any) -> dict[str, Any]:
    shape, dtype, device = form
    return {"shape": list(shape), "dtype": str(dtype).rpartition(".")[2], "device": device}


_GROUP_FIELDS = ("name", "ranks", "backend", "description")
_PLACE_FIELDS = ("file", "line", "function")
