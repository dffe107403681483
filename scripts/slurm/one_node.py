"""`semgen prepare --cluster` on a real SLURM of one node, with a job cancelled midway.

    apt-get install slurmctld slurmd slurm-client munge
    pip install "semgen[cluster]"
    python scripts/slurm/one_node.py /tmp/one-node

Starts munged, slurmctld and slurmd in the given folder, as root and without systemd; everything
listens on the loopback interface or on a socket. Prepares a few phantoms three times: with a local
worker, on SLURM, and on SLURM while jobs are cancelled. Exit status 1 unless the stores are equal,
byte for byte. What was seen: docs/design/0017-clusters.md.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.phantom.files import write_archive

SLURM_CONF = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
MpiDefault=none
KillWait=5
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} RealMemory=8000
PartitionName=short Nodes=ALL Default=YES MaxTime=01:00:00
"""
CLUSTER = """
kind = "slurm"
queue = "short"
max_jobs = 2
memory_gib = 2.0
walltime_minutes = 30
interface = "lo"
"""
SETTINGS = """
classes = 4
neighbours = 3
max_member_share = 1.0
validation_neighbours = 2
validation_fraction = 0.34
shape = [16, 32, 32]
spacing_mm = [3.0, 2.0, 2.0]
rows_per_shard = 2

[autoencoder]
width = 4
latent = 32
max_steps = 4
threads = 1
"""

STAGES = {"survey": ".catalogue/survey/**/*.chunk", "cut": "/train/patch/c/*/*/*/*"}
"""All jobs are cancelled when the first file of a stage is there."""


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[None]:
    """A SLURM of this machine alone, whose files lie in `folder`."""
    for name in ("state", "spool"):
        (folder / name).mkdir()
    host, cores = socket.gethostname(), len(os.sched_getaffinity(0))
    conf, key = folder / "slurm.conf", folder / "munge.key"
    conf.write_text(SLURM_CONF.format(host=host, folder=folder, cores=cores))
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    os.environ["SLURM_CONF"] = str(conf)
    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log"}
    files |= {"seed-file": "seed"}
    munged = [f"--{option}={folder}/munge.{suffix}" for option, suffix in files.items()]
    daemons = [
        ["munged", "--foreground", "--force", *munged],
        ["slurmctld", "-D", "-f", str(conf)],
        ["slurmd", "-D", "-f", str(conf)],
    ]
    with contextlib.ExitStack() as stack:
        for command in daemons:
            process = stack.enter_context(
                subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            )
            stack.callback(process.terminate)
            time.sleep(1)
        wait_for(lambda: "idle" in ask("sinfo", "-h", "-o", "%T"))
        yield


def ask(*command: str) -> str:
    """What a command prints."""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def wait_for(holds: Callable[[], bool]) -> None:
    """Return when the condition holds."""
    while not holds():
        time.sleep(0.05)


class Preparation:
    """One `semgen prepare` that runs beside this process."""

    def __init__(self, folder: Path, name: str, *options: str) -> None:
        self.store, self.began = folder / name, time.perf_counter()
        self.log = folder / f"{name}.log"
        command = [sys.executable, "-m", "cli", "prepare", str(folder / "archive")]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, str(self.store), "--config", str(folder / "settings.toml"), *options],
                stdout=log,
                stderr=log,
            )

    def has_file(self, pattern: str) -> bool:
        """Whether a file beside or in the store exists; an error when the command has ended."""
        assert self.process.poll() is None, self.log.read_text()
        return next(self.store.parent.glob(f"{self.store.name}{pattern}"), None) is not None

    def finish(self) -> dict[str, str]:
        """SHA-256 of each file of the store."""
        assert self.process.wait() == 0, self.log.read_text()
        print(f"{self.store.name}: {time.perf_counter() - self.began:.0f} s", flush=True)
        return {
            file.relative_to(self.store).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in self.store.rglob("*")
            if file.is_file()
        }


def main(folder: Path) -> int:
    """Prepare three times and compare; the number of files that differ."""
    folder.mkdir()
    (folder / "settings.toml").write_text(SETTINGS)
    (folder / "cluster.toml").write_text(CLUSTER)
    write_archive(folder / "archive", patients=6, format="mixed", seed=3, matrix=64)
    local = Preparation(folder, "local", "--workers", "1").finish()
    on_slurm = "--cluster", str(folder / "cluster.toml")
    with slurm(folder):
        undisturbed = Preparation(folder, "undisturbed", *on_slurm).finish()
        disturbed = Preparation(folder, "disturbed", *on_slurm)
        for stage, pattern in STAGES.items():
            wait_for(lambda pattern=pattern: disturbed.has_file(pattern))
            jobs = ask("squeue", "-h", "-t", "R", "-o", "%i").split()
            ask("scancel", *jobs)
            print(f"{stage}: cancelled {len(jobs)} running jobs", flush=True)
        again = disturbed.finish()
        left = ask("squeue", "-h")
    print(disturbed.log.read_text())
    different = [name for name in local | again if local.get(name) != again.get(name)]
    different += [name for name in local if local[name] != undisturbed.get(name)]
    print(f"{len(local)} files, {len(different)} differ; jobs left: {left or 'none'}")
    return len(different)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="A new folder.")
    sys.exit(int(main(parser.parse_args().folder.resolve()) > 0))
