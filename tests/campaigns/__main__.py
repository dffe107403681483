"""Run all campaigns, one after the other and unattended; run again to resume.

    python -m tests.campaigns OUT --scale 0.01        # minutes
    nohup nice -n 19 python -m tests.campaigns OUT &  # hours

Each campaign is divided into parts, each with a seed and a process of its own. A finished part adds
a line to OUT/campaigns.jsonl: command, counts, seconds, commit, software, whether all was right.
Its output is in OUT/NAME-PART.log. A part that takes longer than `--hours` is killed, and so is one
whose runner is stopped. Parts that were right are not run again. In the end, and with `--show`, the
results of this scale are printed as a table for RESULTS.md. The exit status is 1 unless all was
right. The campaign "disk" needs the right to mount.
"""

import argparse
import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from store.progress import format_duration
from tests.support.command import ROOT

_FILE = "campaigns.jsonl"
_SAMPLE_SECONDS = 5.0
_SOFTWARE = ("semgen", "numpy", "SimpleITK", "torch", "zarr", "distributed", "obstore")


@dataclass(frozen=True)
class Campaign:
    """One campaign at full size."""

    name: str
    command: str
    """Module and options; {0} is the size of a part, {1} and {2} a tenth and a hundredth of it,
    {seed} the number of the part."""
    size: int
    """Of all parts together."""
    parts: int = 1
    least: int = 1
    """Minimum size of a part."""
    inverse: bool = False
    """Whether a larger number in place of the size means less work."""

    def list_parts(self, scale: float) -> Iterator[tuple[str, list[str]]]:
        """The name and the words of each part; fewer parts, then smaller ones, at a small scale."""
        parts = max(1, round(self.parts * min(1.0, scale)))
        size = self.size / self.parts
        share = scale * self.parts / parts
        size = max(self.least, round(size / share if self.inverse else size * share))
        for seed in range(parts):
            words = self.command.format(size, size // 10, size // 100, seed=seed)
            yield f"{self.name}-{seed}", words.split()


CAMPAIGNS = (
    Campaign("kills", "tests.campaigns.kills --kills {} --seed {seed}", 700, 10),
    Campaign(
        "pretrain", "tests.campaigns.resume --trainer pretrain --kills {} --seed {seed}", 100, 2
    ),
    Campaign(
        "finetune", "tests.campaigns.resume --trainer finetune --kills {} --seed {seed}", 100, 2
    ),
    Campaign(
        "compare", "tests.campaigns.resume --trainer compare --kills {} --seed {seed}", 100, 2
    ),
    Campaign("disk", "tests.campaigns.kills --kills 0 --disk-full {} --seed {seed}", 40, least=4),
    Campaign("fuzz", "tests.campaigns.fuzz --files {} --seed {seed}", 10_000, 5, least=12),
    Campaign("nifti", "tests.campaigns.nifti --files {} --seed {seed}", 20_000, 2),
    Campaign(
        "corrupt", "tests.campaigns.corrupt --block {} --seed {seed}", 4 * 64, 4, inverse=True
    ),
    Campaign("damage", "tests.campaigns.corrupt --cases {} --seed {seed}", 3000, 2),
    Campaign("remote", "tests.campaigns.remote --rounds {} --seed {seed}", 100, 5),
    Campaign("scheduler", "benchmarks.scale --scans {} --workers 2 8 24", 5000, least=100),
    Campaign("million", "benchmarks.million --scans {}", 1_000_000, least=5000),
    Campaign("scale", "benchmarks.scale --scans {2} {1} {0}", 100_000, least=5000),
)


def run_part(out: Path, name: str, words: list[str], seconds: float) -> dict[str, Any]:
    """Run one part to its end, or kill it after so many seconds, and return its line."""
    began, cpu, log = time.monotonic(), 0.0, out / f"{name}.log"
    command = [sys.executable, "-u", "-m", *words]
    with (
        log.open("w") as file,
        tempfile.TemporaryDirectory(prefix="semgen-", ignore_cleanup_errors=True) as scratch,
        subprocess.Popen(
            command,
            env={"OMP_NUM_THREADS": "1", **os.environ, "TMPDIR": scratch},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as job,
    ):
        try:
            while job.poll() is None:
                if time.monotonic() - began > seconds:
                    break
                cpu = max(cpu, cpu_seconds(psutil.Process(job.pid)))
                with contextlib.suppress(subprocess.TimeoutExpired):
                    job.wait(_SAMPLE_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)  # and all that it has started
    printed = log.read_text(errors="replace").splitlines()
    counts = [one for one in printed if one.startswith("{") and one.endswith("}")]
    software = {one: importlib.metadata.version(one) for one in _SOFTWARE}
    return {
        "name": name,
        "command": " ".join(["python -m", *words]),
        "ok": job.returncode == 0,
        "status": job.returncode,
        "counts": json.loads(counts[-1]) if counts else {},
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(cpu, 1),
        "commit": subprocess.check_output(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True
        ).strip(),
        "software": {"python": platform.python_version(), **software},
    }


def run_parts(out: Path, parts: list[tuple[str, list[str]]], seconds: float) -> None:
    """Run those that were not right yet, and add their lines."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # kills the part that runs
    with (out / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # one runner at a time
        for name, words in parts:
            known = read_lines(out).get(" ".join(["python -m", *words]))
            if known and known["ok"]:
                continue
            print(f"{time.strftime('%F %T')} {name}: {' '.join(words)}", flush=True)
            line = run_part(out, name, words, seconds)
            with (out / _FILE).open("a") as file:
                file.write(f"{json.dumps(line)}\n")
            end = "right" if line["ok"] else f"WRONG, see {name}.log"
            print(f"  {end}, {format_duration(line['seconds'])}: {line['counts']}", flush=True)
    signal.signal(signal.SIGTERM, before)


def cpu_seconds(process: psutil.Process) -> float:
    """CPU time of a process and of those below it, also of those that ended."""
    total = 0.0
    with contextlib.suppress(psutil.NoSuchProcess):
        for one in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += sum(one.cpu_times()[:4])  # the last two are those of ended children
    return total


def read_lines(out: Path) -> dict[str, dict[str, Any]]:
    """The last line of each command that was run."""
    file = out / _FILE
    lines = file.read_text().splitlines() if file.exists() else ()
    return {
        line["command"]: line for line in (json.loads(one) for one in lines if one.endswith("}"))
    }


def make_table(lines: list[dict[str, Any]]) -> str:
    """A Markdown table of all campaigns, with the commands of their last parts."""
    rows = [
        "| campaign | parts | all right | counts | time | CPU time | commit | last command |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(line["name"].partition("-")[0] for line in lines):
        parts = [line for line in lines if line["name"].partition("-")[0] == name]
        counts: Counter[str] = Counter()
        for part in parts:
            counts.update(part["counts"])
        words = ", ".join(f"{what} {count}" for what, count in counts.items())
        wrong = sum(not part["ok"] for part in parts)
        times = [
            format_duration(sum(part[key] for part in parts)) for key in ("seconds", "cpu_seconds")
        ]
        right = f"no, {wrong} not" if wrong else "yes"
        commits = ", ".join(sorted({part["commit"] for part in parts}))
        cells = [name, len(parts), right, words, *times, commits, f"`{parts[-1]['command']}`"]
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--only", nargs="+", choices=[one.name for one in CAMPAIGNS])
    parser.add_argument("--hours", type=float, default=4.0, help="of a part, at most")
    parser.add_argument("--show", action="store_true", help="print the table and run nothing")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    parts = [
        part
        for campaign in CAMPAIGNS
        if chosen.only is None or campaign.name in chosen.only
        for part in campaign.list_parts(chosen.scale)
    ]
    if not chosen.show:
        run_parts(chosen.out, parts, 3600 * chosen.hours)
    found = read_lines(chosen.out)
    lines = [found.get(" ".join(["python -m", *words])) for _, words in parts]
    run = [line for line in lines if line is not None]
    print(f"\n{make_table(run)}")
    sys.exit(int(len(run) < len(lines) or not all(line["ok"] for line in run)))


if __name__ == "__main__":
    main()
