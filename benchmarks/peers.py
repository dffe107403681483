"""Shuffled batches of crops from other libraries, each used as its documentation advises.

    python benchmarks/peers.py prepare NAME SOURCE FOLDER     # the crops in that library's format
    python benchmarks/peers.py run NAME FOLDER [--check SOURCE]

Runs in an environment of its own (`make bench-peers`, peers-requirements.txt) and knows nothing of
semgen: SOURCE holds crops.npy (n, Z, Y, X) int16 and labels.npy (n,). `run` prints JSON in its last
line: seconds of two epochs, the first with nothing of FOLDER in the page cache, seconds to the
first batch, and the rows of every batch. With --check it also compares crops with SOURCE and
samples memory, which takes time: such a run is not for timing.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.metadata
import json
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

BATCH_SIZE = 64
WORKERS = 2
SEED = 0
SAMPLE_S = 0.05
BLOSC2_BLOCKS = (1, 16, 32, 16)
"""What nnU-Net's rule gives for crops of 32 x 64 x 64 int16: a block fits into L1, a crop is one
chunk."""
ROWS_PER_SHARD = 64
FUSED = {"codec_pipeline.path": "zarr.core.codec_pipeline.FusedCodecPipeline"}
ZARRS = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}
"""What annbatch advises for local files."""
ANNBATCH_CHUNK = 16
"""Images that annbatch's tutorial for images writes as a chunk; they are read together."""


class Batch(NamedTuple):
    """What every contestant yields; a floor yields no crops."""

    crops: Tensor | None
    """(n, Z, Y, X) or (n, 1, Z, Y, X) int16 HU."""
    labels: Tensor | None
    rows: Any
    """(n,) which crops these are."""


Epochs = Callable[[int], Iterable[Batch]]
"""The batches of an epoch; made anew for a run, it keeps its workers from epoch to epoch."""


# Measuring, for semgen's own contestants too


def measure(
    open_epochs: Callable[[], Epochs], folder: Path, *, source: Path | None = None
) -> dict[str, Any]:
    """Two epochs, first cold, then warm; `source` checks crops and samples memory as well."""
    drop_cache(folder)
    measured: dict[str, Any] = {"seconds": [], "start_s": 0.0, "rows": [], "bytes": size_of(folder)}
    truth = None if source is None else np.load(source / "crops.npy", mmap_mode="r")
    with MemoryWatch() if source else _Unwatched() as watch:
        began = time.perf_counter()
        epochs = open_epochs()
        for epoch in range(2):
            for batch in epochs(epoch):
                measured["start_s"] = measured["start_s"] or time.perf_counter() - began
                measured["rows"].append(np.asarray(batch.rows).tolist())
                if truth is not None and batch.crops is not None:
                    assert batch.crops.dtype == torch.int16, batch.crops.dtype
                    for row, crop in zip(measured["rows"][-1], batch.crops.numpy(), strict=True):
                        assert np.array_equal(crop.reshape(truth.shape[1:]), truth[row]), row
            now = time.perf_counter()
            measured["seconds"].append(now - began)
            began = now
    return measured | {"added_mib": watch.added_mib, "bytes_used": size_of(folder)}


def drop_cache(folder: Path) -> None:
    """Take the files of a folder out of the page cache (the disk's own cache stays)."""
    for path in files_of(folder):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def size_of(folder: Path) -> int:
    """Bytes of its files."""
    return sum(path.stat().st_size for path in files_of(folder))


class _Unwatched:
    """Stands where memory is not sampled."""

    added_mib = None

    def __enter__(self) -> _Unwatched:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class MemoryWatch:
    """Samples the memory of this process and its children; `added_mib` above the beginning.

    Proportional set size without the pages of mapped files, which the kernel may drop at any time.
    """

    def __init__(self) -> None:
        self._peak = self._first = self._now()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    @property
    def added_mib(self) -> float:
        return (self._peak - self._first) / 1024

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(SAMPLE_S):
            self._peak = max(self._peak, self._now())

    @staticmethod
    def _now() -> int:
        """In KiB."""
        total = 0
        for process in (me := psutil.Process(), *me.children(recursive=True)):
            try:
                lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
            except OSError:  # it ended
                continue
            total += sum(int(s.split()[1]) for s in lines if s.startswith(("Pss_Anon", "Pss_Shm")))
        return total


def read_ahead(read: Callable[[Any], Batch], plans: Iterable[Any], threads: int) -> Iterator[Batch]:
    """Batches read by a few threads, in order."""
    ahead: deque[Any] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for plan in plans:
            ahead.append(pool.submit(read, plan))
            if len(ahead) > threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


# The peers


def load(source: Path) -> tuple[np.ndarray, np.ndarray]:
    """Crops, mapped, and their labels."""
    crops = np.load(source / "crops.npy", mmap_mode="r")
    return crops, np.load(source / "labels.npy").astype(np.int64)


def prepare_mosaicml(source: Path, folder: Path) -> None:
    from streaming import MDSWriter  # noqa: PLC0415

    crops, labels = load(source)
    shape = ",".join(map(str, crops.shape[1:]))
    columns = {"crop": f"ndarray:int16:{shape}", "label": "int", "row": "int"}
    with MDSWriter(out=str(folder), columns=columns, compression="zstd") as out:
        for row, (crop, label) in enumerate(zip(crops, labels, strict=True)):
            out.write({"crop": np.asarray(crop), "label": int(label), "row": row})


def run_mosaicml(folder: Path) -> Epochs:
    from streaming import StreamingDataset  # noqa: PLC0415

    dataset = StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH_SIZE)
    return _of_dicts(DataLoader(dataset, BATCH_SIZE, num_workers=WORKERS, persistent_workers=True))


def _of_dicts(loader: Iterable[dict[str, Tensor]]) -> Epochs:
    return lambda _: (Batch(batch["crop"], batch["label"], batch["row"]) for batch in loader)


def _litdata_sample(source: Path, row: int) -> dict[str, Any]:
    crops, labels = load(source)
    return {"crop": np.array(crops[row]), "label": int(labels[row]), "row": row}


def prepare_litdata(source: Path, folder: Path) -> None:
    from litdata import optimize  # noqa: PLC0415

    rows = np.random.default_rng(SEED).permutation(len(load(source)[1])).tolist()
    optimize(
        functools.partial(_litdata_sample, source), rows, output_dir=str(folder / "data"),
        chunk_bytes="64MB", compression="zstd", num_workers=WORKERS, reorder_files=False,
    )  # fmt: skip


def run_litdata(folder: Path) -> Epochs:
    from litdata import StreamingDataLoader, StreamingDataset  # noqa: PLC0415

    dataset = StreamingDataset(
        str(folder / "data"), cache_dir=str(folder / "cache"), shuffle=True, drop_last=False
    )
    return _of_dicts(
        StreamingDataLoader(
            dataset, batch_size=BATCH_SIZE, num_workers=WORKERS, persistent_workers=True
        )
    )


def prepare_webdataset(source: Path, folder: Path, num_shards: int = 8) -> None:
    from webdataset import ShardWriter  # noqa: PLC0415

    crops, labels = load(source)
    count = -(-len(labels) // num_shards)
    with ShardWriter(str(folder / "%06d.tar"), maxcount=count, verbose=0) as out:
        for row in np.random.default_rng(SEED).permutation(len(labels)).tolist():
            crop = np.asarray(crops[row])
            out.write({"__key__": f"{row:08d}", "npy": crop, "cls": int(labels[row])})


def run_webdataset(folder: Path) -> Epochs:
    import webdataset  # noqa: PLC0415

    shards = sorted(str(path) for path in folder.glob("*.tar"))
    dataset = (
        webdataset.WebDataset(shards, shardshuffle=100)
        .shuffle(1000)
        .decode()
        .to_tuple("npy", "cls", "__key__")
        .map_tuple(torch.from_numpy, int, int)
        .batched(BATCH_SIZE)
    )
    loader = webdataset.WebLoader(
        dataset, batch_size=None, num_workers=WORKERS, persistent_workers=True
    )
    return lambda _: (Batch(crops, labels, rows) for crops, labels, rows in loader)


def _monai_dataset(folder: Path, num_rows: int, source: Path | None) -> Any:
    from monai.data import PersistentDataset  # noqa: PLC0415
    from monai.transforms import Transform  # noqa: PLC0415

    class ReadCrop(Transform):
        """What the cache keeps the result of."""

        def __call__(self, item: dict[str, int]) -> dict[str, Any]:
            assert source, "not in the cache"
            crops, labels = load(source)
            row = item["row"]
            return {"crop": torch.tensor(crops[row]), "label": int(labels[row]), "row": row}

    items = [{"row": row} for row in range(num_rows)]
    return PersistentDataset(items, ReadCrop(), cache_dir=folder)


def prepare_monai(source: Path, folder: Path) -> None:
    dataset = _monai_dataset(folder, len(load(source)[1]), source)
    for _ in DataLoader(dataset, num_workers=WORKERS, collate_fn=len):
        pass


def run_monai(folder: Path) -> Epochs:
    from monai.data import DataLoader as MonaiLoader  # noqa: PLC0415

    dataset = _monai_dataset(folder, len(list(folder.glob("*.pt"))), None)
    return _of_dicts(
        MonaiLoader(
            dataset, batch_size=BATCH_SIZE, shuffle=True, num_workers=WORKERS,
            persistent_workers=True,
        )
    )  # fmt: skip


def prepare_blosc2(source: Path, folder: Path) -> None:
    import blosc2  # noqa: PLC0415

    blosc2.set_nthreads(1)
    crops, labels = load(source)
    for row, crop in enumerate(crops):
        array = np.ascontiguousarray(crop[None])
        blocks = tuple(map(min, array.shape, BLOSC2_BLOCKS))
        blosc2.asarray(
            array, urlpath=str(folder / f"{row:08d}.b2nd"), chunks=array.shape, blocks=blocks,
            cparams={"codec": blosc2.Codec.ZSTD, "clevel": 8},
        )  # fmt: skip
    np.save(folder / "labels.npy", labels)


class Blosc2Crops(Dataset[dict[str, Any]]):
    """A file for each crop, opened for each read, as nnU-Net's dataset does."""

    def __init__(self, folder: Path) -> None:
        import blosc2  # noqa: PLC0415

        blosc2.set_nthreads(1)
        self._open = functools.partial(
            blosc2.open, mode="r", dparams={"nthreads": 1}, mmap_mode="r"
        )
        self._folder = folder
        self._labels = np.load(folder / "labels.npy").tolist()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, row: int) -> dict[str, Any]:
        crop = self._open(urlpath=str(self._folder / f"{row:08d}.b2nd"))[:]
        return {"crop": crop, "label": self._labels[row], "row": row}


def run_blosc2(folder: Path) -> Epochs:
    return _of_dicts(
        DataLoader(
            Blosc2Crops(folder), BATCH_SIZE, shuffle=True, num_workers=WORKERS,
            persistent_workers=True,
        )
    )  # fmt: skip


def prepare_memmap(source: Path, folder: Path) -> None:
    for name in ("crops.npy", "labels.npy"):
        os.link(source / name, folder / name)


def run_memmap(folder: Path) -> Epochs:
    crops, labels = load(folder)
    return _shuffled(crops.__getitem__, labels)


def _shuffled(read: Callable[[np.ndarray], np.ndarray], labels: np.ndarray) -> Epochs:
    """Shuffled batches from a library that reads rows by number, with two threads.

    The rows of a batch are sorted, because rows of a shard are then read faster.
    """

    def read_batch(rows: np.ndarray) -> Batch:
        return Batch(torch.from_numpy(read(rows)), torch.from_numpy(labels[rows]), rows)

    def batches(epoch: int) -> Iterator[Batch]:
        order = np.random.default_rng((SEED, epoch)).permutation(len(labels))
        places = range(0, len(order), BATCH_SIZE)
        return read_ahead(read_batch, (np.sort(order[i : i + BATCH_SIZE]) for i in places), WORKERS)

    return batches


def prepare_zarr(source: Path, folder: Path) -> None:
    """The layout and codecs of a semgen store: a crop is a chunk, 64 are a shard."""
    import zarr  # noqa: PLC0415
    from zarr.codecs import BloscCodec, Crc32cCodec  # noqa: PLC0415

    crops, labels = load(source)
    zarr.config.set(FUSED)
    array = zarr.create_array(
        folder / "crops", shape=crops.shape, dtype=crops.dtype, chunks=(1, *crops.shape[1:]),
        shards=(ROWS_PER_SHARD, *crops.shape[1:]),
        compressors=[BloscCodec(cname="lz4", clevel=9, shuffle="bitshuffle"), Crc32cCodec()],
    )  # fmt: skip
    for row in range(0, len(crops), ROWS_PER_SHARD):
        array[row : row + ROWS_PER_SHARD] = crops[row : row + ROWS_PER_SHARD]
    np.save(folder / "labels.npy", labels)


def run_zarr(folder: Path) -> Epochs:
    import zarr  # noqa: PLC0415

    zarr.config.set({**FUSED, "codec_pipeline.max_workers": 1})  # a batch has a thread of its own
    array: Any = zarr.open_array(folder / "crops", mode="r")
    return _shuffled(lambda rows: array.oindex[rows], np.load(folder / "labels.npy"))


def run_tensorstore(folder: Path) -> Epochs:
    import tensorstore  # noqa: PLC0415

    array = tensorstore.open(
        {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder / "crops")}},
        read=True,
        recheck_cached_data="open",
    ).result()
    return _shuffled(lambda rows: array[rows].read().result(), np.load(folder / "labels.npy"))


def _as_anndata(source: Path) -> Any:
    import anndata  # noqa: PLC0415
    import dask.array  # noqa: PLC0415
    import pandas as pd  # noqa: PLC0415

    crops, labels = load(source)
    rows = np.arange(len(labels))
    return anndata.AnnData(
        obs=pd.DataFrame({"label": labels, "row": rows}, index=rows.astype(str)),
        obsm={"crops": dask.array.from_array(crops, chunks=(BATCH_SIZE, -1, -1, -1))},
    )


def prepare_annbatch(source: Path, folder: Path) -> None:
    import zarr  # noqa: PLC0415
    from annbatch import DatasetCollection  # noqa: PLC0415

    zarr.config.set(ZARRS)
    DatasetCollection(zarr.open_group(folder, mode="w")).add_adatas(
        [source], load_adata=_as_anndata, shuffle=True, n_obs_per_chunk=ANNBATCH_CHUNK,
        dataset_size=100_000, rng=np.random.default_rng(SEED),
    )  # fmt: skip


def run_annbatch(folder: Path) -> Epochs:
    import zarr  # noqa: PLC0415
    from annbatch import DatasetCollection, Loader  # noqa: PLC0415
    from anndata.io import read_elem  # noqa: PLC0415

    zarr.config.set(ZARRS)
    groups = list(DatasetCollection(zarr.open_group(folder, mode="r")))
    loader = Loader(
        batch_size=BATCH_SIZE, chunk_size=ANNBATCH_CHUNK, preload_nchunks=32, shuffle=True,
        preload_to_gpu=False, to="torch", rng=np.random.default_rng(SEED),
    ).add_datasets(
        datasets=[group["obsm/crops"] for group in groups],
        obs=[read_elem(group["obs"])[["label", "row"]] for group in groups],
    )  # fmt: skip

    def batches(_: int) -> Iterator[Batch]:
        for batch in loader:
            labels, rows = (batch["obs"][name].to_numpy() for name in ("label", "row"))
            yield Batch(batch["X"], torch.tensor(labels), rows)

    return batches


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One library."""

    package: str
    """As the package index calls it."""
    modules: tuple[str, ...]
    """Imported before the clock starts."""
    how: str
    """What was done with it, in a few words."""
    prepare: Callable[[Path, Path], None]
    run: Callable[[Path], Epochs]


PEERS = {
    "mosaicml-streaming": Peer(
        package="mosaicml-streaming",
        modules=("streaming",),
        how="MDS, zstd; StreamingDataset(shuffle=True), DataLoader",
        prepare=prepare_mosaicml,
        run=run_mosaicml,
    ),
    "litdata": Peer(
        package="litdata",
        modules=("litdata",),
        how="optimize(zstd, 64 MB chunks) in random order; StreamingDataset(shuffle=True),"
        " StreamingDataLoader",
        prepare=prepare_litdata,
        run=run_litdata,
    ),
    "webdataset": Peer(
        package="webdataset",
        modules=("webdataset",),
        how="8 tar shards of .npy in random order, not compressed; shards and 1000 samples"
        " shuffled, WebLoader",
        prepare=prepare_webdataset,
        run=run_webdataset,
    ),
    "MONAI PersistentDataset": Peer(
        package="monai",
        modules=("monai.data", "monai.transforms"),
        how="cache of .pt files, not compressed; DataLoader(shuffle=True)",
        prepare=prepare_monai,
        run=run_monai,
    ),
    "Blosc2 (as nnU-Net)": Peer(
        package="blosc2",
        modules=("blosc2",),
        how="a .b2nd file each, zstd level 8, mapped; DataLoader(shuffle=True)",
        prepare=prepare_blosc2,
        run=run_blosc2,
    ),
    "zarr-python, fused": Peer(
        package="zarr",
        modules=("zarr",),
        how="shards of 64 with the codec of semgen, fused codec pipeline; sorted rows of a shuffled"
        " batch by oindex, two threads",
        prepare=prepare_zarr,
        run=run_zarr,
    ),
    "TensorStore": Peer(
        package="tensorstore",
        modules=("tensorstore",),
        how="the same shards; sorted rows of a shuffled batch, two threads ask for batches",
        prepare=prepare_zarr,
        run=run_tensorstore,
    ),
    "annbatch": Peer(
        package="annbatch",
        modules=("annbatch", "anndata", "zarrs"),
        how="DatasetCollection, shuffled when written, images in obsm, chunks of 16, lz4; Loader"
        "(shuffle=True) of 32 chunks at once, zarrs",
        prepare=prepare_annbatch,
        run=run_annbatch,
    ),
    "numpy.memmap": Peer(
        package="numpy",
        modules=(),
        how="one .npy, not compressed; shuffled rows gathered by two threads",
        prepare=prepare_memmap,
        run=run_memmap,
    ),
}


def run(peer: Peer, folder: Path, source: Path | None) -> dict[str, Any]:
    """Measure on links to the prepared files: what a library unpacks or deletes is gone after."""
    for module in peer.modules:
        importlib.import_module(module)
    used = folder.with_name(folder.name + ".run")
    shutil.rmtree(used, ignore_errors=True)
    shutil.copytree(folder, used, copy_function=os.link)
    try:
        measured = measure(lambda: peer.run(used), used, source=source)
    finally:
        shutil.rmtree(used, ignore_errors=True)
    return measured | {"version": importlib.metadata.version(peer.package)}


def main() -> None:
    """Prepare or measure one peer."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    commands = parser.add_subparsers(dest="command", required=True)
    preparing = commands.add_parser("prepare")
    preparing.add_argument("name", choices=PEERS)
    preparing.add_argument("source", type=Path)
    preparing.add_argument("folder", type=Path)
    running = commands.add_parser("run")
    running.add_argument("name", choices=PEERS)
    running.add_argument("folder", type=Path)
    running.add_argument("--check", type=Path, metavar="SOURCE")
    given = parser.parse_args()
    if given.command == "prepare":
        given.folder.mkdir(parents=True)
        PEERS[given.name].prepare(given.source, given.folder)
    else:
        print(json.dumps(run(PEERS[given.name], given.folder, given.check)), flush=True)


if __name__ == "__main__":
    main()
