"""A web server on loopback that serves the files of a folder, with byte ranges and no listings."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@contextmanager
def serve_files(folder: Path, *, ranges: bool = True) -> Iterator[str]:
    """Serve a folder; yields its URL. Without `ranges`, files are always sent whole."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            file = folder / self.path.lstrip("/")
            if not file.is_file():
                self.send_error(404)
                return
            content = whole = file.read_bytes()
            asked = self.headers.get("Range", "") if ranges else ""
            if wanted := re.fullmatch(r"bytes=(\d*)-(\d*)", asked):
                first, last = wanted.groups()
                start = int(first) if first else max(0, len(whole) - int(last))
                content = whole[start : int(last) + 1 if first and last else None]
                self.send_response(206)
                end = start + len(content) - 1
                self.send_header("Content-Range", f"bytes {start}-{end}/{len(whole)}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Last-Modified", self.date_time_string(file.stat().st_mtime))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_HEAD = do_GET  # noqa: N815 (the name that the base class looks for)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
