"""Files that others have damaged or made: mutations of a good one, and readers under limits of time and memory.

Not a test.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import deepcopy
from math import ceil
from pathlib import Path
from time import process_time
from typing import Any

import pytest
from hypothesis import strategies as st

from dinfer.errors import DinferError

CPU_S = 2
"""seconds of computing that one hostile file may cost; the kernel counts whole ones, so one more may pass"""

USUAL_S = 0.065
"""seconds of computing that `_slowness` takes on a core of its own"""

MEMORY_MB = 500

DEADLINE_S = 240.0

LIMITED = pytest.mark.skipif(sys.platform != "linux", reason="reads the size of a process from /proc")

_CHILD = """
import json, math, os, resource, sys, time
{imports}
from dinfer.errors import DinferError

def read(path):
    {read}

for path in sys.argv[1:]:
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * os.sysconf("SC_PAGESIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + {memory}, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time()) + {seconds}, resource.RLIM_INFINITY))
    try:
        read(path)
        said = ""
    except DinferError as error:
        said = f"{{type(error).__name__}}: {{error}}"
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(json.dumps([path, said]), flush=True)
"""


def read_limited(imports: str, read: str, paths: Sequence[Path]) -> dict[str, str]:
    """Read files in another process, each within CPU_S and MEMORY_MB: by the file's name, what dinfer's error says of
    it, "" if it was read. `imports`, `read`: Python, the latter with a `path`."""
    seconds = ceil(CPU_S * _slowness())
    text = _CHILD.format(imports=imports, read=read, memory=MEMORY_MB << 20, seconds=seconds)
    ended = subprocess.run(
        [sys.executable, "-c", text, *map(str, paths)],
        capture_output=True, text=True, timeout=DEADLINE_S, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    found = [json.loads(line) for line in ended.stdout.splitlines()]
    assert ended.returncode == 0, f"after {[Path(path).name for path, _ in found]}:\n{ended.stderr}"
    return {Path(path).name: said for path, said in found}


def _slowness() -> float:
    """How much more CPU time this machine takes now than the one that CPU_S is meant for: others may share a core."""
    before = process_time()
    sum(range(5_000_000))
    return max(1.0, (process_time() - before) / USUAL_S)


def read_or_refused(read: Callable[[], object]) -> str:
    """What dinfer's error says, "" for none. Any other error fails the test."""
    try:
        read()
    except DinferError as error:
        said = str(error)
    else:
        return ""
    assert said
    said.encode("utf-8", "surrogateescape")  # it can be printed
    return said


# -- mutations

ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**12, 10**30, 0.5, -0.0, 1e308, "", "x", "\0", "-1", "1e9", "é" * 50,
    [], {}, [[]], [None], [-1], [10**12], {"": None}, [[[[[]]]]], "../../etc/passwd", "\u2028",
]  # fmt: skip
"""values that are right in few places"""


@st.composite
def mutated_json(draw: st.DrawFn, value: Any, most: int = 2) -> Any:
    """A copy with up to `most` values replaced by odd ones, left out, repeated or put in each other's place."""
    made = deepcopy(value)
    for _ in range(draw(st.integers(1, most))):
        places = list(_places(made))
        if not places:
            return deepcopy(draw(st.sampled_from(ODD)))
        holder, key = draw(st.sampled_from(places))
        match draw(st.sampled_from(["odd", "odd", "drop", "repeat", "other"])):
            case "odd":
                holder[key] = deepcopy(draw(st.sampled_from(ODD)))
            case "drop":
                del holder[key]
            case "repeat" if isinstance(holder, list):
                holder.insert(key, holder[key])
            case _:
                other, name = draw(st.sampled_from(places))
                with suppress(IndexError, KeyError):
                    holder[key] = deepcopy(other[name])
    return made


def _places(value: Any) -> Any:
    """Every (container, key) in it; of long lists the first and last few."""
    items: list[Any] = list(value.items() if isinstance(value, dict) else [])
    items += enumerate(value) if isinstance(value, list) else []
    for key, inner in items if len(items) <= 40 else [*items[:5], *items[-5:]]:
        yield value, key
        yield from _places(inner)


@st.composite
def mutated_bytes(draw: st.DrawFn, data: bytes, most: int = 3) -> bytes:
    """A copy with up to `most` pieces cut out, repeated, overwritten or inserted, most of them near the start."""
    made = bytearray(data)
    pieces = st.binary(max_size=8) | st.sampled_from(
        [
            b"\0",
            b"\xff\xfe",
            b"\xed\xa0\x80",
            b"9" * 30,
            b"-",
            b"NaN",
            b"[" * 300,
            b"\n",
            b"\xff" * 8,
            b"1e400",
        ]
    )
    for _ in range(draw(st.integers(1, most))):
        at = draw(st.integers(0, len(made)) | st.integers(0, min(len(made), 200)))
        long = draw(st.integers(0, 40) | st.just(len(made)))
        match draw(st.sampled_from(["cut", "repeat", "over", "insert"])):
            case "cut":
                del made[at : at + long]
            case "repeat":
                made[at:at] = made[at : at + long]
            case "over":
                piece = draw(pieces)
                made[at : at + len(piece)] = piece
            case _:
                made[at:at] = draw(pieces)
    return bytes(made)
