"""PNG: pixels with a palette as a picture file, and that as an address that holds it. Pure."""

import struct
import zlib
from base64 import b64encode

import numpy as np
from numpy.typing import NDArray

SIGNATURE = b"\x89PNG\r\n\x1a\n"
BITS, WITH_PALETTE = 8, 3


def png(pixels: NDArray[np.uint8], palette: NDArray[np.uint8]) -> bytes:
    """`pixels`, [rows, columns], are places in the palette, [colours, 3]. See the PNG specification, W3C 2003."""
    rows, columns = pixels.shape
    unfiltered = np.concatenate(
        [np.zeros((rows, 1), np.uint8), pixels], axis=1
    )  # each row says how it is filtered
    head = struct.pack(">IIBBBBB", columns, rows, BITS, WITH_PALETTE, 0, 0, 0)
    parts = ((b"IHDR", head), (b"PLTE", palette.tobytes()), (b"IDAT", zlib.compress(unfiltered.tobytes(), 9)))
    return SIGNATURE + b"".join(_part(*part) for part in (*parts, (b"IEND", b"")))


def data_uri(picture: bytes) -> str:
    """For an `<img src>`."""
    return f"data:image/png;base64,{b64encode(picture).decode()}"


def _part(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
