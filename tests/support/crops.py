"""A store with one sharded array of noise, and ways to damage its files."""

from pathlib import Path

import zarr

NUM_ROWS, ROWS_PER_SHARD = 21, 4
CROP = (4, 6, 5)
NAME = "train/patch"


def shard_file(path: Path, shard: int) -> Path:
    return path / NAME / f"c/{shard}/0/0/0"


def flip_bit(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 4
    file.write_bytes(content)


def change_attribute(path: Path, name: str, value: object) -> None:
    group = zarr.open_group(str(path), mode="r+")
    group.attrs["semgen"] = {**group.attrs["semgen"], name: value}  # type: ignore[dict-item]
