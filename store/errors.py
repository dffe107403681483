"""Errors that are meant for the user, and the check for URLs."""

from __future__ import annotations

import re
from pathlib import Path

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


class SemgenError(ValueError):
    """The request cannot be carried out; the message says what is wrong, where, and how to fix it.

    The command line prints the message alone. Any other exception is a bug and keeps its traceback.
    """


class ConfigError(SemgenError):
    """A setting is unknown, of the wrong type, or out of its range."""


def is_url(path: object) -> bool:
    """Whether a path is a URL, also as `s3:/bucket`, which pathlib makes of `s3://bucket`."""
    return _URL.match(str(path)) is not None


def check_local(path: str | Path) -> None:
    """Raise SemgenError for a URL."""
    if is_url(path):
        raise SemgenError(
            f"{path}: is a URL; only files and folders are supported here. Copy it to a folder, or"
            " mount it as one; to upload a store, use `semgen push STORE URL`"
        )


def is_utf8(path: str | Path) -> bool:
    """Whether the bytes of a path are UTF-8: SimpleITK and TensorBoard cannot open others."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def check_suffix(file: str | Path, *suffixes: str) -> None:
    """Raise SemgenError unless a file to write has one of these suffixes, in any case.

    So that a file of another kind is not overwritten by mistake.
    """
    if Path(file).suffix.lower() not in suffixes:
        raise SemgenError(f"{file}: give a file that ends in {' or '.join(suffixes)}")
