"""The bytes of chunks, by shard: from shard files, or from object storage with a cache on disk."""

from __future__ import annotations

import functools
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from store.format import Unreachable
from store.layout import shard_key
from store.remote import refuse_fork
from store.shards import MISSING, index_size, is_intact, is_sound, read_index

if TYPE_CHECKING:
    from store.cache import ShardCache
    from store.location import Remote

Result = TypeVar("Result")
Wanted: TypeAlias = tuple[int, list[int]]
"""A shard, and the numbers of some of its chunks."""

_CACHED_ROWS = 2**18
"""Rows whose offsets are kept in memory, after their shard was first read."""
_REQUESTS, _DOWNLOADS = 64, 4
"""Most requests of a process at a time, and most shards that it downloads in the background."""

_downloads = threading.BoundedSemaphore(_DOWNLOADS)


class FileChunks:
    """Chunks from the shard files in a folder. Safe to use from several threads."""

    def __init__(self, folder: Path, rows_per_shard: int, num_axes: int) -> None:
        self._folder, self._rows_per_shard, self._num_axes = folder, rows_per_shard, num_axes
        self._index = lru_cache(max(1, _CACHED_ROWS // rows_per_shard))(self._read_index)

    def fetch(self, wanted: Iterable[Wanted]) -> Iterator[Iterator[bytes]]:
        """The wanted chunks of each shard in order; empty where they are missing."""
        return itertools.starmap(self.read, wanted)

    def read(self, shard: int, numbers: Sequence[int]) -> Iterator[bytes]:
        """The same for one shard; one chunk is in memory at a time."""
        try:
            index = self._index(shard)
            descriptor = os.open(self.file(shard), os.O_RDONLY)
        except (OSError, ValueError):
            yield from itertools.repeat(b"", len(numbers))
            return
        try:
            for number in numbers:
                yield _read_at(descriptor, *index[number])
        finally:
            os.close(descriptor)

    def file(self, shard: int) -> str:
        return f"{self._folder}/{shard_key(shard, self._num_axes)}"

    def _read_index(self, shard: int) -> list[list[int]]:
        with open(self.file(shard), "rb") as file:
            file.seek(-index_size(self._rows_per_shard), os.SEEK_END)
            return read_index(file.read(), self._rows_per_shard)


def _read_at(descriptor: int, offset: int, length: int) -> bytes:
    if offset == MISSING:
        return b""
    try:
        return os.pread(descriptor, length, offset)
    except OSError:
        return b""


def request_pool(url: object) -> ThreadPoolExecutor:
    """Threads that wait for the answers of servers, shared by all stores of a process."""
    refuse_fork(url)  # its threads would be missing
    return _pool()


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_REQUESTS, thread_name_prefix="object-storage")


class ObjectChunks:
    """Chunks from shards in object storage. Safe to use from several threads.

    All shards of one call are asked for at the same time, each by the ranges that are wanted. With
    a cache, shards are also downloaded whole in the background, and read from disk from then on.
    """

    def __init__(
        self,
        remote: Remote,
        name: str,
        rows_per_shard: int,
        num_axes: int,
        cache: ShardCache | None,
    ) -> None:
        self._remote, self._name = remote, name
        self._rows_per_shard, self._num_axes = rows_per_shard, num_axes
        self._cache = cache
        self._damaged: set[int] = set()
        """Shards that are damaged at the server."""
        self._index = lru_cache(max(1, _CACHED_ROWS // rows_per_shard))(self._read_index)
        if cache is not None:
            self._files = FileChunks(cache.folder / name, rows_per_shard, num_axes)

    def fetch(self, wanted: Iterable[Wanted]) -> Iterator[Sequence[bytes]]:
        """The wanted chunks of each shard in order; empty where they are missing.

        Raises Unreachable when the server does not answer for long, or denies access.
        """
        wanted = list(wanted)
        pending = [
            None if self._is_cached(shard) else self._submit(self._request, shard, numbers)
            for shard, numbers in wanted
        ]
        try:
            for (shard, numbers), answer in zip(wanted, pending, strict=True):
                yield answer.result() if answer else self._read_cached(shard, numbers)
        finally:
            for answer in filter(None, pending):
                answer.cancel()

    def _submit(self, work: Callable[..., Result], *given: Any) -> Future[Result]:
        return request_pool(self._remote).submit(work, *given)

    def _request(self, shard: int, numbers: Sequence[int]) -> Sequence[bytes]:
        """Chunks of one shard by their ranges; the first time, its index before them."""
        try:
            index = self._index(shard)
            found = [number for number in numbers if index[number][0] != MISSING]
            starts = [index[number][0] for number in found]
            ends = [sum(index[number]) for number in found]
            parts = self._remote.read_ranges(self._key(shard), starts, ends) if found else []
        except Unreachable:
            raise
        except (FileNotFoundError, ValueError):
            return [b""] * len(numbers)
        self._download(shard)
        by_number = dict(zip(found, parts, strict=True))
        return [by_number.get(number, b"") for number in numbers]

    def _key(self, shard: int) -> str:
        return f"{self._name}/{shard_key(shard, self._num_axes)}"

    def _read_index(self, shard: int) -> list[list[int]]:
        tail, size = self._remote.read_tail(self._key(shard), index_size(self._rows_per_shard))
        index = read_index(tail, self._rows_per_shard)
        if any(offset != MISSING and offset + length > size for offset, length in index):
            raise ValueError("index points beyond the shard")
        return index

    # The cache

    def _is_cached(self, shard: int) -> bool:
        return self._cache is not None and self._cache.has(self._key(shard))

    def _read_cached(self, shard: int, numbers: Sequence[int]) -> Sequence[bytes]:
        """Chunks from the disk; requested after all if the file is damaged or gone."""
        chunks = list(self._files.read(shard, numbers))
        if all(map(is_intact, chunks)):
            return chunks
        assert self._cache is not None
        self._cache.discard(self._key(shard))
        return self._request(shard, numbers)

    def _download(self, shard: int) -> None:
        """Begin to cache a shard in the background, unless enough of them are on their way."""
        if self._cache is None or self._cache.is_paused or shard in self._damaged:
            return
        if _downloads.acquire(blocking=False):
            adding = self._submit(self._cache.add, self._key(shard), lambda: self._whole(shard))
            adding.add_done_callback(lambda _: _downloads.release())

    def _whole(self, shard: int) -> bytes | None:
        """A shard; None if it is damaged or cannot be read, which the reader of its rows raises."""
        try:
            content = self._remote.read(self._key(shard))
        except (FileNotFoundError, Unreachable):
            return None
        if not is_sound(content, self._rows_per_shard):
            self._damaged.add(shard)
            return None
        return content
