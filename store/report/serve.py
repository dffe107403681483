"""Serve the page of discovered classes, with editing: `semgen browse`.

The URL contains an access token; a request without it is refused. No request names a file: classes
and rows are numbers that are checked against the store.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import math
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from functools import lru_cache
from typing import Any

from tornado.httpserver import HTTPServer
from tornado.httputil import split_host_and_port
from tornado.netutil import bind_sockets
from tornado.web import Application, HTTPError, RequestHandler

from store.classes import annotate, clean
from store.format import SPLITS, StoreError
from store.quality import Quality
from store.reader import PatchStore
from store.report.build import (
    CARD_TILES,
    card_tiles,
    class_sheet,
    crop_sheet,
    mean_crop,
    render_data,
    render_page,
    scan_sheet,
)
from store.report.pictures import encode_tiles

LOOPBACK = "127.0.0.1"
_CACHED_SHEETS, _CACHED_VOXELS = 256, 2**26
"""Pictures that are kept, and the voxels of crops that they may show: a byte each at most."""
_FIELDS = {"name": (str, 200), "note": (str, 2000), "excluded": (bool, 0)}
"""Fields that can be changed: type, and maximum number of characters."""


class ReportApp:
    """An open store, its quality, and the access token of the page."""

    def __init__(self, store: PatchStore, quality: list[Quality], *, any_host: bool) -> None:
        self.store, self.quality, self.any_host = store, quality, any_host
        self.token = secrets.token_urlsafe(24)
        cached = min(_CACHED_SHEETS, max(8, _CACHED_VOXELS // math.prod(store.crop_shape)))
        self.draw = lru_cache(cached)(self._draw)

    def page(self) -> str:
        """The page with the present annotation."""
        head, tail = render_page("default-src 'none'; img-src 'self' data:; connect-src 'self'")
        return head + render_data(self.store, self.quality, classes_per_sheet=1, live=True) + tail

    def _draw(self, kind: str, split: str, number: int) -> bytes:
        """A picture; KeyError for one that does not exist."""
        count = len(self.store.split(split)) if kind == "crop" else self.store.num_classes
        if kind != "scans" and number >= count:
            raise KeyError(number)
        makers: dict[str, Callable[[], bytes]] = {
            "class": lambda: class_sheet(self.store, number, mean_crop(self.store, number)),
            "cards": lambda: encode_tiles(
                card_tiles(self.store, number, mean_crop(self.store, number)), CARD_TILES
            ),
            "crop": lambda: crop_sheet(self.store, split, number),
            "scans": lambda: scan_sheet(self.store),
        }
        return makers[kind]()


class _Handler(RequestHandler):
    app: ReportApp

    def initialize(self, app: ReportApp) -> None:
        self.app = app

    def prepare(self) -> None:
        """Refuse requests without the token, or for another host name (DNS rebinding)."""
        host, _ = split_host_and_port(self.request.host)
        known = self.app.any_host or host in {LOOPBACK, "localhost"}
        token = self.path_args[0].encode()
        if not known or not hmac.compare_digest(token, self.app.token.encode()):
            raise HTTPError(403)

    def set_default_headers(self) -> None:
        self.set_header("Cache-Control", "no-store")
        self.set_header("Referrer-Policy", "no-referrer")
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("X-Frame-Options", "DENY")

    def log_exception(self, kind: Any, error: Any, trace: Any) -> None:
        """Log errors of the server without the URL, which contains the token."""
        if not isinstance(error, HTTPError):
            logging.getLogger("tornado.application").error("fault", exc_info=(kind, error, trace))

    def write_error(self, status_code: int, **kwargs: object) -> None:
        self.set_header("Content-Type", "text/plain")
        self.finish(f"{status_code}: {self._reason}\n")


class _Page(_Handler):
    async def get(self, token: str) -> None:
        self.finish(await asyncio.to_thread(self.app.page))


class _Sheet(_Handler):
    async def get(self, token: str, kind: str, split: str | None, number: str | None) -> None:
        try:
            content = await asyncio.to_thread(
                self.app.draw, kind, split or SPLITS[0], int(number or 0)
            )
        except KeyError as error:
            raise HTTPError(404) from error
        self.set_header("Content-Type", "image/webp")
        self.finish(content)


class _Class(_Handler):
    async def put(self, token: str, label: str) -> None:
        if self.request.headers.get("Content-Type") != "application/json":
            raise HTTPError(415)
        change = _read_change(self.request.body)
        if change is None:
            raise HTTPError(400)
        try:
            annotation = await asyncio.to_thread(
                annotate, self.app.store.path, {int(label): change}
            )
        except StoreError as error:
            raise HTTPError(404) from error
        except OSError as error:
            raise HTTPError(403, reason="The store cannot be written") from error
        self.finish(asdict(annotation[int(label)]))


def _read_change(body: bytes) -> dict[str, Any] | None:
    """Fields of an annotation and their new values; None if the request holds anything else."""
    try:
        change = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(change, dict):
        return None
    for name, value in change.items():
        kind, most = _FIELDS.get(name, (None, 0))
        if kind is None or not isinstance(value, kind):
            return None
        if isinstance(value, str) and (len(value) > most or clean(value, name) != value):
            return None
    return change


def make_application(app: ReportApp) -> Application:
    """The Tornado application."""
    shared = {"app": app}
    return Application(
        [
            (r"/([^/]+)/", _Page, shared),
            (r"/([^/]+)/sheet/(class|cards|scans|crop)(?:-(train|validation))?(?:-(\d{1,9}))?",
             _Sheet, shared),
            (r"/([^/]+)/class/(\d{1,9})", _Class, shared),
            (r"/(.*)", _Handler, shared),
        ]
    )  # fmt: skip


async def serve(
    store: PatchStore,
    quality: list[Quality],
    *,
    host: str = LOOPBACK,
    port: int = 0,
    on_start: Callable[[str], object],
    stop: Awaitable[object] | None = None,
) -> None:
    """Listen on `host` and `port` (0: any free one) until `stop`; `on_start` gets the URL."""
    logging.getLogger("tornado.access").setLevel(logging.CRITICAL)  # it would log the token
    app = ReportApp(store, quality, any_host=host not in {LOOPBACK, "localhost"})
    try:
        sockets = bind_sockets(port, host)
    except OSError as error:  # also for an unknown host
        raise StoreError(
            f"cannot listen on {host}, port {port}: {error.strerror or error}; give another --host"
            " or --port, or omit --port to use a free port"
        ) from error
    server = HTTPServer(make_application(app), max_body_size=2**16)
    server.add_sockets(sockets)
    try:
        name = f"[{host}]" if ":" in host else host
        on_start(f"http://{name}:{sockets[0].getsockname()[1]}/{app.token}/")
        await (stop or asyncio.Event().wait())
    finally:
        server.stop()
        await server.close_all_connections()
