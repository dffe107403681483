"""Codecs and shard sizes for the patch store, and who reads and writes its files how fast.

    python -m benchmarks.codec STORE [--crops 1024] [--readers]

On crops of a store, one thread, CPU time: bytes, write and read of each codec that both zarr-python
and TensorStore have (and PCodec for comparison, which they have not both); shards of several
lengths, written and read whole and at random; and the same shards by zarr-python, with its fused
codec pipeline (from 3.3) and with `zarrs` (in Rust, `pip install zarrs`), and by TensorStore.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numcodecs import blosc, zstd
from numpy.typing import NDArray

from store import PatchStore
from store.sharded import ShardedReader
from store.writer import StoreWriter, write_shard

_SHARD_ROWS = (16, 64, 256, 1024)
_ROUNDS = 3
Crops = NDArray[np.int16]


def cpu_ms(work: Callable[[], object], crops: int) -> float:
    """Milliseconds of CPU for a crop, the least of several rounds."""
    taken = []
    for _ in range(_ROUNDS):
        begun = time.process_time()
        work()
        taken.append(time.process_time() - begun)
    return min(taken) / crops * 1e3


def compare_codecs(crops: Crops) -> None:
    out = np.empty_like(crops[0])

    def blosc_with(cname: str, level: int, shuffle: int, block: int = 0) -> tuple[Any, Any]:
        return (
            lambda crop: blosc.compress(crop, cname.encode(), level, shuffle, block),
            lambda packed: blosc.decompress(packed, out),
        )

    codecs: dict[str, tuple[Any, Any]] = {
        f"Blosc {cname} {level}, {name} shuffle": blosc_with(cname, level, shuffle)
        for cname, level in (("zstd", 1), ("zstd", 3), ("zstd", 5), ("lz4", 1), ("lz4", 5),
                             ("lz4", 9), ("lz4hc", 5), ("zlib", 1))
        for name, shuffle in (("byte", blosc.SHUFFLE), ("bit", blosc.BITSHUFFLE))
    }  # fmt: skip
    codecs["Blosc zstd 1, bit shuffle, one block"] = blosc_with("zstd", 1, 2, crops[0].nbytes)
    codecs["Zstandard 3 alone"] = (lambda crop: zstd.compress(crop, 3), zstd.decompress)
    if importlib.util.find_spec("pcodec"):
        from numcodecs.pcodec import PCodec  # noqa: PLC0415

        pcodec = PCodec(level=4)
        codecs["PCodec 4 (no Zarr 3 standard)"] = (pcodec.encode, lambda b: pcodec.decode(b, out))
    print("\n| codec | KiB a crop | write ms | read ms |\n|---|---|---|---|")
    for name, (encode, decode) in codecs.items():
        packed = [bytes(encode(crop)) for crop in crops]
        write = cpu_ms(lambda encode=encode: [encode(crop) for crop in crops], len(crops))
        read = cpu_ms(lambda decode=decode, packed=packed: list(map(decode, packed)), len(crops))
        size = sum(map(len, packed)) / len(crops) / 1024
        print(f"| {name} | {size:.1f} | {write:.2f} | {read:.3f} |")


def compare_shards(crops: Crops, folder: Path) -> None:
    order = np.random.default_rng(0).permutation(len(crops))
    print(
        "\n| rows a shard | MiB a file | write ms | read in order ms | at random, 64 at once ms |"
    )
    print("|---|---|---|---|---|")
    for rows in _SHARD_ROWS:
        path = _lay_out(folder / f"{rows}", crops.shape, rows)
        write = cpu_ms(lambda path=path, rows=rows: _write(path, crops, rows), len(crops))
        reader = ShardedReader(path, "train/patch")
        in_order = cpu_ms(lambda reader=reader: _read(reader, np.arange(len(crops))), len(crops))
        at_random = cpu_ms(lambda reader=reader: _read(reader, order), len(crops))
        mib = (path / "train/patch/c/0/0/0/0").stat().st_size / 2**20
        print(f"| {rows} | {mib:.1f} | {write:.2f} | {in_order:.3f} | {at_random:.3f} |")


def compare_readers(crops: Crops, folder: Path) -> None:
    rows = 64
    order = np.random.default_rng(0).permutation(len(crops))
    path = _lay_out(folder / "ours", crops.shape, rows)
    _write(path, crops, rows)
    reader = ShardedReader(path, "train/patch")
    print(f"\n| shards of {rows} | write ms | read whole ms | at random, 64 at once ms |")
    print("|---|---|---|---|")
    write = cpu_ms(lambda: _write(path, crops, rows), len(crops))
    read = cpu_ms(lambda: _read(reader, np.arange(len(crops))), len(crops))
    at_random = cpu_ms(lambda: _read(reader, order), len(crops))
    print(f"| semgen | {write:.2f} | {read:.3f} | {at_random:.3f} |")
    name = f"zarr-python {zarr.__version__}"
    pipelines = {name: "zarr.core.codec_pipeline.BatchedCodecPipeline"}
    if hasattr(zarr.core.codec_pipeline, "FusedCodecPipeline"):
        pipelines[f"{name}, fused pipeline"] = "zarr.core.codec_pipeline.FusedCodecPipeline"
    if importlib.util.find_spec("zarrs"):
        pipelines[f"{name} with zarrs {version('zarrs')}"] = "zarrs.ZarrsCodecPipeline"
    one_thread = {"threading.max_workers": 1, "codec_pipeline.max_workers": 1}
    for name, pipeline in pipelines.items():
        with zarr.config.set({"codec_pipeline.path": pipeline, **one_thread}):
            other = _lay_out(folder / name, crops.shape, rows)
            array: Any = zarr.open_array(str(other / "train/patch"), mode="r+")
            write = cpu_ms(lambda array=array: _write_zarr(array, crops, rows), len(crops))
            read = cpu_ms(lambda array=array: _read_zarr(array, rows), len(crops))
            at_random = min(  # which of the two is faster depends on the version
                cpu_ms(lambda array=array: _read_rows(array.oindex, order), len(crops)),
                cpu_ms(lambda array=array: [array[int(row)] for row in order], len(crops)),
            )
            assert (array.oindex[order[:rows]] == crops[order[:rows]]).all()
            print(f"| {name} | {write:.2f} | {read:.3f} | {at_random:.3f} |")
    if importlib.util.find_spec("tensorstore"):
        import tensorstore  # noqa: PLC0415

        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path / "train/patch")}}
        opened = tensorstore.open(spec, read=True).result()
        read = cpu_ms(lambda: _read_zarr(opened, rows), len(crops))
        at_random = cpu_ms(lambda: _read_rows(opened, order), len(crops))
        assert (np.asarray(opened[:rows].read().result()) == crops[:rows]).all()
        name = f"TensorStore {version('tensorstore')}, of semgen's shards"
        print(f"| {name} | | {read:.3f} | {at_random:.3f} |")


def _lay_out(path: Path, shape: tuple[int, ...], rows: int) -> Path:
    writer = StoreWriter.create(path, config={}, software={})
    writer.create_sharded("train/patch", shape=shape, dtype="int16", rows_per_shard=rows)
    return path


def _write(path: Path, crops: Crops, rows: int) -> None:
    for shard in range(len(crops) // rows):
        write_shard(path, "train/patch", shard, crops[shard * rows : (shard + 1) * rows])


def _read(reader: ShardedReader, order: NDArray[np.intp]) -> None:
    for start in range(0, len(order), 64):
        reader.read(order[start : start + 64])


def _write_zarr(array: Any, crops: Crops, rows: int) -> None:
    for start in range(0, len(crops), rows):
        array[start : start + rows] = crops[start : start + rows]


def _read_zarr(array: Any, rows: int) -> None:
    for start in range(0, array.shape[0], rows):
        np.asarray(array[start : start + rows])


def _read_rows(array: Any, order: NDArray[np.intp]) -> None:
    """Batches of 64 rows, each sorted: the order that zarr-python reads fastest."""
    for start in range(0, len(order), 64):
        np.asarray(array[np.sort(order[start : start + 64])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("--crops", type=int, default=1024)
    parser.add_argument("--readers", action="store_true", help="compare readers only")
    arguments = parser.parse_args()
    blosc.use_threads = False
    split = PatchStore(arguments.store).train
    num = min(arguments.crops, len(split)) // 1024 * 1024 or len(split) // 64 * 64
    rows = np.sort(np.random.default_rng(0).permutation(len(split))[:num])
    crops = split.read(rows)
    print(f"{len(crops)} crops of {crops.shape[1:]} int16, {crops[0].nbytes / 1024:.0f} KiB each")
    with tempfile.TemporaryDirectory() as folder:
        if not arguments.readers:
            compare_codecs(crops[:256])
            compare_shards(crops, Path(folder))
        compare_readers(crops, Path(folder))


if __name__ == "__main__":
    main()
