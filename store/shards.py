"""The file of one shard, as Zarr's sharding codec defines it: chunks, then their index.

A chunk is one row. zarr-python reads and writes the same files, but takes about four times as
long to read one (3.1.6, and 3.4.2 by default), because it supports every layout
(benchmarks/RESULTS.md).
"""

from __future__ import annotations

import struct
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray

from store.format import COMPRESSION

_RESIDUE = google_crc32c.value(struct.pack("<I", google_crc32c.value(b"")))
MISSING = 2**64 - 1
"""Offset of a chunk that was never written."""


def encode_shard(values: NDArray[Any], rows_per_shard: int) -> list[bytes]:
    """The content of a shard file, in pieces; the last shard of an array may have fewer rows."""
    chunks = [encode_chunk(row) for row in values]
    index = np.full((rows_per_shard, 2), MISSING, "<u8")
    lengths = [len(chunk) for chunk in chunks]
    index[: len(chunks), 0] = np.cumsum([0, *lengths[:-1]])
    index[: len(chunks), 1] = lengths
    return [*chunks, _with_checksum(index.tobytes())]


def index_size(rows_per_shard: int) -> int:
    """Bytes of the index, at the end of the file."""
    return 16 * rows_per_shard + 4


def read_index(sealed: bytes, rows_per_shard: int) -> list[list[int]]:
    """Offset and length of each chunk; ValueError when the index is broken."""
    if len(sealed) != index_size(rows_per_shard) or not is_intact(sealed):
        raise ValueError("index is cut off or fails its checksum")
    index: list[list[int]] = np.frombuffer(sealed[:-4], "<u8").reshape(-1, 2).tolist()
    return index


def encode_chunk(row: NDArray[Any]) -> bytes:
    """One row: compressed, then its checksum."""
    packed: bytes = blosc.compress(
        np.ascontiguousarray(row),
        COMPRESSION["cname"].encode(),
        COMPRESSION["clevel"],
        blosc.BITSHUFFLE,
    )
    return _with_checksum(packed)


def decode_chunk(sealed: bytes, out: NDArray[Any]) -> bool:
    """Decompress one row into `out`; False if it is not what was written."""
    if not is_intact(sealed):
        return False
    try:
        blosc.decompress(memoryview(sealed)[:-4], out)
    except (RuntimeError, ValueError):
        return False
    return True


def is_sound(content: bytes, rows_per_shard: int) -> bool:
    """Whether index and chunks of a whole shard pass their checksums."""
    try:
        index = read_index(content[-index_size(rows_per_shard) :], rows_per_shard)
    except ValueError:
        return False
    return all(
        offset == MISSING or is_intact(content[offset : offset + length])
        for offset, length in index
    )


def _with_checksum(content: bytes) -> bytes:
    return content + struct.pack("<I", google_crc32c.value(content))


def is_intact(sealed: bytes) -> bool:
    """Whether the checksum at the end is right: content and checksum together give a constant."""
    return len(sealed) >= 4 and google_crc32c.value(sealed) == _RESIDUE
