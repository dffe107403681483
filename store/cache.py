"""Shards of remote stores on the local disk, shared by all processes of a user.

SEMGEN_CACHE names the folder (default: ~/.cache/semgen), SEMGEN_CACHE_GB its limit (default: 50; 0
for no cache). Files are named by the fingerprint of their store, so one store never gets the bytes
of another. Only their owner can read them: they are images of patients.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from store.errors import ConfigError

DEFAULT_GB: Final = 50.0
_FREE_BYTES = 2**30
"""Free space that is left on the disk."""
_IN_USE_S = 3600.0
"""A file that was used this recently is not deleted to make room: a training reads its shards in
random order, so deleting one for another would only move bytes."""
_NOTED_S = 600.0
"""How exactly the last use of a file is known."""
_PAUSE_S = 60.0
"""How long nothing is added after a failure."""
_log = logging.getLogger(__name__)


def open_cache(fingerprint: str) -> ShardCache | None:
    """The cache of one store; None where it is switched off.

    Raises ConfigError when SEMGEN_CACHE_GB is not a number from 0 up.
    """
    given = os.environ.get("SEMGEN_CACHE_GB", str(DEFAULT_GB))
    if not re.fullmatch(r"\d+(\.\d*)?", given):
        raise ConfigError(f"SEMGEN_CACHE_GB must be a number of gigabytes, got {given!r}")
    limit = int(float(given) * 1e9)
    if not limit or not re.fullmatch("[0-9a-f]{64}", fingerprint):  # it names a folder
        return None
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = Path(os.environ.get("SEMGEN_CACHE") or caches / "semgen").expanduser().absolute()
    return ShardCache(root / "stores", fingerprint, limit)


class ShardCache:
    """The cached files of one store, by key: the same keys as in the store."""

    def __init__(self, root: Path, fingerprint: str, limit: int) -> None:
        """`root` holds the files of all stores, in total at most `limit` bytes."""
        self.folder = root / fingerprint
        self._root, self._limit = root, limit
        self._paused_until = 0.0

    def make_folder(self) -> None:
        """Create `folder`, for its owner only."""
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder.mkdir(mode=0o700, exist_ok=True)

    def has(self, key: str) -> bool:
        """Whether a file is there; it then counts as used now."""
        file = self.folder / key
        try:
            if time.time() - file.stat().st_mtime > _NOTED_S:
                os.utime(file)
        except FileNotFoundError:
            return False
        except OSError as error:
            self._pause(f"cannot be used ({error.strerror})")
            return False
        return True

    def discard(self, key: str) -> None:
        """Delete a file that turned out to be damaged."""
        (self.folder / key).unlink(missing_ok=True)

    @property
    def is_paused(self) -> bool:
        """Whether a file could not be added lately."""
        return time.monotonic() < self._paused_until

    def add(self, key: str, download: Callable[[], bytes | None]) -> None:
        """Download a file, unless another process is doing so; None is not kept.

        A full disk, or a folder that cannot be written, is logged once and not raised.
        """
        file = self.folder / key
        partial = file.with_name(f".partial-{file.name}")
        try:
            self.make_folder()
            file.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("ab") as opened:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if file.exists():  # another process was faster
                    return
                content = download()
                if content is None or not self._make_room(len(content)):
                    partial.unlink()
                    return
                opened.truncate(0)  # what a killed process left
                opened.write(content)
                opened.flush()
                partial.rename(file)
        except (BlockingIOError, FileNotFoundError):
            return  # another process has it, or deleted it
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            self._pause(f"cannot be written ({error.strerror})")

    def _make_room(self, needed: int) -> bool:
        """Delete the files that were not used for longest; False where that is not enough."""
        files = sorted(self._list_files())
        free = shutil.disk_usage(self._root).free
        excess = needed + max(sum(size for _, size, _ in files) - self._limit, _FREE_BYTES - free)
        for used, size, path in files:
            if excess <= 0 or time.time() - used < _IN_USE_S:
                break
            path.unlink(missing_ok=True)
            excess -= size
        if excess > 0:
            self._pause(
                f"is full: at most {self._limit / 1e9:g} GB (SEMGEN_CACHE_GB), and"
                f" {free / 1e9:.3g} GB of the disk are free"
            )
        return excess <= 0

    def _list_files(self) -> Iterator[tuple[float, int, Path]]:
        """Time of the last use, size and path of the files of all stores."""
        for folder, _, names in os.walk(self._root):
            for name in names:
                path = Path(folder, name)
                with contextlib.suppress(FileNotFoundError):  # another process deleted it
                    status = path.stat()
                    yield status.st_mtime, status.st_size, path

    def _pause(self, reason: str) -> None:
        if not self._paused_until:
            _log.warning(
                "the cache in %s %s; rows that are not in it are read from the server every time",
                self._root, reason,
            )  # fmt: skip
        self._paused_until = time.monotonic() + _PAUSE_S
