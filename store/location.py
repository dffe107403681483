"""Where a store is: in a folder, or at a URL in object storage.

Both give what zarr opens, small files by name, and the chunks of a sharded array. Nothing is ever
listed, because a web server cannot list.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypeVar

from zarr.storage import ObjectStore as ZarrStore

from store.cache import open_cache
from store.chunks import FileChunks, ObjectChunks, request_pool
from store.errors import is_url
from store.format import StoreError
from store.remote import clean_url, connect, explained

if TYPE_CHECKING:
    from obstore.store import ObjectStore

Item = TypeVar("Item")
Result = TypeVar("Result")

_OPENING_S, _READING_S = 20.0, 180.0
"""Seconds that requests are repeated: few on opening, so that a wrong address fails soon; many on
reading, so that a lost network can return."""


@dataclass(frozen=True)
class Folder:
    """A store in a folder."""

    path: Path
    finished_by: ClassVar = "semgen prepare"

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.path.name

    def absolute(self) -> Folder:
        """The same, for a process in another working directory."""
        return Folder(self.path.absolute())

    def check(self) -> None:
        """Raise StoreError unless there is something to open."""
        if self.path.exists() and not self.path.is_dir():
            raise StoreError(f"{self}: is a file; a store is a folder")
        if not self.path.is_dir():
            raise StoreError(f"{self}: no such store")

    def for_zarr(self) -> str:
        """What zarr opens."""
        # absolute: with a relative root, zarr removes that text anywhere in a key
        return str(self.path.absolute())

    def read(self, key: str) -> bytes:
        """A file; FileNotFoundError if there is none."""
        return (self.path / key).read_bytes()

    def exists(self, key: str) -> bool:
        return (self.path / key).exists()

    def chunks(
        self, name: str, rows_per_shard: int, num_axes: int, fingerprint: str | None
    ) -> FileChunks:
        """The chunks of a sharded array."""
        return FileChunks(self.path / name, rows_per_shard, num_axes)

    def map(self, read: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Read several small things, in order."""
        return map(read, items)

    def explained(self) -> AbstractContextManager[None]:
        """Within it, a failed request raises Unreachable; a folder needs no requests."""
        return nullcontext()

    def kept(self, name: str, fingerprint: str | None) -> Path | None:
        """A file for results that are computed once, or None; it may not be writable."""
        path = Path(os.path.realpath(self.path))  # "." has no name
        return path.with_name(f"{path.name}.{name}")


@dataclass(frozen=True)
class Remote:
    """A store at a URL."""

    url: str
    finished_by: ClassVar = "semgen push"

    def __str__(self) -> str:
        return self.url

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the URL only: credentials come from the environment again."""
        return Remote, (self.url,)

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def path(self) -> Path:
        """Raises StoreError: there is no folder."""
        raise StoreError(
            f"{self.url}: is a URL; this needs the store in a folder. Work on the original, or copy"
            " it to a folder"
        )

    def absolute(self) -> Remote:
        return self

    def check(self) -> None:
        """Raise StoreError unless there is something to open, Unreachable if that is unknown."""
        try:
            with self.explained():
                self._for_zarr.store.get("zarr.json")
        except FileNotFoundError:
            raise StoreError(f"{self}: no such store") from None

    def for_zarr(self) -> ZarrStore[Any]:
        """What zarr opens."""
        return self._for_zarr

    @cached_property
    def _for_zarr(self) -> ZarrStore[Any]:
        return ZarrStore(connect(self.url, patience_s=_OPENING_S), read_only=True)

    @cached_property
    def _client(self) -> ObjectStore:
        return connect(self.url, patience_s=_READING_S)

    def read(self, key: str) -> bytes:
        """An object, whole; FileNotFoundError if there is none."""
        with self.explained():
            return bytes(self._client.get(key).bytes())

    def read_tail(self, key: str, length: int) -> tuple[bytes, int]:
        """The last bytes of an object, and its size; FileNotFoundError if there is none."""
        from obstore.exceptions import NotSupportedError  # noqa: PLC0415 (optional)

        with self.explained():
            try:
                found = self._client.get(key, options={"range": {"suffix": length}})
            except NotSupportedError:  # Azure
                size = self._client.head(key)["size"]
                found = self._client.get(key, options={"range": (max(0, size - length), size)})
            return bytes(found.bytes()), found.meta["size"]

    def read_ranges(self, key: str, starts: Sequence[int], ends: Sequence[int]) -> list[bytes]:
        """Parts of an object that must lie within it; near ones come in one request."""
        with self.explained():
            return list(map(bytes, self._client.get_ranges(key, starts=starts, ends=ends)))

    def exists(self, key: str) -> bool:
        try:
            with self.explained():
                self._client.head(key)
        except FileNotFoundError:
            return False
        return True

    def chunks(
        self, name: str, rows_per_shard: int, num_axes: int, fingerprint: str | None
    ) -> ObjectChunks:
        """The chunks of a sharded array; on disk, they are cached by the store's fingerprint."""
        cache = open_cache(fingerprint) if fingerprint else None
        return ObjectChunks(self, name, rows_per_shard, num_axes, cache)

    def map(self, read: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Read several small things at the same time; results come in order."""
        return request_pool(self).map(read, items)

    def explained(self) -> AbstractContextManager[None]:
        """Within it, a failed request raises Unreachable."""
        return explained(self.url)

    def kept(self, name: str, fingerprint: str | None) -> Path | None:
        """A file for results that are computed once, or None without a cache."""
        cache = open_cache(fingerprint) if fingerprint else None
        if cache is None:
            return None
        with suppress(OSError):  # then it is not writable, as beside a read-only store
            cache.make_folder()
        return cache.folder / name


Location: TypeAlias = Folder | Remote
Where: TypeAlias = str | Path | Folder | Remote
"""How callers name a store: a path, a URL, or its location."""


def locate(where: Where) -> Location:
    """The location that a path or a URL names; SemgenError for a URL that cannot be used."""
    if isinstance(where, Folder | Remote):
        return where
    return Remote(clean_url(where)) if is_url(where) else Folder(Path(where))
