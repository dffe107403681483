"""`semgen prepare` killed at random moments, or out of disk, and run again: the same bytes?

    python -m tests.campaigns.kills --kills 100
    python -m tests.campaigns.kills --kills 0 --disk-full 10     # needs the right to mount

Each time, SIGKILL is sent to the command or one of its workers while it prepares a new store.
"""

import argparse
import contextlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil

from pipeline.phantom.files import write_archive
from tests.support.settings import SETTINGS
from tests.support.stores import contents


class Campaign:
    """An archive, settings, and the store that an uninterrupted run makes of them."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.rng = np.random.default_rng(seed)
        write_archive(folder / "archive", patients=6, format="mixed", seed=seed, matrix=64)
        (folder / "settings.toml").write_text(SETTINGS)
        begun = time.perf_counter()
        assert self.start(folder / "whole").wait() == 0
        self.seconds = time.perf_counter() - begun
        self.whole = contents(folder / "whole")

    def start(self, store: Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "cli", "prepare", str(self.folder / "archive")),
                *(str(store), "--config", str(self.folder / "settings.toml"), "--workers", "2"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def kill(self, store: Path) -> tuple[str, int] | None:
        """Run, and kill the command or a worker at a random moment.

        Returns what was killed and the exit status, or None when the job had ended before.
        """
        job = self.start(store)
        moment = self.rng.uniform(0, self.seconds)
        with contextlib.suppress(subprocess.TimeoutExpired, psutil.NoSuchProcess):
            job.wait(moment)
            return None
        workers = []
        with contextlib.suppress(psutil.NoSuchProcess):
            workers = [
                child
                for child in psutil.Process(job.pid).children(recursive=True)
                if "spawn_main" in " ".join(child.cmdline())
            ]
        if workers and self.rng.random() < 0.5:
            with contextlib.suppress(psutil.NoSuchProcess):
                workers[self.rng.integers(len(workers))].kill()
                return "worker", job.wait()
        job.kill()
        return "command", job.wait()

    def kills(self, count: int) -> tuple[Counter[tuple[str, int]], int]:
        """Counts by what was killed and exit status; and how many stores differ after a rerun."""
        ends: Counter[tuple[str, int]] = Counter()
        different = 0
        store = self.folder / "store"
        while ends.total() < count:
            end = self.kill(store)
            if end is not None:
                ends[end] += 1
                job = self.start(store)
                _, errors = job.communicate()
                if job.returncode or contents(store) != self.whole:
                    different += 1
                    print(errors)
            shutil.rmtree(store, ignore_errors=True)
            shutil.rmtree(store.with_name("store.catalogue"), ignore_errors=True)
        return ends, different

    def disk_full(self, count: int) -> tuple[Counter[str], int]:
        """Last error lines of runs on too small disks; and how many stores differ at the end."""
        needed = sum(file.stat().st_size for file in self.folder.glob("whole*/**/*"))
        words: Counter[str] = Counter()
        different = 0
        for share in np.linspace(0.02, 2.0, count):
            disk = self.folder / "disk"
            disk.mkdir()
            size = max(4096 * 4, int(share * needed))
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={size}", "semgen", disk], check=True
            )
            try:
                job = self.start(disk / "store")
                _, errors = job.communicate()
                words[f"{job.returncode}: {errors.splitlines()[-1] if errors else ''}"] += 1
                if "Traceback" in errors:
                    print(errors)
                more = f"remount,size={needed * 4}"
                subprocess.run(["mount", "-o", more, disk], check=True)
                job = self.start(disk / "store")
                _, errors = job.communicate()
                if job.returncode or contents(disk / "store") != self.whole:
                    different += 1
                    print(errors)
            finally:
                subprocess.run(["umount", disk], check=True)
                disk.rmdir()
        return words, different


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--disk-full", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        campaign = Campaign(Path(scratch), chosen.seed)
        print(f"uninterrupted: {campaign.seconds:.1f} s", flush=True)
        failed = 0
        if chosen.kills:
            how, failed = campaign.kills(chosen.kills)
            for (what, code), number in sorted(how.items()):
                print(f"{number:6d} kills of a {what}, exit status of the command {code}")
            print(f"{failed} stores differ from the uninterrupted one after a rerun")
        if chosen.disk_full:
            said, differing = campaign.disk_full(chosen.disk_full)
            for line, number in said.items():
                print(f"{number:6d} {line}")
            print(f"{differing} stores differ after space was freed")
            failed += differing
    sys.exit(int(failed > 0))
