"""Files and folders that appear whole or not at all: under a temporary name, then renamed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from store.errors import SemgenError

_PREFIX = ".partial-"


@contextlib.contextmanager
def replace_file(file: Path, *, shared: bool = False, durable: bool = False) -> Iterator[Path]:
    """Give a temporary path beside `file` to write to, and rename it to `file` at the end.

    The temporary path has the same suffix. When the block raises, it is deleted and `file` stays
    as it was. The folder must exist.

    shared
        Several processes may write the file at the same time; the last one to end wins.
    durable
        Force content and name to the disk, so that a power failure cannot undo the rename.
    """
    unique = f"{uuid.uuid4().hex}-" if shared else ""
    partial = file.with_name(f"{_PREFIX}{unique}{file.name}")
    try:
        yield partial
        if durable:
            flush(partial)
        partial.replace(file)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == str(partial):
            error.filename = str(file)  # the name that the user knows
        raise
    if durable:
        flush(file.parent)


@contextlib.contextmanager
def fill_folder(folder: Path, *, last: str) -> Iterator[Path]:
    """Give a temporary folder inside `folder` to write to, and move its content up at the end.

    `folder` is created when missing; nothing may be in it but what a killed writer left. When the
    block raises, what it wrote is deleted.

    last
        Name of the file that is moved last: where it exists, the folder is complete.

    Raises SemgenError when `folder` is not an empty folder, or another process is filling it.
    """
    partial = folder / f"{_PREFIX}folder"
    if folder.exists() and not folder.is_dir():
        raise SemgenError(f"{folder}: is a file; give another name for the folder")
    folder.mkdir(parents=True, exist_ok=True)
    busy = SemgenError(f"{folder}: another process is writing here; wait for it")
    with locked(folder, busy=busy):
        if set(folder.iterdir()) - {partial}:
            raise SemgenError(f"{folder}: exists and is not an empty folder; give another one")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            for made in sorted(partial.iterdir(), key=lambda made: made.name == last):
                made.rename(folder / made.name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def locked(path: Path, *, busy: SemgenError | None = None) -> Iterator[None]:
    """Lock a folder, or a file that is created where it is missing.

    busy
        Raised where another process has it locked. None: wait for that process.
    """
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
    descriptor = os.open(path, flags, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError:
            assert busy is not None
            raise busy from None
        yield
    finally:
        os.close(descriptor)


def flush(path: Path) -> None:
    """Force one file, or the names in one folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def delete_partial_files(folder: Path) -> None:
    """Delete what killed writers left in a folder and below, zarr-python's temporary files too."""
    for pattern in (f"{_PREFIX}*", "*.partial"):
        for partial in folder.rglob(pattern):
            partial.unlink(missing_ok=True)
