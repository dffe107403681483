"""Damage every file of a store: does `semgen verify` find it?

    python -m tests.campaigns.corrupt [STORE] --cases 600
    python -m tests.campaigns.corrupt [STORE] --block 64

The first deletes each file once, and then cuts files off at random places. The second flips one bit
in each block of 64 bytes of metadata, tables and both ends of larger files, where headers and
indexes of shards are, and in each block of 64 x 64 bytes between. With a block of 1, every byte of
the former is changed. Another seed chooses other bytes: those of 8 seeds in a row are evenly
spread.

A case counts as harmless when another reader (zarr-python, safetensors) still sees the same values
and settings, and `semgen inspect` works; of all others `verify` must catch every one. STORE is
copied, not changed; without one, a small one is prepared.
"""

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import zarr
from safetensors.torch import load_file

from pipeline.phantom.files import write_archive
from store import PatchStore
from store.format import AUTOENCODER_FILE, SHARDED, SPLITS, TABLES, StoreError
from store.inspect import describe_store
from store.verification import verify
from tests.support.command import run_semgen
from tests.support.settings import SETTINGS

_EDGE, _COARSER = 2048, 64
"""Bytes at both ends of a file that are gone through in small blocks; how much larger a block is
between them."""
_STAGES, _COUNTED = ("survey", "embed", "discover"), ("accepted", "classes")
"""What stages recorded that the tables tell, too; nothing else can be compared."""


def seen(store: Path) -> str:
    """A digest of all that another reader gets from a store, or the name of its error."""
    try:
        group = zarr.open_group(str(store), mode="r")
        facts = dict(group.attrs["semgen"])
        kept = {name: facts[name] for name in ("format", "state", "fingerprint", "config")}
        stages = {name: [facts["stages"][name].get(k) for k in _COUNTED] for name in _STAGES}
        total = hashlib.sha256(json.dumps([kept, stages], sort_keys=True).encode())
        describe_store(PatchStore(store))  # what `inspect` shows can be shown
        for name in ("scans", "classes", *SPLITS):
            total.update(" ".join(sorted(group[name].array_keys())).encode())
        for name in (*TABLES, *SHARDED):
            values = np.ascontiguousarray(group[name][...])
            total.update(f"{name} {values.dtype} {values.shape}".encode() + values.tobytes())
        for name, tensor in sorted(load_file(store / AUTOENCODER_FILE).items()):
            total.update(name.encode() + tensor.numpy().tobytes())
        return total.hexdigest()
    except Exception as error:  # any error: the reader does not see the true content
        return type(error).__name__


def is_caught(store: Path) -> bool:
    try:
        return any(True for _ in verify(store))
    except StoreError:
        return True


class Copy:
    """A copy of a store whose files are damaged one at a time."""

    def __init__(self, store: Path, folder: Path) -> None:
        self.store = store
        self.files = sorted(path for path in store.rglob("*") if path.is_file())
        self.path = shutil.copytree(store, folder / "copy.store")
        self.whole = seen(store)
        assert len(self.whole) == 64, self.whole
        self.check()
        self.ends: Counter[tuple[str, str]] = Counter()
        """Cases by (damage, end)."""
        self.missed: list[str] = []
        """Cases that `verify` missed."""

    def check(self) -> None:
        """The undamaged copy has no problem, neither before the campaign nor after it."""
        assert not is_caught(self.path)

    def try_with(self, file: Path, content: bytes | None, damage: str) -> None:
        """Give a file other content, or delete it; see who notices; and restore it."""
        victim = self.path / file.relative_to(self.store)
        victim.unlink() if content is None else victim.write_bytes(content)
        end, words = "caught", ""
        try:
            if not is_caught(self.path):
                words = seen(self.path)
                end = "harmless" if words == self.whole else "missed"
        except Exception as error:  # not how a damaged store is told
            end, words = "missed", repr(error)
        self.ends[damage, end] += 1
        if end == "missed":
            self.missed.append(f"{damage} {file.relative_to(self.store)}: {words[:60]}")
        shutil.copyfile(file, victim)


def campaign(store: Path, num_cases: int, seed: int) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Files cut off or deleted: cases by (damage, end), and those that `verify` missed."""
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as scratch:
        copy = Copy(store, Path(scratch))
        for number in range(num_cases):
            file = copy.files[number % len(copy.files)]
            if number < len(copy.files):
                copy.try_with(file, None, "deleted")
            else:
                content = file.read_bytes()
                copy.try_with(file, content[: rng.integers(len(content))], "cut")
        copy.check()
    return copy.ends, copy.missed


def sweep(store: Path, block: int, seed: int) -> tuple[Counter[tuple[str, str]], list[str]]:
    """A flipped bit in every block: cases by (part of a file, end), and those that were missed."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Copy(store, Path(scratch))
        for file in copy.files:
            content = file.read_bytes()
            before = copy.ends.total()
            for number, (part, position) in enumerate(list_places(len(content), block, seed)):
                kind = "metadata" if file.suffix == ".json" else part
                copy.try_with(file, flip(content, position, (number + seed) % 8), kind)
            print(f"{file.relative_to(store)}: {copy.ends.total() - before}", flush=True)
        copy.check()
    return copy.ends, copy.missed


def list_places(size: int, block: int, seed: int) -> Iterator[tuple[str, int]]:
    """The part of a file, and the byte of each of its blocks that is changed."""
    start = number = 0
    while start < size:
        at_edge = start < _EDGE or start >= size - _EDGE
        length = min(block, size - start)
        if not at_edge:
            length = min(block * _COARSER, size - _EDGE - start)
        part = "table" if size <= 2 * _EDGE else "end of a file" if at_edge else "payload"
        yield part, start + (number + seed * max(1, block // 8)) % length
        start, number = start + length, number + 1


def flip(content: bytes, position: int, bit: int) -> bytes:
    data = bytearray(content)
    data[position] ^= 1 << bit
    return bytes(data)


def make_store(folder: Path) -> Path:
    """The store of six patients."""
    write_archive(folder / "archive", patients=6, format="mixed", seed=0, matrix=64)
    (folder / "settings.toml").write_text(SETTINGS)
    command = ["prepare", folder / "archive", folder / "store", "--workers", 1]
    done = run_semgen(*command, "--config", folder / "settings.toml")
    assert done.returncode == 0, done.stderr
    return folder / "store"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path, nargs="?")
    parser.add_argument("--cases", type=int, default=600)
    parser.add_argument("--block", type=int)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        store = chosen.store or make_store(Path(scratch))
        if chosen.block:
            counts, escaped = sweep(store, chosen.block, chosen.seed)
        else:
            counts, escaped = campaign(store, chosen.cases, chosen.seed)
    print("\n".join(escaped))
    print(
        json.dumps(
            {f"{kind}: {outcome}": count for (kind, outcome), count in sorted(counts.items())}
        )
    )
    sys.exit(int(bool(escaped)))


if __name__ == "__main__":
    main()
