"""Store format 2: names, dtypes, chunking and codecs, and what the group attribute holds.

docs/store-format.md describes the same for other readers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from zarr.codecs import BloscCodec, Crc32cCodec

from store.errors import SemgenError

FORMAT: Final = 2
"""What is written. Format 1, without the tables of `_NEW_IN_2`, is still read."""
ATTRIBUTE: Final = "semgen"
"""Name of the group attribute with format, state, fingerprint, config, software and stages."""
DIGESTS: Final = "shard_sha256"
"""Name of the attribute of a sharded array with the SHA-256 of each shard's decoded values."""
AUTOENCODER_FILE: Final = "scans/embedding/autoencoder.safetensors"
"""The weights that made `scans/embedding`, in the folder of that array."""
SURVEY_VERSION: Final = 3
"""Version of the survey; increased when the same files and settings give another scan, frame box or
thumbnail, or more tables. Stored as `version` of stage `survey`; older stores have none, which
means 1. From version 3 on, there are the tables of `STATISTICS`."""
SPLITS: Final = ("train", "validation")
THUMBNAIL_SHAPE: Final = (64, 128, 128)


class StoreError(SemgenError):
    """The store cannot be used as requested."""


class Unreachable(StoreError):
    """A server does not answer, fails or denies access; this says nothing about the store."""


class CorruptStore(StoreError):
    """Stored crops fail their checksum or are missing.

    Attributes: `split` ("train" or "validation") and `rows`, the broken rows in order. A worker of
    PyTorch's DataLoader passes on the message alone, which names both.
    """

    def __init__(self, message: str, split: str = "", rows: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.split = split
        self.rows = list(rows)

    @classmethod
    def of_rows(cls, split: str, rows: Sequence[int]) -> CorruptStore:
        return cls(
            f"{split} rows {format_rows(rows)}: checksum failed or data missing; run `semgen"
            " verify` for a full list; restore the files from a backup, or delete the store and"
            " prepare it again",
            split,
            rows,
        )


COMPRESSION: Final[dict[str, Any]] = {"cname": "lz4", "clevel": 9}
"""Settings of Blosc; with bit shuffling (docs/design/0008-codec.md)."""


@dataclass(frozen=True, slots=True)
class Table:
    """A small array that is read at once: its dtype and the names of its dimensions."""

    dtype: str
    dimensions: tuple[str, ...]


SCAN_TABLES: Final = {
    "id": Table("uint64", ("scan",)),
    "patient": Table("int32", ("scan",)),
    "split": Table("uint8", ("scan",)),
    "spacing_mm": Table("float64", ("scan", "axis")),
    "size": Table("int32", ("scan", "axis")),
    "frame_mm": Table("float64", ("scan", "corner", "axis")),
    "mean_hu": Table("float64", ("scan",)),
    "std_hu": Table("float64", ("scan",)),
    "embedding": Table("float32", ("scan", "feature")),
}
CLASS_TABLES: Final = {
    "reference": Table("int32", ("label",)),
    "centre": Table("float64", ("label", "axis")),
    "neighbour": Table("int32", ("label", "member")),
    "distance": Table("float32", ("label", "member")),
    "validation_neighbour": Table("int32", ("label", "validation_member")),
    "validation_distance": Table("float32", ("label", "validation_member")),
    "body_share": Table("float32", ("label",)),
    "place_mm": Table("float64", ("label", "member", "axis")),
    "score": Table("float32", ("label", "member")),
    "cycle_mm": Table("float32", ("label", "member")),
    "validation_place_mm": Table("float64", ("label", "validation_member", "axis")),
    "validation_score": Table("float32", ("label", "validation_member")),
    "validation_cycle_mm": Table("float32", ("label", "validation_member")),
}
ROW_TABLES: Final = {
    "label": Table("int32", ("row",)),
    "scan": Table("int32", ("row",)),
    "scale": Table("uint8", ("row",)),
    "origin_mm": Table("float64", ("row", "axis")),
    "extent_mm": Table("float64", ("row", "axis")),
}
TABLES: Final[dict[str, Table]] = {
    **{f"scans/{name}": table for name, table in SCAN_TABLES.items()},
    **{f"classes/{name}": table for name, table in CLASS_TABLES.items()},
    **{f"{split}/{name}": table for split in SPLITS for name, table in ROW_TABLES.items()},
}
"""Every table of a complete store by its path."""
_NEW_IN_2 = {
    f"classes/{name}"
    for name in (
        "body_share",
        *(f"{prefix}{name}" for prefix in ("", "validation_") for name in
          ("place_mm", "score", "cycle_mm")),
    )
}  # fmt: skip
STATISTICS: Final = ("scans/mean_hu", "scans/std_hu")
SHARDED: Final = {
    "scans/thumbnail": ("scan", "z", "y", "x"),
    **{f"{split}/patch": ("row", "z", "y", "x") for split in SPLITS},
}
"""The arrays that are written shard by shard, and the names of their dimensions."""


def tables_of(attribute: Mapping[str, Any]) -> dict[str, Table]:
    """The tables of a store by path, from its group attribute; a format 1 store has fewer."""
    missing: set[str] = set()
    if attribute["format"] == 1:
        missing |= _NEW_IN_2
    if survey_version(attribute["stages"]) < 3:
        missing |= {*STATISTICS}
    return {name: table for name, table in TABLES.items() if name not in missing}


def survey_version(stages: Mapping[str, Any]) -> int:
    """Version of a store's finished survey, from what its stages recorded; 1 if none is."""
    return int(stages.get("survey", {}).get("version", 1))


def format_rows(rows: Sequence[int], limit: int = 8) -> str:
    """Rows as text, consecutive rows as ranges: `3, 7-12, ... (40 in all)`.

    >>> format_rows([3, 7, 8, 9])
    '3, 7-9'
    """
    ranges: list[tuple[int, int]] = []
    for row in sorted(rows):
        if ranges and row == ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], row)
        else:
            ranges.append((row, row))
    shown = [str(low) if low == high else f"{low}-{high}" for low, high in ranges[:limit]]
    more = f", ... ({len(rows)} in all)" if len(ranges) > limit else ""
    return ", ".join(shown) + more


def codecs(itemsize: int) -> list[Any]:
    """The chunk codecs of an array: `COMPRESSION`, then a CRC-32C."""
    return [BloscCodec(**COMPRESSION, shuffle="bitshuffle", typesize=itemsize), Crc32cCodec()]
