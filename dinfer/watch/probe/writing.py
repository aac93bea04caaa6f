"""Writes what a watched process leaves in its folder; see `records` for the form."""

import itertools
import json
import mmap
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .records import (
    ANSWERED_AT,
    ASKED_AT,
    BEAT_AT,
    BODY,
    BODY_AT,
    DONE,
    FAILED,
    FORMAT_AT,
    HEADER_BYTES,
    ISSUED,
    LAST,
    MAGIC,
    MAGIC_AT,
    MOST_LINES_BYTES,
    MOST_NAMES,
    MOST_SEGMENTS,
    NOTHING,
    NOW_AT,
    RECORD_WORDS,
    SEGMENT_BYTES,
    SEGMENT_RECORDS,
    SEGMENTS_AT,
    STATE,
    VERSION,
    WAIT_PLACE,
    WAITED,
    WORD,
)


def _map(descriptor: int, start: int, length: int) -> memoryview:
    """Words of the file, which grows to hold them. Raises OSError where the disk is full: written to unreserved, mapped
    memory would end the process then (SIGBUS)."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, start, length)
    else:
        os.ftruncate(descriptor, start + length)
    return memoryview(mmap.mmap(descriptor, length, offset=start)).cast("q")


class Ticket(NamedTuple):
    """Where the record of an op is: for what is known of it later."""

    words: memoryview
    base: int
    commit: int


class OpsWriter:
    """The records of this process's ops. Any thread may write; none waits for another, but while a segment is added."""

    def __init__(self, path: Path, most_segments: int = MOST_SEGMENTS) -> None:
        """Raises OSError."""
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._header = _map(self._descriptor, 0, HEADER_BYTES)
        self._segments: list[memoryview] = []
        self._most = most_segments
        self._count, self._slots = itertools.count(), itertools.count()
        # Reentrant: a signal's handler may issue an op while its thread is adding a segment.
        self._growing = threading.RLock()
        self.issued = 0
        self._header[NOW_AT] = _pair(NOTHING, NOTHING)
        self._header[FORMAT_AT] = VERSION
        self._header[MAGIC_AT] = MAGIC

    def begin(
        self, now: int, kind: int, is_async: bool, group: int, peer: int, tag: int, place: int, form: int,
        thread: int, nbytes: int, layer: int, chunk: int,
    ) -> Ticket:  # fmt: skip
        """Record that an op is issued. Numbers stand for what the lines of the same number say."""
        words, base = self._room(next(self._slots))
        commit = next(self._count) + 1
        words[base] = words[base + LAST] = 0
        words[base + ISSUED] = now
        words[base + WAITED] = words[base + DONE] = words[base + STATE] = words[base + WAIT_PLACE] = 0
        BODY.pack_into(
            words, (base + BODY_AT) * 8, kind, is_async, group, peer, tag, place, form, thread, nbytes, layer, chunk
        )  # fmt: skip
        words[base + LAST] = commit
        words[base] = commit
        self.issued = commit
        return Ticket(words, base, commit)

    def waiting(self, ticket: Ticket, now: int, place: int) -> None:
        """Somebody begins to wait for the op. Only the first time counts."""
        words, base, commit = ticket
        if words[base] == commit and not words[base + WAITED]:
            words[base + WAIT_PLACE] = place
            words[base + WAITED] = now

    def done(self, ticket: Ticket, now: int, failed: bool = False) -> None:
        """The op is over. Only the first time counts."""
        words, base, commit = ticket
        if words[base] == commit and not words[base + DONE]:
            words[base + STATE] = FAILED if failed else 0
            words[base + DONE] = now

    def is_done(self, ticket: Ticket) -> bool:
        """Whether the op's end is recorded, or the op has made room for another."""
        words, base, commit = ticket
        return words[base] != commit or words[base + DONE] != 0

    def set_peer(self, ticket: Ticket, peer: int) -> None:
        """The rank from which a receive from any rank has received."""
        words, base, commit = ticket
        if words[base] == commit:
            words[base + BODY_AT] = (words[base + BODY_AT] & 0xFFFFFFFF) | (peer << 32)

    def beat(self, now: int) -> None:
        """A sign of life."""
        self._header[BEAT_AT] = now

    def set_now(self, layer: int, chunk: int) -> None:
        """Layer and chunk that the process is in; NOTHING for none."""
        self._header[NOW_AT] = _pair(layer, chunk)

    @property
    def asked(self) -> int:
        """The number of the request for stacks that is unanswered; 0: none."""
        asked = int(self._header[ASKED_AT])
        return asked if asked != self._header[ANSWERED_AT] else 0

    def answered(self, number: int) -> None:
        """The stacks of this request are written."""
        self._header[ANSWERED_AT] = number

    def _room(self, slot: int) -> tuple[memoryview, int]:
        number, place = divmod(slot, SEGMENT_RECORDS)
        if number >= len(self._segments):
            if len(self._segments) < self._most:
                self._grow(number)
            if number >= len(self._segments):
                return self._reused(slot)
        return self._segments[number], place * RECORD_WORDS

    def _grow(self, number: int) -> None:
        with self._growing:
            while number >= len(self._segments) and len(self._segments) < self._most:
                start = HEADER_BYTES + len(self._segments) * SEGMENT_BYTES
                try:
                    self._segments.append(_map(self._descriptor, start, SEGMENT_BYTES))
                except OSError:
                    if not self._segments:
                        raise
                    self._most = len(self._segments)  # the disk is full: go on in what there is
                self._header[SEGMENTS_AT] = len(self._segments)

    def _reused(self, slot: int) -> tuple[memoryview, int]:
        """The place of an old op, rather of one that is over. Who waits is what a hang is about."""
        capacity = len(self._segments) * SEGMENT_RECORDS
        for _ in range(64):
            number, place = divmod(slot % capacity, SEGMENT_RECORDS)
            words, base = self._segments[number], place * RECORD_WORDS
            if words[base + DONE]:
                break
            slot = next(self._slots)
        return words, base


def _pair(layer: int, chunk: int) -> int:
    return int(WORD.unpack(struct.pack("<ii", layer, chunk))[0])


class LinesWriter:
    """The lines of this process: each is one write at the end of the file, so that threads need no lock."""

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o600)
        self._left = MOST_LINES_BYTES

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
        self._numbers: dict[Any, int] = {}
        self._next = itertools.count(1)

    def number(self, value: Any) -> int:
        """Its number; 0, which stands for none, once there are too many."""
        found = self._numbers.get(value)
        if found is None:
            found = next(self._next)
            if found > MOST_NAMES or not self._lines.write(self._what, id=found, **self._fields(value)):
                return 0
            self._numbers[value] = found
        return found


class Records:
    """All that this process writes."""

    def __init__(self, folder: Path, hook: str, **about: Any) -> None:
        """Makes the files, and the folder if need be. `about`: more fields of the first line. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        host, pid = socket.gethostname(), os.getpid()
        stem = f"{''.join(c if c.isalnum() or c in '._-' else '_' for c in host)}-{pid}"
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


def _form_fields(form: Any) -> dict[str, Any]:
    shape, dtype = form
    return {"shape": list(shape), "dtype": str(dtype).rpartition(".")[2]}


_GROUP_FIELDS = ("name", "ranks", "backend", "description")
_PLACE_FIELDS = ("file", "line", "function")
