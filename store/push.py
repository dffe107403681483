"""Upload a complete store to object storage (docs/design/0016-remote-stores.md).

Objects are created, never overwritten, except for two: the metadata of the root and of the group
`classes`, which holds the annotation. The root's is created first, with the fingerprint and the
state "building", so that a URL belongs to one store; at the end, the complete one replaces it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np

from store.errors import SemgenError, check_local
from store.format import ATTRIBUTE, AUTOENCODER_FILE, DIGESTS, SHARDED, SPLITS, StoreError
from store.group import compute_fingerprint
from store.inspect import format_size
from store.progress import SILENT, Progress, format_duration
from store.reader import PatchStore
from store.remote import PATIENCE_S, clean_url, connect, explained
from store.sharded import ShardedReader

_ROOT: Final = "zarr.json"
_ANNOTATED: Final = "classes/zarr.json"
_WORKERS, _MEMORY_BYTES = 8, 2**29
"""Maximum number of uploads at a time, and of bytes that their shards take in memory."""
_SENDING_S: Final = 600
"""Maximum time for sending one object over a slow line."""
_PAUSE_S: Final = 0.2
_CUT: Final = "response body error"
"""What obstore says of an answer that ends too early."""
_QUEUED: Final = 4096
_MIB: Final = 2**20
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pushed:
    """What a finished upload did."""

    url: str
    fingerprint: str
    objects: int
    """Objects of the store at the URL."""
    bytes: int
    """Their size."""
    sent: int
    """Objects that this run sent; the others were already there."""
    sent_bytes: int
    seconds: float

    def __str__(self) -> str:
        """Lines of text, for a terminal."""
        there = self.objects - self.sent
        sent = "nothing"
        if self.sent:
            rate = format_size(self.sent_bytes / self.seconds)
            sent = (
                f"{self.sent} of {self.objects} objects, {format_size(self.sent_bytes)} in"
                f" {format_duration(self.seconds)} ({rate}/s)"
            )
        return (
            f"sent   {sent}; {there} objects were already there\n"
            f"store  {self.url}, {format_size(self.bytes)}, fingerprint {self.fingerprint[:16]}"
        )


def push(store: str | Path, url: str, *, progress: Progress = SILENT) -> Pushed:
    """Upload a complete store, with its annotation; the same call again resumes.

    Shards are checked against their digests before they are sent. Each object is compared after
    it was sent, by the MD5 that the server reports as its ETag; where the ETag is something else,
    the object is read back. An interrupted upload compares in the same way what is already there;
    at a URL whose store is complete, only sizes and the annotation are compared.

    url
        s3://BUCKET/PATH, gs://BUCKET/PATH or az://CONTAINER/PATH.

    Raises StoreError if the store is not complete or is damaged, and if the URL holds another store
    or something else; Unreachable if the server denies access or does not answer.
    """
    check_local(store)
    url = clean_url(url)
    if url.startswith("http"):
        raise SemgenError(f"{url}: can only be read; push to an s3://, gs:// or az:// URL")
    upload = _Upload(PatchStore(store), url)
    with explained(url):
        return upload.run(progress)


class _Upload:
    """One store on its way to one URL."""

    def __init__(self, store: PatchStore, url: str) -> None:
        self._path, self._url = Path(store.path), url
        self._fingerprint = str(store.fingerprint)
        _check_tables(store)
        self._sharded = {name: ShardedReader(self._path, name) for name in SHARDED}
        self._digests: dict[str, Any] = {name: store.group[name].attrs[DIGESTS] for name in SHARDED}
        self._sizes = {key: self._file(key).stat().st_size for key in _list_objects(store)}
        self._root = self._file(_ROOT).read_bytes()
        self._remote = connect(url, answer_s=_SENDING_S)
        self._there: dict[str, Mapping[str, Any]] = {}
        """What was at the URL when the upload began, by key."""
        self._was_complete = False

    def run(self, progress: Progress) -> Pushed:
        """Send what is not there yet, then mark the store at the URL as complete."""
        begun = time.perf_counter()
        self._claim()
        old = [key for key in self._sizes if key in self._there]
        new = [key for key in self._sizes if key not in self._there]
        sent = self._settle_all("compare", old, progress) if old else []
        sent += self._settle_all("upload", new, progress, done=old) if new else []
        if not self._was_complete and self._replace(_ROOT, self._root):
            sent.append(len(self._root))
        return Pushed(
            url=self._url,
            fingerprint=self._fingerprint,
            objects=len(self._sizes) + 1,
            bytes=sum(self._sizes.values()) + len(self._root),
            sent=len(sent),
            sent_bytes=sum(sent),
            seconds=time.perf_counter() - begun,
        )

    def _claim(self) -> None:
        """Reserve the URL for this store, and list what is there of it.

        Raises StoreError if anything else is there.
        """
        from obstore.exceptions import AlreadyExistsError  # noqa: PLC0415 (optional)

        if self._get(_ROOT) is None:
            found = (entry["path"] for entry in self._list(most=2))
            stray = next(filter(None, found), None)  # the marker of a folder has no name
            if stray and self._get(_ROOT) is None:  # not of another push that has just begun
                raise StoreError(f"{self._url}: holds something else ({stray}); give another URL")
            root = json.loads(self._root)
            root["attributes"][ATTRIBUTE] |= {"state": "building", "stages": {}}
            with contextlib.suppress(AlreadyExistsError):  # checked below, whoever made it
                self._put(_ROOT, json.dumps(root).encode(), "create")
        state = self._check_owner(self._get(_ROOT))
        self._was_complete = state == "complete"
        self._there = {entry["path"]: entry for entry in self._list()}

    def _list(self, most: int | None = None) -> list[Mapping[str, Any]]:
        """What is at the URL, or the first entries of it."""

        def entries() -> Iterator[Mapping[str, Any]]:
            for batch in self._remote.list():
                yield from batch

        return _repeat(lambda: list(itertools.islice(entries(), most)))

    def _put(self, key: str, content: bytes, mode: Any) -> Any:
        return _repeat(lambda: self._remote.put(key, content, mode=mode))

    def _check_owner(self, root: bytes | None) -> str:
        """The state of the store whose root is at the URL; StoreError unless it is this store."""
        try:
            attribute = json.loads(root or b"")["attributes"][ATTRIBUTE]
            fingerprint, state = str(attribute["fingerprint"]), str(attribute["state"])
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{self._url}: holds something else than a semgen store; give another URL"
            ) from error
        if fingerprint != self._fingerprint:
            raise StoreError(
                f"{self._url}: holds another store (fingerprint {fingerprint[:16]}, not"
                f" {self._fingerprint[:16]}); give another URL"
            )
        return state

    def _settle_all(
        self, stage: str, keys: Sequence[str], progress: Progress, done: Sequence[str] = ()
    ) -> list[int]:
        """Sizes of the objects that were sent; `done` are the keys of an earlier stage."""
        sizes = self._sizes
        count = sum(sizes[key] for key in done)
        total = count + sum(sizes[key] for key in keys)
        sent: list[int] = []
        with (
            ThreadPoolExecutor(self._num_workers()) as pool,
            progress.stage(stage, -(-total // _MIB), "MiB", done=count // _MIB) as advance,
        ):
            for first in range(0, len(keys), _QUEUED):
                some = keys[first : first + _QUEUED]
                for key, was_sent in zip(some, pool.map(self._settle, some), strict=True):
                    if was_sent:
                        sent.append(sizes[key])
                    advance((count + sizes[key]) // _MIB - count // _MIB)
                    count += sizes[key]
        return sent

    def _num_workers(self) -> int:
        """Threads that upload: each holds a shard, decoded or as a file."""
        largest = max(
            reader.grid.rows_per_shard * math.prod(reader.shape[1:]) * reader.dtype.itemsize
            for reader in self._sharded.values()
        )
        return min(_WORKERS, max(1, _MEMORY_BYTES // largest))

    def _settle(self, key: str) -> bool:
        """See to it that one object is at the URL; True if it was sent."""
        from obstore.exceptions import AlreadyExistsError  # noqa: PLC0415 (optional)

        known, sent = self._there.get(key), False
        if known and self._was_complete and key != _ANNOTATED:
            same = known["size"] == self._sizes[key]
        else:
            content = self._file(key).read_bytes()
            if known and key == _ANNOTATED:
                return self._replace(key, content)
            if not known:
                self._check_shard(key)
                with contextlib.suppress(AlreadyExistsError):  # by another push of this store
                    known = self._put(key, content, "create")
                    sent = True
            digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
            tag = str((known or {}).get("e_tag")).strip('"')
            same = tag == digest or self._get(key) == content
        if not same:
            raise StoreError(
                f"{self._url}/{key}: has other content than the same file in {self._path}; delete"
                " this object, then run the same command again"
            )
        return sent

    def _replace(self, key: str, content: bytes) -> bool:
        """Overwrite an object that differs, unless someone else does; True if it was sent."""
        from obstore.exceptions import (  # noqa: PLC0415 (optional)
            AlreadyExistsError,
            PreconditionError,
        )

        try:
            found = _repeat(lambda: self._remote.get(key))
            old = bytes(found.bytes())
            if old == content:
                return False
            if key == _ROOT:
                self._check_owner(old)
            version: Any = {
                name: found.meta[name] for name in ("e_tag", "version") if found.meta[name]
            }
            self._put(key, content, version)
        except (PreconditionError, AlreadyExistsError, FileNotFoundError):
            if self._get(key) != content:
                raise StoreError(
                    f"{self._url}/{key}: was changed or deleted during the upload; run the same"
                    " command again"
                ) from None
        return True

    def _get(self, key: str) -> bytes | None:
        """Content of an object; None if there is none."""
        try:
            return bytes(_repeat(lambda: self._remote.get(key).bytes()))
        except FileNotFoundError:
            return None

    def _file(self, key: str) -> Path:
        """The file of an object."""
        file = self._path / key
        if file.is_symlink() or not file.is_file():
            raise StoreError(
                f"{file}: is missing or a link; restore the file, or prepare the store again"
            )
        return file

    def _check_shard(self, key: str) -> None:
        """StoreError if a shard is not as it was written; other objects pass."""
        name, _, index = key.partition("/c/")
        if name in self._sharded:
            shard = int(index.split("/")[0])
            if self._sharded[name].digest(shard) != self._digests[name][shard]:
                raise StoreError(
                    f"{self._path / key}: is damaged; `semgen verify {self._path}` names the rows."
                    " Restore the file from a backup, or prepare the store again"
                )


def _repeat(request: Callable[[], Result]) -> Result:
    """What a request gives; it is repeated where obstore does not.

    That is, a list, a put with a condition, or an answer without an object, that was cut off.
    """
    from obstore.exceptions import GenericError  # noqa: PLC0415 (optional)

    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            return request()
        except GenericError as error:
            if _CUT not in str(error) or time.monotonic() > until:
                raise
            time.sleep(_PAUSE_S)


def _check_tables(store: PatchStore) -> None:
    """StoreError unless settings, tables, weights and digests are as they were sealed."""
    try:
        intact = compute_fingerprint(store.path) == store.fingerprint
    except Exception:  # broken metadata can make zarr raise anything
        intact = False
    if not intact:
        raise StoreError(
            f"{store.path}: the content does not match the fingerprint; `semgen verify"
            f" {store.path}` names what is broken. Restore it from a backup, or prepare the store"
            " again"
        )


def _list_objects(store: PatchStore) -> Iterator[str]:
    """Keys of everything in a complete store, except for the metadata of its root."""
    yield from (f"{group}/zarr.json" for group in ("scans", "classes", *SPLITS))
    yield AUTOENCODER_FILE
    for name in (*store.tables, *SHARDED):
        array: Any = store.group[name]
        yield f"{name}/zarr.json"
        pieces = zip(array.shape, array.shards or array.chunks, strict=True)
        for index in np.ndindex(*(-(-length // piece) for length, piece in pieces)):
            yield f"{name}/c/{'/'.join(map(str, index))}"
