"""Find the folders of an archive and the files in them; no file is opened here."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from store.errors import SemgenError, check_local
from store.images import Rejected


class ArchiveError(SemgenError):
    """A folder or file of the archive does not exist."""


@dataclass(frozen=True, slots=True)
class Folder:
    """One folder and the names of its files."""

    origin: str
    """Its path within the archive, wherever the archive lies."""
    path: str
    files: tuple[str, ...]
    rejected: Rejected | None = None
    """Why nothing of the folder is listed here; it has no files then."""

    def __repr__(self) -> str:
        return f"<Folder: {len(self.files)} files>"


def resolve_archive(archive: str | Path | Sequence[str | Path]) -> list[Path]:
    """Each folder and file once, absolute and without links, so that spellings compare equal.

    A linked file keeps its own name, whose suffix may be missing from its target's.

    Raises ArchiveError for what does not exist, SemgenError for a URL.
    """
    resolved = []
    for path in map(Path, [archive] if isinstance(archive, str | Path) else archive):
        check_local(path)
        if not path.exists():
            raise ArchiveError(f"{path}: no such file or folder")
        folder, name = (path, "") if path.is_dir() else (path.parent, path.name)
        resolved.append(Path(os.path.realpath(folder)) / name)
    return list(dict.fromkeys(resolved))


def check_present(archive: Iterable[str | Path], file: str | None = None) -> None:
    """Raise ArchiveError when a folder of the archive can no longer be listed, or is empty.

    Then a disk is not mounted any more, or a permission was taken away: files are not bad.

    file
        Check only the folder with this file.
    """
    for root in map(str, archive):
        if os.path.isfile(root) or (file and not file.startswith(os.path.join(root, ""))):
            continue
        try:
            what = "" if os.listdir(root) else "is empty now"
        except OSError as error:
            what = error.strerror or type(error).__name__
        if what:
            raise ArchiveError(
                f"{root}: {what}, on {socket.gethostname()}; make the archive readable there, then"
                " run the same command again to resume"
            )


def find_folders(archive: Sequence[Path]) -> Iterator[Folder]:
    """The given folders and all folders below them, and single files, in a stable order.

    A linked folder is followed where its target lies outside the archive, each target once; other
    links are rejected. A folder or file of `archive` that lies within another is found once. Raises
    ArchiveError when one of `archive` does not exist.
    """
    given = frozenset(map(str, archive))
    known = {os.path.realpath(root) for root in archive}  # and the targets of followed links
    for number, root in enumerate(archive):
        if root.is_file():
            yield Folder(str(number), str(root.parent), (root.name,))
        elif root.is_dir():
            for path, files, rejected in _walk(str(root), given, known):
                origin = f"{number}/{Path(path).relative_to(root).as_posix()}"
                if files or rejected:
                    yield Folder(origin, path, files, rejected)
        else:
            raise ArchiveError(f"{root}: no such file or folder")


def _walk(
    root: str, given: frozenset[str], known: set[str]
) -> Iterator[tuple[str, tuple[str, ...], Rejected | None]]:
    """(folder, names of its files, why nothing of it is listed) of a folder and all below it."""
    waiting = [(root, False)]
    while waiting:
        path, below_link = waiting.pop()
        try:
            with os.scandir(path) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            yield path, (), Rejected("folder not readable", error.strerror or type(error).__name__)
            continue
        target = os.path.realpath(path) if below_link else path
        folders, files, links = [], [], []
        for entry in entries:
            is_link = entry.is_symlink()
            own_path = os.path.join(target, entry.name)
            if own_path in given or (below_link and not is_link and own_path in known):
                continue  # found without this link, or on its own
            if not _is_folder(entry):
                files.append(entry.name)
            elif is_link:
                if _is_new_target(entry.path, known):
                    folders.append((entry.path, True))
                else:
                    links.append(entry.path)
            else:
                folders.append((entry.path, below_link))
        yield path, tuple(files), None
        for link in links:
            yield link, (), Rejected("linked folder", "its target is read without this link")
        waiting += reversed(folders)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links in a circle: reading it will give the reason
        return False


def _is_new_target(link: str, known: set[str]) -> bool:
    """Whether a link's target is not known yet; adds it to `known`."""
    target = Path(os.path.realpath(link))
    if not known.isdisjoint(map(str, (target, *target.parents))):
        return False
    known.add(str(target))
    return True
