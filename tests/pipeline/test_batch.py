"""Batch systems: settings, the scripts of jobs, and jobs that are submitted, lost and replaced."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
from distributed import Client

from pipeline import batch
from pipeline.batch import ClusterConfig, Jobs, load_cluster_config
from pipeline.cluster import connect
from pipeline.errors import ClusterError
from pipeline.tasks import run_bounded
from tests.support.command import ENVIRONMENT, ROOT, assert_refused, run

PAGE = (ROOT / "docs/clusters.md").read_text("utf-8")
EXAMPLES = re.findall(r"```toml\n(.*?)```", PAGE, re.S)

# Settings ----------------------------------------------------------------------------------------


def write(folder: Path, text: str) -> Path:
    file = folder / "cluster.toml"
    file.write_text(text)
    return file


@pytest.mark.parametrize("text", EXAMPLES)
def test_an_example_of_the_docs_is_accepted(text: str, tmp_path: Path) -> None:
    assert load_cluster_config(write(tmp_path, text)).max_jobs >= 1


def test_every_setting_is_in_the_docs() -> None:
    (table,) = re.findall(r"\| setting \|.*?\n\n", PAGE, re.S)
    first_cells = " ".join(line.split("|")[1] for line in table.strip().splitlines()[2:])
    named = set(re.findall("`(.*?)`", first_cells))
    assert named == set(ClusterConfig.__dataclass_fields__)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('kind = "slurm"', "the setting max_jobs is missing"),
        ('kind = "slrum"\nmax_jobs = 1', "kind must be one of slurm, pbs, lsf, sge"),
        ('kind = "slurm"\nmax_jobs = 0', "max_jobs must be >= 1"),
        ('kind = "slurm"\nmax_jobs = 1\nmin_jobs = 2', "min_jobs must be 0 to max_jobs (1)"),
        ('kind = "slurm"\nmax_jobs = 1\npartition_ = "a"', "unknown setting partition_"),
        ('kind = "slurm"\nmax_jobs = 1\nque = "a"', "did you mean queue?"),
        ("kind =", "cannot be read as TOML"),
    ],
)
def test_wrong_settings_are_refused(text: str, words: str, phantoms: Path, tmp_path: Path) -> None:
    file = write(tmp_path, text)
    done = run("prepare", phantoms, tmp_path / "s", "--cluster", file)
    assert_refused(done, words, status=2)
    assert not (tmp_path / "s").exists()


# Job scripts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "lines"),
    [
        ("slurm", ["#SBATCH -p day", "#SBATCH -A lab", "#SBATCH --mem=6G", "#SBATCH -t 01:30:00"]),
        ("pbs", ["#PBS -q day", "#PBS -A lab", "#PBS -l select=1:ncpus=2:mem=6144MB"]),
        ("lsf", ["#BSUB -q day", '#BSUB -P "lab"', "#BSUB -n 2", "#BSUB -W 01:30"]),
        ("sge", ["#$ -q day", "#$ -P lab", "#$ -l h_rt=01:30:00"]),
    ],
)
def test_a_job_starts_workers_of_one_thread_that_end_before_it(
    kind: str, lines: list[str], tmp_path: Path
) -> None:
    values = {"workers_per_job": 2, "memory_gib": 3, "walltime_minutes": 90, "max_jobs": 1}
    words = {"queue": "day", "account": "lab", "prologue": ["module load a"], "python": "my python"}
    words |= {"interface": "lo"}
    config = batch.build(ClusterConfig, {"kind": kind, "tls": False, **values, **words})
    with Jobs(config, tmp_path).cluster as cluster:
        script = cluster.job_script()
    *header, command = script.strip().splitlines()
    assert [line for line in lines if not any(line in one for one in header)] == []
    assert "module load a" in header
    assert command.startswith("my python -m distributed.cli.dask_worker")
    assert "--nthreads 1 " in command
    assert "--nworkers 2 " in command
    # 90 minutes, less a margin of 270 s and twice the stagger
    assert "--lifetime 4590s --lifetime-stagger 540s" in command


# Jobs --------------------------------------------------------------------------------------------


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, **commands: str) -> None:
    """Put shell scripts in place of the commands of SLURM."""
    for name, script in commands.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


CONFIG = ClusterConfig(kind="slurm", max_jobs=1, interface="lo")


SBATCH = """
script=$(cat "$1")
[ -e {folder}/submitted ] || script=$(echo "$script" | sed 's/^.* -m distributed/no-such-program /')
echo >> {folder}/submitted
setsid sh -c 'export SLURM_JOB_ID=$$; exec bash -c "$0"' "$script" > /dev/null 2>&1 &
echo Submitted batch job $!
"""


def test_a_job_that_fails_at_its_start_or_is_lost_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = SBATCH.format(folder=tmp_path)
    install(tmp_path, monkeypatch, sbatch=submit, scancel='kill -- "-$1"')
    monkeypatch.setenv("PYTHONPATH", ENVIRONMENT["PYTHONPATH"])
    monkeypatch.setattr(batch, "_LOST_SECONDS", 3.0)
    with connect(None, None, cluster=CONFIG, folder=tmp_path) as client:
        assert list(run_bounded(client, abs, [-1])) == [(-1, 1)]
        (job,) = client.cluster.workers.values()
        os.killpg(int(job.job_id), signal.SIGKILL)
        assert list(run_bounded(client, abs, [-2])) == [(-2, 2)]
    assert len((tmp_path / "submitted").read_text()) >= 3


def test_a_job_lost_between_two_looks_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "submitted").write_text("")  # all jobs start
    submit = SBATCH.format(folder=tmp_path)
    install(tmp_path, monkeypatch, sbatch=submit, scancel='kill -- "-$1"')
    monkeypatch.setenv("PYTHONPATH", ENVIRONMENT["PYTHONPATH"])
    monkeypatch.setattr(batch, "_LOST_SECONDS", 0.1)
    jobs = Jobs(CONFIG, tmp_path)
    with jobs.cluster as cluster, Client(cluster, set_as_default=False) as client:
        cluster.sync(jobs.adapt, 1)
        (lost,) = [job.job_id for job in cluster.workers.values()]
        client.wait_for_workers(1)
        os.killpg(int(lost), signal.SIGKILL)
        while client.nthreads():
            time.sleep(0.1)
        cluster.sync(jobs.adapt, 1)  # the first look since the job was submitted
        time.sleep(0.2)
        cluster.sync(jobs.adapt, 1)
        (replacing,) = [job.job_id for job in cluster.workers.values()]
    jobs.delete_keys()
    assert replacing != lost


def test_a_path_that_job_scripts_cannot_have_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "my store.catalogue"
    with (
        pytest.raises(ClusterError, match="paths in job scripts cannot have spaces"),
        connect(None, None, cluster=CONFIG, folder=folder),
    ):
        pass


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo 'sbatch: error: invalid partition' >&2; exit 1", "sbatch: error: invalid partition"),
        (None, "no such command; run this where jobs can be submitted"),
    ],
)
def test_a_job_that_cannot_be_submitted_is_reported(
    script: str | None, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if script is not None:
        install(tmp_path, monkeypatch, sbatch=script)
    else:
        monkeypatch.setenv("PATH", "/nowhere")
    with (
        pytest.raises(ClusterError, match=words),
        connect(None, None, cluster=CONFIG, folder=tmp_path),
    ):
        pass
