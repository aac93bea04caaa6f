"""Digests of rows that a watched process takes: of KV as it grows, and of tensors that the program names itself.

They go into `HOST-PID.kv`: a head of fixed size for each time that rows were added, then for each row two digests (K,
V), or one, and as many sketches, where such are taken. The file is only appended to, up to a limit; nobody who reads it
waits for its writer.
"""

import ctypes
import itertools
import os
import stat
import struct
import threading
import time
import weakref
from array import array
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from .captures import captures
from .records import NOTHING, NOWHERE, RecordsError, WatchedProcess

MAGIC = b"KVr1"
_HEAD = struct.Struct(
    "<4sIqqiiiiiiII"
)  # magic, name, at, seq, cache, layer, chunk, start, batch, count, columns, place
SKETCH_WORDS = 8
"""of 64 bits, which hold the numbers of one sketch as float32"""

MOST_BYTES = 512 * 2**20
MOST_WAITING = 4096
"""Digests on a device that are on their way to the host; if there are more, the oldest are dropped."""


SMALL_BYTES = 32 * 1024
"""So small rows on a CPU are copied, and digested together a moment later: where a layer's weights have just gone
through the cache, each call of torch takes ten microseconds, whatever it does."""

SERIAL_BYTES = 64 * 1024
"""So many of them are worked on at a time: for more torch uses threads, and would start some for the probe's thread."""

MOST_SMALL, MOST_SMALL_BYTES = 32, 512 * 1024
"""so many times that rows were added, or so many bytes, are digested at once at the latest"""


PAGED = 4
"""words of a row of a paged cache: digests of K and V, position, and the number of the request"""

LASTING_REQUEST = 1 << 40
"""From this on a number of a request is nobody else's later: positions that come again are those of a request that was
preempted, or of tokens that were proposed and rejected. Of smaller numbers they say that another request has begun."""

_COLUMNS = {PAGED: 2, 1: 1, 2: 2, 1 + SKETCH_WORDS: 1, 2 * (1 + SKETCH_WORDS): 2}
"""how many of the words of a row are digests"""


class RowsTaken(NamedTuple):
    """Rows that were added to a cache, or a tensor that was tapped."""

    name: str
    """`kv`, or what the program called it"""
    cache: int
    """which cache object of the process, in the order of their first use; 0 for taps"""
    layer: int | None
    chunk: int | None
    start: int
    """the place of the first row in its cache: of its first token"""
    digests: tuple[tuple[tuple[int, ...], ...], ...]
    """for each sequence of the batch, for each row: unsigned digests of 64 bits, of K and V, or of the tensor's row"""
    at_ns: int
    seq: int
    """how many ops the process had issued before"""
    dtype: str
    shape: tuple[int, ...]
    """of K, or of the tensor"""
    sketches: "array[float]" = array("f")
    """of [batch, rows, 1 or 2, 16]: see `digests.row_sketches`; empty if none were taken"""
    file: str = ""
    line: int = 0
    function: str = ""
    """who added them: as of an op; 0 if that is unknown"""
    is_paged: bool = False
    """they are of a paged cache, whose requests may share what is before their own rows"""


class _About(NamedTuple):
    """What is written of rows before them, but for their number."""

    name: int
    at_ns: int
    seq: int
    cache: int
    layer: int
    chunk: int
    start: int
    place: int


class RowsWriter:
    """The `.kv` file of this process."""

    def __init__(self, path: Path, names: Any) -> None:
        """`names`: numbers for (name, shape, dtype). Raises OSError."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o600)
        self._names, self._left = names, MOST_BYTES
        self._caches: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._next_cache = itertools.count(1)
        self._waiting: deque[tuple[Any, Any, _About]] = deque(maxlen=MOST_WAITING)
        self._small: deque[tuple[Any, _About]] = deque()
        # Reentrant: a signal's handler may add rows while its thread is here.
        self._digesting = threading.RLock()

    def number_of(self, cache: Any) -> int:
        """The number of a cache object, which is not kept alive."""
        found = self._caches.get(id(cache))
        if found is None or found[0]() is not cache:
            try:
                found = (weakref.ref(cache), next(self._next_cache))
            except TypeError:  # a plain tuple, as caches once were
                return 0
            self._caches[id(cache)] = found
        return found[1]

    def add(
        self, name: str, tensor: Any, digests: Any, cache: int, layer: int, chunk: int, start: int, seq: int,
        place: int = 0,
    ) -> bool:  # fmt: skip
        """Write the digests of rows, int64 [batch, rows, columns], with the words of their sketches behind. Returns
        False once the file has reached its limit. On CUDA they are written once they are there, without waiting for it.
        `place`: the number of the line that adds them. Raises OSError."""
        about = self._about(name, tensor, cache, layer, chunk, start, seq, place)
        # Also where none waits: another thread may be about to write older ones, and readers take the order for time.
        if not self.digest_small():
            return False
        if self._waiting:
            self.flush()
        if digests.device.type == "cpu":
            return self._write(digests, about)
        if digests.device.type != "cuda":
            return self._write(digests.cpu(), about)
        captures.unless_capturing(lambda: self._fetch(digests, about), wait_s=1)
        return True

    def add_small(
        self, name: str, tensor: Any, copied: Any, cache: int, layer: int, chunk: int, start: int, seq: int,
        place: int = 0,
    ) -> bool:  # fmt: skip
        """The same of rows on a CPU that are digested later. `copied`: a copy that is nobody else's, [batch, rows,
        columns, heads, width]."""
        self._small.append((copied, self._about(name, tensor, cache, layer, chunk, start, seq, place)))
        count = len(self._small)
        if count >= MOST_SMALL or count * copied.nbytes >= MOST_SMALL_BYTES:
            return self.digest_small()
        return True

    def digest_small(self, *, by_integers: bool = False) -> bool:
        """Digest and write what was added so. `by_integers`: without a library of others, whose locks a process would
        inherit that is forked meanwhile. Returns False once the file has reached its limit. Raises OSError."""
        import torch

        from .digests import digests_by_integers, digests_of

        if not self._digesting.acquire(timeout=1):
            return True  # another thread is at it, and will find these, too
        try:
            found = []
            with suppress(IndexError):
                while True:
                    found.append(self._small.popleft())
            is_written, digest = True, digests_by_integers if by_integers else digests_of
            for _, run in groupby(found, key=lambda one: (one[0].shape, one[0].dtype)):
                alike = list(run)
                most = max(1, SERIAL_BYTES // alike[0][0].nbytes)
                for at in range(0, len(alike), most):
                    copies, abouts = zip(*alike[at : at + most], strict=True)
                    together = digest(torch.stack(copies), 2)
                    parts = [self._bytes(one, about) for one, about in zip(together, abouts, strict=True)]
                    is_written = self._append(b"".join(parts)) and is_written
            return is_written
        finally:
            self._digesting.release()

    def _about(
        self, name: str, tensor: Any, cache: int, layer: int, chunk: int, start: int, seq: int, place: int
    ) -> _About:
        number = self._names.number((name, tuple(tensor.shape), tensor.dtype))
        return _About(number, time.monotonic_ns(), seq, cache, layer, chunk, start, place)

    def _fetch(self, digests: Any, about: _About) -> None:
        import torch

        host = torch.empty(digests.shape, dtype=torch.int64, device="cpu", pin_memory=True)
        host.copy_(digests, non_blocking=True)
        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(digests.device))
        self._waiting.append((event, host, about))

    def flush(self, wait_s: float = 0.0) -> int:
        """Write what has come from the device meanwhile, or comes within so many seconds. Returns how many are missing:
        a device that hangs delivers nothing."""
        if self._small:
            self.digest_small()
        deadline = time.monotonic() + wait_s
        while self._waiting:
            captures.unless_capturing(self._write_delivered)
            if time.monotonic() >= deadline:
                break
            time.sleep(0.002)
        return len(self._waiting)

    def _write_delivered(self) -> None:
        while self._waiting and self._waiting[0][0].query():
            _, host, about = self._waiting.popleft()
            self._write(host, about)

    def close(self) -> None:
        """Write no more: whoever tries gets an OSError."""
        descriptor, self._descriptor = self._descriptor, -1
        os.close(descriptor)

    def _write(self, digests: Any, about: _About) -> bool:
        return self._append(self._bytes(digests, about))

    def _bytes(self, digests: Any, about: _About) -> bytes:
        rows = digests.contiguous()
        *head, place = about
        return _HEAD.pack(MAGIC, *head, *rows.shape, place) + ctypes.string_at(rows.data_ptr(), rows.nbytes)

    def _append(self, data: bytes) -> bool:
        self._left -= len(data)
        if self._left < 0:
            return False
        os.write(self._descriptor, data)
        return True


def read_rows(folder: str | Path, process: WatchedProcess) -> list[RowsTaken]:
    """The rows that a process has taken digests of, in their order; [] if none. Raises RecordsError."""
    return list(each_rows(folder, process))


def each_rows(folder: str | Path, process: WatchedProcess) -> Iterator[RowsTaken]:
    """The same one after another, so that no more than one is in memory. Raises RecordsError."""
    return RowsReader(folder, process.name).more(process)


class RowsReader:
    """Reads the rows of one process while its file grows: each time on from where it has stopped."""

    def __init__(self, folder: str | Path, name: str) -> None:
        """`name`: of the process's files."""
        self._path = Path(folder) / f"{name}.kv"
        self.at, self._requests = 0, _Requests()
        """so many bytes of the file have been read"""

    def more(
        self, process: WatchedProcess, most_bytes: int = MOST_BYTES, *, waits: bool = False
    ) -> Iterator[RowsTaken]:
        """What has come since, of about so many bytes. `waits`: rows whose name is not known yet are left for later.
        Raises RecordsError."""
        path = self._path
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise RecordsError(f"{path}: it is not a plain file")
            if path.stat().st_size > MOST_BYTES:
                raise RecordsError(f"{path}: it has more than {MOST_BYTES:,} bytes")
            if path.stat().st_size <= self.at:
                return
            with path.open("rb") as file:
                yield from self._rows_in(file, process, self.at + most_bytes, waits)
        except FileNotFoundError:
            return
        except OSError as error:
            raise RecordsError(f"{path}: {error.strerror}") from None

    def _rows_in(
        self, file: BinaryIO, process: WatchedProcess, until: int, waits: bool
    ) -> Iterator[RowsTaken]:
        file.seek(self.at)
        while self.at < until and len(data := file.read(_HEAD.size)) == _HEAD.size:
            magic, name, time_ns, seq, cache, layer, chunk, start, batch, count, columns, at = _HEAD.unpack(
                data
            )
            size = batch * count * columns * 8
            if magic != MAGIC or min(batch, count, time_ns, seq) < 0 or columns not in _COLUMNS:
                raise RecordsError(f"{self._path}: it is damaged at byte {self.at}")
            if size and (size > MOST_BYTES or len(data := file.read(size)) < size):
                break  # being written, or the process was killed meanwhile
            is_known = name in process.taps and at in process.places
            if size and waits and name and not is_known:
                break
            self.at += _HEAD.size + size
            if not size:  # whatever the other number says
                continue
            numbers = array("Q")
            numbers.frombytes(data)
            text, shape, dtype = process.taps.get(name, ("", (), ""))
            about = (time_ns + process.clock, seq, dtype, shape)
            place = process.places.get(at, NOWHERE)
            if columns == PAGED:
                for one in self._requests.rows(text, _known(layer), _known(chunk), numbers, about):
                    yield one._replace(file=place[0], line=place[1], function=place[2])
                continue
            parts = _COLUMNS[columns]
            rows = [tuple(numbers[i : i + parts]) for i in range(0, len(numbers), columns)]
            sketches = array("f")
            if columns > parts:
                for i in range(0, len(numbers), columns):
                    sketches.frombytes(numbers[i + parts : i + columns].tobytes())
            digests = tuple(tuple(rows[one * count : (one + 1) * count]) for one in range(batch))
            yield RowsTaken(
                text, cache, _known(layer), _known(chunk), start, digests, *about, sketches, *place
            )


class _Requests:
    """Tells requests of a paged cache apart: as sequences, numbered in the order of their first row in a layer."""

    def __init__(self) -> None:
        self._newest: dict[tuple[int | None, int], tuple[int, int]] = {}
        """by layer and number, the sequence that has it now, and its last position"""
        self._counts: dict[int | None, int] = {}

    def rows(
        self, name: str, layer: int | None, chunk: int | None, words: "array[int]", about: tuple[Any, ...]
    ) -> list[RowsTaken]:
        """Rows of one write, by request, in runs of positions that follow each other."""
        found: list[RowsTaken] = []
        run: list[tuple[int, ...]] = []
        begun = (-1, -1)  # sequence and position of the run's first row

        def end() -> None:
            if run:
                digests = ((),) * begun[0] + (tuple(run),)
                taken = RowsTaken(name, 0, layer, chunk, begun[1], digests, *about)
                found.append(taken._replace(is_paged=True))

        for i in range(0, len(words), PAGED):
            k, v, position, number = words[i : i + PAGED]
            if position >= 1 << 63:  # padding
                continue
            sequence = self._sequence(layer, number, position)
            if (sequence, position) != (begun[0], begun[1] + len(run)):
                end()
                run, begun = [], (sequence, position)
            run.append((k, v))
        end()
        return found

    def _sequence(self, layer: int | None, number: int, position: int) -> int:
        sequence, last = self._newest.get((layer, number), (-1, -1))
        is_another = position <= last and number < LASTING_REQUEST
        if sequence < 0 or is_another:
            sequence = self._counts.get(layer, 0)
            self._counts[layer] = sequence + 1
        self._newest[layer, number] = (sequence, position)
        return sequence


def _known(number: int) -> int | None:
    return None if number == NOTHING else number
