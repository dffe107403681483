"""Object storage: connect to a URL, and explain its errors in one line.

No error text, log or pickle holds a credential: they come from the environment, and what the server
or the library says is reduced to a status and an error code.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from store.errors import SemgenError
from store.format import Unreachable

if TYPE_CHECKING:
    from obstore.store import ObjectStore

SCHEMES = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "http", "https")
PATIENCE_S = 180.0
"""How long a request is repeated while the server does not answer or fails."""
ANSWER_S = 60
_TIMEOUTS = {"connect_timeout": "10s", "timeout": "10m"}
_CREDENTIALS = "give credentials in the environment (docs/remote.md)"


def clean_url(url: str | Path) -> str:
    """A URL as it is shown and opened: `s3:/bucket/`, which pathlib makes, as `s3://bucket`.

    Raises SemgenError for a URL that contains a password, a token or a signature, without showing
    it, and for a scheme that is not supported.
    """
    scheme, _, rest = str(url).partition(":/")
    text = f"{scheme.lower()}://{rest.strip('/')}"
    parts = urlsplit(text)
    if parts.scheme not in SCHEMES:
        raise SemgenError(
            f"{parts.scheme}: URLs of this kind are not supported; supported are"
            f" {', '.join(SCHEMES)}"
        )
    is_container = parts.scheme.startswith("abfs")  # abfs://CONTAINER@ACCOUNT.dfs...
    if parts.password or (parts.username and not is_container) or parts.query or parts.fragment:
        where = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        raise SemgenError(
            f"{where}: contains a user, a password or a query; remove it, and {_CREDENTIALS}"
        )
    return text


def connect(
    url: str | Path, *, patience_s: float = PATIENCE_S, answer_s: int = ANSWER_S
) -> ObjectStore:
    """The object store at a URL, with keys relative to it; nothing is requested yet.

    patience_s
        Maximum time in seconds for repeating a request that failed for want of an answer.
    answer_s
        Maximum time in seconds from the start of a request, which may be an upload, to its answer.

    Raises SemgenError where obstore is not installed, for a URL with credentials in it, and where
    the environment lacks a setting.
    """
    url = clean_url(url)
    refuse_fork(url)
    try:
        from obstore.exceptions import BaseError  # noqa: PLC0415 (optional)
        from obstore.store import from_url  # noqa: PLC0415
    except ImportError as error:
        raise SemgenError(
            f'{url}: object storage needs obstore; install it: pip install "semgen[remote]"'
        ) from error
    options: dict[str, Any] = {
        # plain HTTP is used only where the URL or an endpoint in the environment says http://
        "client_options": {"allow_http": True, **_TIMEOUTS, "read_timeout": f"{answer_s}s"},
        "retry_config": {
            "max_retries": 1000,  # the time is the limit
            "retry_timeout": timedelta(seconds=patience_s),
            "backoff": {
                "init_backoff": timedelta(milliseconds=100),
                "max_backoff": timedelta(seconds=10),
            },
        },
    }
    if url.startswith("s3") and _needs_profile():
        options["credential_provider"] = _read_profile(url)
    try:
        store: ObjectStore = from_url(url, **options)
    except (BaseError, ValueError) as error:
        missing = re.search(r"error: (Account must be specified)", str(error))
        detail = f" ({missing[1]})" if missing else ""
        raise SemgenError(
            f"{url}: the environment lacks a setting for it{detail}; see docs/remote.md"
        ) from None
    return store


def refuse_fork(url: object) -> None:
    """Raise Unreachable in a forked process: the threads of obstore exist in its parent only."""
    if _first_process() != os.getpid():
        raise Unreachable(
            f"{url}: object storage was already used in the parent of this forked process; start"
            ' worker processes with "spawn" or "forkserver"'
        )


@functools.cache
def _first_process() -> int:
    """The process that first used obstore; a fork inherits the answer."""
    return os.getpid()


@contextmanager
def explained(url: object) -> Iterator[None]:
    """Raise Unreachable, in one line, for a request that fails.

    FileNotFoundError for a missing object is passed on; a missing bucket is Unreachable.
    """
    from obstore.exceptions import (  # noqa: PLC0415
        BaseError,
        NotSupportedError,
        PermissionDeniedError,
        UnauthenticatedError,
    )

    refuse_fork(url)
    try:
        yield
    except FileNotFoundError as error:
        if _lacks_bucket(error):
            raise Unreachable(f"{url}: no such bucket") from None
        raise
    except (PermissionDeniedError, UnauthenticatedError) as error:
        raise Unreachable(f"{url}: access denied{_answer(error)}; {_CREDENTIALS}") from None
    except NotSupportedError:
        raise Unreachable(
            f"{url}: the server does not answer byte ranges; use another one"
        ) from None
    except BaseError as error:
        if _lacks_bucket(error):  # when listing
            raise Unreachable(f"{url}: no such bucket") from None
        if "169.254.169.254" in str(error) or "TokenRequest" in str(error):
            raise Unreachable(f"{url}: no credentials found; {_CREDENTIALS}") from None
        raise Unreachable(
            f"{url}: the server cannot be reached or fails{_answer(error)}; check the URL, the"
            " endpoint and the network, then run the same command again"
        ) from None


def _lacks_bucket(error: Exception) -> bool:
    return re.search("<Code>(NoSuchBucket|ContainerNotFound)</Code>", str(error)) is not None


def _answer(error: Exception) -> str:
    """What the server said, as its status and error code alone: other text may hold a signature."""
    found = (
        re.search(r"status code: (\d{3})", str(error)),
        re.search(r"<Code>(\w+)</Code>", str(error)),
    )
    parts = [match[1] for match in found if match]
    return f" ({', '.join(parts)})" if parts else ""


def _needs_profile() -> bool:
    """Whether S3 credentials are in a profile of ~/.aws, as the AWS tools write it."""
    environment = os.environ
    if environment.get("AWS_ACCESS_KEY_ID") or environment.get("AWS_SKIP_SIGNATURE"):
        return False
    folder = Path.home() / ".aws"
    return "AWS_PROFILE" in environment or (folder / "credentials").exists()


def _read_profile(url: str) -> Any:
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider  # noqa: PLC0415 (optional)
    except ImportError as error:
        raise SemgenError(
            f"{url}: profiles of ~/.aws need boto3; pip install boto3, or set AWS_ACCESS_KEY_ID and"
            " AWS_SECRET_ACCESS_KEY"
        ) from error
    try:
        return Boto3CredentialProvider()
    except Exception:  # botocore raises many, and the text may hold what is in the file
        raise SemgenError(
            f"{url}: the profile in ~/.aws cannot be read; check AWS_PROFILE"
        ) from None
