"""An S3 server on loopback for tests, and what it holds."""

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.request import Request, urlopen

import pytest
from moto.server import ThreadedMotoServer
from obstore.store import ObjectStore

BUCKET = "s3://bucket"
SECRET = "0secret0"


@contextmanager
def serve_s3() -> Iterator[str]:
    """Serve `BUCKET`; the environment has endpoint and credentials. Yields host:port."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # it logs every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        address = ":".join(map(str, server.get_host_and_port()))
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("AWS_ENDPOINT_URL", f"http://{address}")
            environment.setenv("AWS_ACCESS_KEY_ID", "somebody")
            environment.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
            environment.setenv("AWS_REGION", "us-east-1")
            urlopen(Request(f"http://{address}/bucket", method="PUT")).close()
            yield address
    finally:
        server.stop()


def digests(remote: ObjectStore) -> dict[str, str]:
    """SHA-256 of every object, by its key."""
    return {
        entry["path"]: hashlib.sha256(remote.get(entry["path"]).bytes()).hexdigest()
        for batch in remote.list()
        for entry in batch
    }
