"""Flip a bit of, truncate and delete every file of a store: does `semgen verify` find it?

    python -m tests.campaigns.corrupt STORE --cases 600

A case counts as harmless when another reader (zarr-python, safetensors) still sees the same values
and settings; of all others `verify` must catch every one. STORE is copied, not changed.
"""

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import zarr
from safetensors.torch import load_file

from store.format import AUTOENCODER_FILE, SHARDED, SPLITS, TABLES, StoreError
from store.verification import verify


def seen(store: Path) -> str:
    """A digest of all that another reader gets from a store, or the name of its error."""
    try:
        group = zarr.open_group(str(store), mode="r")
        facts = dict(group.attrs["semgen"])
        kept = {name: facts[name] for name in ("format", "state", "fingerprint", "config")}
        total = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
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


def campaign(store: Path, num_cases: int, seed: int) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Cases by (damage, end), and those that `verify` missed."""
    rng = np.random.default_rng(seed)
    files = sorted(path for path in store.rglob("*") if path.is_file())
    whole = seen(store)
    ends: Counter[tuple[str, str]] = Counter()
    missed = []
    with tempfile.TemporaryDirectory() as scratch:
        copy = shutil.copytree(store, Path(scratch) / "copy.store")
        for number in range(num_cases):
            file = files[number % len(files)]
            victim = copy / file.relative_to(store)
            content = file.read_bytes()
            damage = ("flipped", "cut", "deleted")[number // len(files) % 3]
            if damage == "deleted":
                victim.unlink()
            elif damage == "cut":
                victim.write_bytes(content[: rng.integers(len(content))] if content else b"")
            else:
                data = bytearray(content or b"\0")
                data[rng.integers(len(data))] ^= 1 << rng.integers(8)
                victim.write_bytes(data)
            end = "caught" if is_caught(copy) else "harmless" if seen(copy) == whole else "missed"
            ends[damage, end] += 1
            if end == "missed":
                missed.append(f"{damage} {file.relative_to(store)}: {seen(copy)[:40]}")
            victim.write_bytes(content)
    return ends, missed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("--cases", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    counts, escaped = campaign(chosen.store, chosen.cases, chosen.seed)
    for (kind, outcome), count in sorted(counts.items()):
        print(f"{count:6d} {kind}: {outcome}")
    print("\n".join(escaped))
    sys.exit(int(bool(escaped)))
