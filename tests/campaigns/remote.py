"""A store pushed to, and read from, an S3 server whose answers get lost: is anything else read?

    python -m tests.campaigns.remote --rounds 50

In each round, a proxy delays all requests, and a share of them is dropped, fails with 500 or 503,
or is answered in part. `semgen push` is killed at random moments and run again; the objects must
then have the bytes of the files. Two epochs of batches are read, with and without a cache on disk,
and `semgen pretrain` trains: batches and metrics must be those of the store's folder. In some
rounds, the server then fails for good: reading must end in one line.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import numpy as np

from store.format import Unreachable
from store.remote import connect
from tests.support.command import running_semgen, start_server
from tests.support.object_store import BUCKET, digests, serve_s3
from tests.support.slow_proxy import Fault, SlowProxy
from tests.support.stores import contents
from tests.support.synthetic_store import make_store
from trainer import PatchDataset

FAULTS: tuple[Fault, ...] = ("drop", "lose", "cut", 500, 503)
_MOST_FAULTS, _MOST_LATENCY_S, _OUTAGES = 0.4, 0.02, 0.2
_TRAINING = (
    *("--width", "2", "--batch-size", "16", "--epochs", "2", "--warmup-epochs", "1"),
    *("--device", "cpu"),
)


class Campaign:
    """A store, what an undisturbed reader gets of it, and a proxy that disturbs."""

    def __init__(self, folder: Path, proxy: SlowProxy, seed: int) -> None:
        self.folder, self.proxy = folder, proxy
        self.rng = np.random.default_rng(seed)
        self.errors = folder / "errors"
        self.errors.touch()
        self.cache: dict[str, str] = {}
        self.store = make_store(folder / "store", shape=(16, 16, 16), rows_per_shard=8)
        self.whole = contents(self.store)
        self.batches = self.read(str(self.store))
        self.seconds = 0.0
        """What the last `semgen push` took."""
        assert self.run("pretrain", self.store, folder / "whole", *_TRAINING) == 0
        self.counts: Counter[str] = Counter()

    def run(self, *words: object, kill_after: float | None = None) -> int | None:
        """Run the command line to its end, or kill it after some seconds: its exit status."""
        with running_semgen(*words, errors=self.errors, environment=self.cache) as job:
            job.join(kill_after)
            job.kill()
            job.join()
        return job.exitcode

    def disturb(self, rate: float) -> None:
        """From now on, this share of the requests fails; 0: none does."""
        rng = np.random.default_rng(self.rng.integers(2**32))

        def fault(request: str) -> Fault:
            return FAULTS[rng.integers(len(FAULTS))] if rng.random() < rate else None

        self.proxy.fault = fault
        self.proxy.latency_s = self.rng.uniform(0, _MOST_LATENCY_S) if rate else 0.0

    def round(self, number: int) -> None:
        url = f"{BUCKET}/{number}.store"
        self.disturb(self.rng.uniform(0, _MOST_FAULTS))
        self.push(url)
        self.use_cache(number)
        self.check("batches", self.read(url) == self.batches)
        self.use_cache(number, "-of-training")  # else what was read just now is not read again
        run = self.folder / f"run{number}"
        self.counts["trainings"] += 1
        self.check("trainings", self.train(url, run))
        if self.rng.random() < _OUTAGES:
            self.counts["outages"] += 1
            self.check("outages", self.read_until_lost(url))
        self.disturb(0)

    def use_cache(self, number: int, suffix: str = "") -> None:
        """Use a new cache on disk in odd rounds, and none in even ones."""
        folder = self.folder / f"cache{number}{suffix}"
        self.cache = {"SEMGEN_CACHE": str(folder), "SEMGEN_CACHE_GB": str(number % 2)}
        os.environ |= self.cache

    def check(self, what: str, is_right: bool) -> None:
        if not is_right:
            self.counts[f"{what}, wrong"] += 1
            print(f"{what} wrong: {self.errors.read_text()}", flush=True)

    def push(self, url: str) -> None:
        """Push, and kill the command up to three times on the way."""
        for _ in range(self.rng.integers(4)):
            moment = self.rng.uniform(0, self.seconds)
            status = self.run("push", self.store, url, kill_after=moment)
            if status != -signal.SIGKILL:  # it ended before
                self.check("pushes before a kill", status == 0)
                break
            self.counts["kills"] += 1
        began = time.perf_counter()
        status = self.run("push", self.store, url)
        self.seconds = time.perf_counter() - began
        self.counts["pushes"] += 1
        fault, self.proxy.fault = self.proxy.fault, lambda request: None
        self.check("pushes", status == 0 and digests(connect(url)) == self.whole)
        self.proxy.fault = fault

    def read(self, store: str) -> list[tuple[bytes, bytes]]:
        """Rows and crops of the batches of two epochs."""
        dataset = PatchDataset(store, batch_size=16, cache="none")
        return [
            (batch.rows.tobytes(), batch.crops.numpy().tobytes())
            for epoch in range(2)
            for batch in dataset.batches(epoch)
        ]

    def train(self, url: str, run: Path) -> bool:
        if self.run("pretrain", url, run, *_TRAINING) != 0:
            return False
        ours, theirs = (path / "metrics.jsonl" for path in (run, self.folder / "whole"))
        return ours.read_bytes() == theirs.read_bytes()

    def read_until_lost(self, url: str) -> bool:
        """Whether reading ends in one line when the server is gone after a few requests."""
        left = self.rng.integers(40)
        self.proxy.requests.clear()
        self.proxy.fault = lambda request: 503 if len(self.proxy.requests) > left else None
        os.environ["SEMGEN_CACHE_GB"] = "0"
        with (
            patch("store.location._OPENING_S", 1.0),
            patch("store.location._READING_S", 1.0),
        ):
            try:
                return self.read(url) == self.batches
            except Unreachable as error:
                return len(str(error).splitlines()) == 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, serve_s3() as server, SlowProxy(server) as proxy:
        os.environ["AWS_ENDPOINT_URL"] = proxy.url
        start_server()  # its processes have the environment of now
        campaign = Campaign(Path(scratch), proxy, chosen.seed)
        for number in range(chosen.rounds):
            campaign.round(number)
            print(f"{number + 1} rounds: {dict(campaign.counts)}", flush=True)
    print(json.dumps(campaign.counts))
    sys.exit(int(any("wrong" in name for name in campaign.counts)))


if __name__ == "__main__":
    main()
