"""Who calls: the line of the first frame outside torch, the probe and dinfer, and what its variables say of layer and
chunk.

A look takes a few microseconds: what is known of a code object is kept. No user code runs, and no reference to a local
variable stays behind.
"""

import os
import sys
import sysconfig
import threading
from types import CodeType, FrameType
from typing import Any

from .records import NOTHING

LAYER_NAMES = (
    "layer_idx", "i_layer", "layer_id", "layer", "layer_index", "layer_num", "layer_number", "idx_layer", "l_idx",
)  # fmt: skip
CHUNK_NAMES = (
    "chunk_idx", "i_chunk", "chunk_id", "chunk", "chunk_index", "chunk_num", "micro_batch", "microbatch", "mb",
    "mb_idx", "mb_index", "mb_id", "i_mb", "micro_batch_idx", "micro_batch_id", "micro_batch_index", "microbatch_idx",
    "microbatch_id", "microbatch_index",
)  # fmt: skip

NEAR_FRAMES = 6
"""So many of the user's own frames are searched for a layer and a chunk, and so many of packages before them."""
DEEPEST = 100

_OPTIMIZED = 0x1
_LIVE_LOCALS = sys.version_info >= (3, 13)
_SEPARATOR = os.sep

_own = os.path.dirname(os.path.abspath(__file__)) + _SEPARATOR
_standard = tuple(sysconfig.get_paths()[key] + _SEPARATOR for key in ("stdlib", "platstdlib"))

USER, LIBRARY, STANDARD, INTERNAL = range(4)
"""Whose code it is: the user's, an installed package's, Python's, or torch's, the probe's and dinfer's."""


def _internal_folders() -> tuple[str, ...]:
    found = [_own]
    for name in ("torch", "dinfer"):
        package = sys.modules.get(name)
        file = getattr(package, "__file__", None)
        if file:
            found.append(os.path.dirname(os.path.abspath(file)) + _SEPARATOR)
    return tuple(found)


def whose(file: str) -> int:
    """Whose code a file is."""
    if file.startswith(("<frozen ", "<eval_with_key>")) or file.startswith(_internal_folders()):
        return INTERNAL
    if "torchinductor" in file:  # what torch.compile has written
        return INTERNAL
    if f"{_SEPARATOR}site-packages{_SEPARATOR}" in file or f"{_SEPARATOR}dist-packages{_SEPARATOR}" in file:
        return LIBRARY
    return STANDARD if file.startswith(_standard) else USER


Place = tuple[str, int, str]
"""file, line, function"""


class _Code:
    """What is known of a code object."""

    __slots__ = (
        "blocking",
        "chunks",
        "code",
        "copied",
        "flag",
        "internal",
        "issues",
        "layers",
        "library",
        "owner",
        "places",
        "standard",
        "tells",
    )

    def __init__(self, code: CodeType) -> None:
        self.code = code  # so that its id is not used again
        whose_code = whose(code.co_filename)
        self.internal, self.standard = whose_code == INTERNAL, whose_code == STANDARD
        self.library = whose_code == LIBRARY
        optimized = bool(code.co_flags & _OPTIMIZED)
        self.copied = optimized and not _LIVE_LOCALS
        names = {*code.co_varnames, *code.co_cellvars, *code.co_freevars} if optimized else {*code.co_names}
        self.layers = tuple(name for name in LAYER_NAMES if name in names)
        self.chunks = tuple(name for name in CHUNK_NAMES if name in names)
        self.owner = "self" in names
        self.tells = bool(self.layers or self.chunks or self.owner)
        is_c10d = self.internal and code.co_filename.endswith("distributed_c10d.py")
        self.blocking = is_c10d and code.co_name in ("send", "recv")
        # Where Python issues ops; others of torch's files call C++ code that issues and waits by itself, as DDP does.
        issuers = ("distributed_c10d.py", "_functional_collectives.py", f"torch{_SEPARATOR}_ops.py")
        self.issues = not self.internal or code.co_filename.endswith(issuers)
        self.flag = is_c10d and "async_op" in names
        self.places: dict[int, Place] = {}


_codes: dict[int, _Code] = {}
_MOST_CODES = 20_000


def _known(code: CodeType) -> _Code:
    found = _codes.get(id(code))
    if found is None:
        if len(_codes) > _MOST_CODES:
            _codes.clear()
        found = _codes[id(code)] = _Code(code)
    return found


def seen_from(
    frame: FrameType | None, want_async: bool, want_layer: bool, want_chunk: bool
) -> tuple[Place, int, int, bool, bool, Any]:
    """Where an op was called, seen from `frame` outwards, no further than it takes to find what is wanted: the place,
    layer and chunk (NOTHING where unknown), whether it was called by torch.distributed's `send` or `recv`, which wait,
    whether by C++ code of torch's, which waits by itself, and what the caller of a collective gave for `async_op` (None
    if that is not wanted, or not there). A plain tuple, as this is called for each op."""
    blocking, async_op, known = False, None, _codes.get
    code = None if frame is None else known(id(frame.f_code)) or _known(frame.f_code)
    in_cpp = code is not None and not code.issues
    while frame is not None and code is not None and code.internal:
        if code.blocking:
            blocking = True
        elif want_async and code.flag and async_op is None:
            async_op = _locals(frame, code, ("async_op",), (), False)[0]
        frame = frame.f_back
        code = None if frame is None else known(id(frame.f_code)) or _known(frame.f_code)
    layer = chunk = NOTHING
    place: Place | None = None
    is_package = False
    outermost = ("", 0, "")
    mine = libraries = deep = 0
    while frame is not None and code is not None and deep < DEEPEST:
        if code.standard:
            outermost = _place(frame, code)
        elif not code.internal:
            if place is None:
                place, is_package = code.places.get(frame.f_lasti) or _place(frame, code), code.library
            elif is_package and not code.library:
                place, is_package = _through(place, _place(frame, code)), False
            if code.library:
                libraries += 1
            else:
                mine += 1
            if code.tells and (not code.library or libraries <= NEAR_FRAMES):
                layers, owner = (code.layers, code.owner) if want_layer else ((), False)
                chunks = code.chunks if want_chunk else ()
                if layers or chunks or owner:
                    found_layer, found_chunk = _locals(frame, code, layers, chunks, owner)
                    if found_layer is not None:
                        layer, want_layer = found_layer, False
                    if found_chunk is not None:
                        chunk, want_chunk = found_chunk, False
            if not is_package and (not (want_layer or want_chunk) or mine == NEAR_FRAMES):
                break
        deep += 1
        frame = frame.f_back
        code = None if frame is None else known(id(frame.f_code)) or _known(frame.f_code)
    return place or outermost, layer, chunk, blocking, in_cpp, async_op


_throughs: dict[tuple[Place, Place], Place] = {}


def _through(package: Place, user: Place) -> Place:
    """A line of an installed package, with the user's line from which it was reached: the one to mend is that."""
    found = _throughs.get((package, user))
    if found is None:
        if len(_throughs) > _MOST_CODES:
            _throughs.clear()
        file, line, function = user
        name = "cell" if "ipykernel_" in file else os.path.basename(file)
        told = f"{package[2]}, called at {name}:{line} in {function}"
        found = _throughs[package, user] = (*package[:2], told)
    return found


def place_of(frame: FrameType | None) -> Place:
    """The line alone."""
    outermost, deep = ("", 0, ""), 0
    while frame is not None and deep < DEEPEST:
        deep += 1
        code = _codes.get(id(frame.f_code)) or _known(frame.f_code)
        if not code.internal:
            outermost = _place(frame, code)
            if not code.standard:
                break
        frame = frame.f_back
    return outermost


def _place(frame: FrameType, code: _Code) -> Place:
    # By the instruction: to find its line, Python goes through the function's table of lines.
    found = code.places.get(frame.f_lasti)
    if found is None:
        found = code.places[frame.f_lasti] = (code.code.co_filename, frame.f_lineno or 0, code.code.co_name)
    return found


def _locals(
    frame: FrameType, code: _Code, layers: tuple[str, ...], chunks: tuple[str, ...], owner: bool
) -> tuple[Any, Any]:
    """Of each of these variables the first that is a number; if none of the layers' is, the layer that `self` says it
    is."""
    # Before 3.13 the variables of a function come as a copy that the frame keeps: emptied, lest it keep tensors alive.
    # But not where the user's own `locals()` holds the same copy.
    found = frame.f_locals
    try:
        layer = _first(found, layers) if layers else None
        if layer is None and owner:
            layer = _layer_of(found.get("self"))
        return layer, _first(found, chunks) if chunks else None
    finally:
        if code.copied and sys.getrefcount(found) <= 3:
            found.clear()


def _first(found: Any, names: tuple[str, ...]) -> int | None:
    for name in names:
        value = found.get(name)
        kind = type(value)
        if (kind is int and NOTHING < value < 2**31) or (kind is bool and name == "async_op"):
            return value  # type: ignore[no-any-return]
    return None


def _fits(value: int) -> bool:
    return NOTHING < value < 2**31


def _layer_of(owner: Any) -> int | None:
    """The number that a module has as its layer's, found without running its code."""
    try:
        attributes = object.__getattribute__(owner, "__dict__")
    except AttributeError:
        return None
    for name in ("layer_idx", "layer_id", "layer_number"):
        value = attributes.get(name)
        if type(value) is int and _fits(value):
            return value
    return None


def thread_name() -> tuple[int, str]:
    """Number and name of the current thread, without making an object for one that Python does not know."""
    ident = threading.get_ident()
    thread = threading._active.get(ident)  # type: ignore[attr-defined]
    return ident, thread.name if thread is not None else f"thread {ident}"
