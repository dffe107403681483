"""`semgen prepare` killed in every stage, or out of disk, and run again: the same bytes?

    python -m tests.campaigns.kills --kills 100
    python -m tests.campaigns.kills --kills 0 --disk-full 10     # needs the right to mount

For each store, stages are drawn, and one job after another is sent SIGKILL, to the command or one
of its workers, at a random moment of a stage, until one completes the store. A job's log tells
which stage it is in, and counts a kill for the one that it hit. The jobs are forked from a process
that has imported everything, so "start" is Dask's start alone.
"""

import argparse
import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import numpy as np
import psutil

from pipeline.archive.lookup import catalogue_folder
from pipeline.phantom.files import write_archive
from tests.support.command import run_semgen, running_semgen, start_server
from tests.support.settings import SETTINGS
from tests.support.stores import contents

START = "start"
_BEGINS = re.compile(r"\d of \d+: ([^:]+): begins,")
_POLL_SECONDS = 0.005
_STAGES, _WORKERS = 0.5, 0.3
"""Shares: of stages in which a job is killed, and of kills that hit a worker if there is one."""


class Campaign:
    """An archive, settings, and the store that an uninterrupted job makes of them."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.log, self.errors = folder, folder / "log", folder / "errors"
        self.errors.touch()
        self.rng = np.random.default_rng(seed)
        write_archive(folder / "archive", patients=6, format="mixed", seed=seed, matrix=64)
        settings = SETTINGS.replace('near_duplicates = "off"', "")
        (folder / "settings.toml").write_text(settings)
        start_server()
        self.seconds: dict[str, list[float]] = {}
        """How long each stage took in each job, until the next one began."""
        assert self.run(folder / "whole", None)[0] == 0, self.errors.read_text()
        self.whole = contents(folder / "whole")

    def command(self, store: Path) -> list[object]:
        settings = self.folder / "settings.toml"
        return [
            *("--log-file", self.log, "prepare", self.folder / "archive", store),
            *("--config", settings, "--workers", 2),
        ]

    def stage(self) -> str:
        """The stage that the running job has begun last."""
        begun = _BEGINS.findall(self.log.read_text()) if self.log.exists() else []
        return begun[-1] if begun else START

    def run(self, store: Path, target: str | None) -> tuple[int | None, tuple[str, str] | None]:
        """Run a job, and kill it at a random moment of the stage `target`, if it comes to that.

        Returns its exit status, and the stage that was hit and what was killed.
        """
        self.log.unlink(missing_ok=True)
        others = set(psutil.Process().children(recursive=True))
        hit = None
        with running_semgen(*self.command(store), errors=self.errors) as job:
            stage, began, due = "", time.perf_counter(), np.inf
            while job.is_alive():
                now, current = time.perf_counter(), self.stage()
                if current != stage:
                    if stage:
                        self.seconds.setdefault(stage, []).append(now - began)
                    stage, began = current, now
                    if stage == target:
                        due = now + self.rng.uniform(0, np.median(self.seconds[target]))
                if now >= due:
                    what, due = self.kill(job, others), np.inf
                    hit = self.stage(), what
                time.sleep(_POLL_SECONDS)
            if hit is None:
                self.seconds.setdefault(stage, []).append(time.perf_counter() - began)
        return job.exitcode, hit

    def kill(self, job: ForkServerProcess, others: set[psutil.Process]) -> str:
        """Kill a job, or one of its workers: processes that there were not before it."""
        found = set(psutil.Process().children(recursive=True)) - others
        workers = sorted((one for one in found if one.pid != job.pid), key=lambda one: one.pid)
        if workers and self.rng.random() < _WORKERS:
            with contextlib.suppress(psutil.NoSuchProcess):
                workers[self.rng.integers(len(workers))].kill()
                return "worker"
        job.kill()
        job.join()
        return "command"

    def kills(self, count: int) -> tuple[Counter[tuple[str, str, int | None]], Counter[str]]:
        """Counts by stage, what was killed and exit status; and by what was wrong."""
        ends: Counter[tuple[str, str, int | None]] = Counter()
        wrong = Counter({"stores that differ": 0, "jobs that fail": 0})
        num_stores = 0
        while ends.total() < count:
            # another name each time: workers of a killed job may still write to the last one
            store = self.folder / f"store{num_stores}"
            num_stores += 1
            targets = [stage for stage in self.seconds if self.rng.random() < _STAGES]
            for target in (*targets, None):
                code, hit = self.run(store, target)
                if hit is not None and (hit[1] == "worker" or code == -signal.SIGKILL):
                    ends[*hit, code] += 1
                if code == 0:
                    break
                # without its first worker, a job may end before it begins
                if code != -signal.SIGKILL and hit != (START, "worker"):
                    wrong["jobs that fail"] += 1
                    print(f"status {code} after {hit}: {self.errors.read_text()}", flush=True)
            if code != 0 or contents(store) != self.whole:
                wrong["stores that differ"] += 1
                print(f"differs after {targets}: {self.errors.read_text()}", flush=True)
            print(f"{ends.total()} kills; wrong: {dict(wrong)}", flush=True)
            for path in (store, catalogue_folder(store)):
                shutil.rmtree(path, ignore_errors=True)
        return ends, wrong

    def disk_full(self, count: int) -> tuple[Counter[str], Counter[str]]:
        """Last error lines of runs on too small disks; counts by what was wrong."""
        needed = sum(file.stat().st_size for file in self.folder.glob("whole*/**/*"))
        words: Counter[str] = Counter()
        wrong = Counter({"stores that differ after space was freed": 0, "jobs that crash": 0})
        for share in np.linspace(0.02, 2.0, count):
            disk = self.folder / "disk"
            disk.mkdir()
            size = max(4096 * 4, int(share * needed))
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={size}", "semgen", disk], check=True
            )
            try:
                done = run_semgen(*self.command(disk / "store"))
                errors = done.stderr.splitlines()
                words[f"{done.returncode}: {errors[-1] if errors else ''}"] += 1
                if "Traceback" in done.stderr:
                    wrong["jobs that crash"] += 1
                    print(done.stderr)
                more = f"remount,size={needed * 4}"
                subprocess.run(["mount", "-o", more, disk], check=True)
                done = run_semgen(*self.command(disk / "store"))
                if done.returncode or contents(disk / "store") != self.whole:
                    wrong["stores that differ after space was freed"] += 1
                    print(done.stderr)
            finally:
                subprocess.run(["umount", disk], check=True)
                disk.rmdir()
        return words, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--disk-full", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        campaign = Campaign(Path(scratch), chosen.seed)
        whole = ", ".join(f"{name} {took[0]:.2f} s" for name, took in campaign.seconds.items())
        print(f"uninterrupted: {whole}", flush=True)
        counts: Counter[str] = Counter()
        wrong: Counter[str] = Counter()
        if chosen.kills:
            ends, found = campaign.kills(chosen.kills)
            wrong.update(found)
            for (stage, what, code), number in sorted(ends.items(), key=str):
                print(f"{number:6d} {stage}: {what} killed, exit status {code}")
            counts["kills"] = ends.total()
            for stage in campaign.seconds:
                counts[f"in {stage}"] = sum(n for (at, *_), n in ends.items() if at == stage)
        if chosen.disk_full:
            said, found = campaign.disk_full(chosen.disk_full)
            wrong.update(found)
            for line, number in said.items():
                print(f"{number:6d} {line}")
            counts["full disks"] = said.total()
    print(json.dumps({**wrong, **counts}))
    sys.exit(int(wrong.total() > 0))


if __name__ == "__main__":
    main()
