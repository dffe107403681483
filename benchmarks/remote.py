"""Training batches from object storage: rate, and the share of time that a training waits for them.

    AWS_ENDPOINT_URL=http://127.0.0.1:8333 AWS_ACCESS_KEY_ID=... AWS_SECRET_ACCESS_KEY=... \
        python -m benchmarks.remote STORE URL [--latency-ms 30] [--step-ms 50] [--write]

STORE is a store in a folder, URL an S3 URL to which `semgen push` uploaded it. Each case reads five
epochs in a process of its own: batches of 64, two threads, no cache in memory. First as fast as
possible: crops/s. Then with a pause of `--step-ms` after each batch, as a GPU needs for its step:
the share of the time that the loop waits. Opening the store is not counted. Requests go through a
proxy in this process, which adds the latency to each and counts them; it needs a part of the cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from store import PatchStore
from tests.support.slow_proxy import SlowProxy
from trainer import PatchDataset

BATCH_SIZE, THREADS = 64, 2
RESULTS = Path(__file__).with_name("RESULTS.md")


def measure(store: str, step_s: float) -> dict[str, float]:
    """Rate and share of waiting in the first epoch, and in the others."""
    dataset = PatchDataset(store, batch_size=BATCH_SIZE, threads=THREADS, cache="none")
    found = {}
    for name, epochs in (("first", range(1)), ("later", range(1, 5))):
        found[f"rate, {name}"], found[f"waiting, {name}"] = read_epochs(dataset, epochs, step_s)
    return found


def read_epochs(dataset: PatchDataset, epochs: range, step_s: float) -> tuple[float, float]:
    """Crops per second with a pause after each batch, and the share of time outside the pauses."""
    began, asleep_s = time.perf_counter(), 0.0
    for epoch in epochs:
        for _ in dataset.batches(epoch):
            stepped = time.perf_counter()
            time.sleep(step_s)
            asleep_s += time.perf_counter() - stepped
    elapsed_s = time.perf_counter() - began
    return len(epochs) * len(dataset.plan.rows) / elapsed_s, 1 - asleep_s / elapsed_s


def run(store: str, step_s: float, **environment: str) -> dict[str, float]:
    """`measure` in a new process."""
    command = [sys.executable, "-m", __spec__.name, store, "-", "--measure", str(step_s)]
    done = subprocess.run(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True
    )
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def run_case(
    store: str, step_s: float, proxy: SlowProxy, latency_s: float, folder: str, limit: float
) -> str:
    """A row of the table: without and with pauses, each with an empty cache of its own."""
    proxy.latency_s = latency_s
    environment = {"AWS_ENDPOINT_URL": proxy.url, "SEMGEN_CACHE_GB": str(limit)}
    results, requests = [], []
    for name, pause_s in (("fast", 0.0), ("paused", step_s)):
        proxy.requests.clear()
        results.append(run(store, pause_s, **environment, SEMGEN_CACHE=f"{folder}/{name}"))
        requests.append(len(proxy.requests))
    rates = [f"{results[0][f'rate, {name}']:.0f}" for name in ("first", "later")]
    waits = [f"{results[1][f'waiting, {name}']:.1%}" for name in ("first", "later")]
    return " | ".join([*rates, *waits, f"{requests[1]} |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store")
    parser.add_argument("url")
    parser.add_argument("--latency-ms", type=float, default=30)
    parser.add_argument("--step-ms", type=float, default=50)
    parser.add_argument("--measure", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="append to RESULTS.md")
    given = parser.parse_args()
    if given.measure is not None:
        print(json.dumps(measure(given.store, given.measure)))
        return
    train = PatchStore(given.store).train
    slow = given.latency_ms / 1000
    slowly = f"S3, {given.latency_ms:g} ms a request"
    lines = [
        f"{len(train)} crops in {train.patch.grid.num_shards} shards, a step of {given.step_ms:g}"
        " ms; the first epoch, and the four after it",
        "",
        "| store | crops/s, first | later | waiting, first | later | requests |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder, SlowProxy(_server()) as proxy:
        for name, store, latency_s, cache, limit in (
            ("folder", given.store, 0.0, "none", 0.0),
            ("S3, no cache", given.url, 0.0, "none", 0.0),
            (f"{slowly}, no cache", given.url, slow, "none", 0.0),
            (f"{slowly}, cache empty at first", given.url, slow, "cache", 50.0),
            (f"{slowly}, cache of an earlier run", given.url, slow, "cache", 50.0),
        ):
            place = f"{folder}/{cache}"
            row = run_case(store, given.step_ms / 1000, proxy, latency_s, place, limit)
            lines.append(f"| {name} | {row}")
            print(lines[-1], file=sys.stderr, flush=True)
    text = "\n".join(lines)
    print(text)
    if given.write:
        with RESULTS.open("a") as file:
            file.write(f"\n## Stores at a URL\n\n{text}\n")


def _server() -> str:
    return os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")


if __name__ == "__main__":
    main()
