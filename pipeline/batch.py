"""Batch systems (SLURM, PBS, LSF, SGE): settings, jobs that each start Dask workers, their number.

Imports dask-jobqueue on first use: `pip install "semgen[cluster]"`.
"""

from __future__ import annotations

import importlib
import math
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from distributed.core import Status
from distributed.diagnostics.plugin import SchedulerPlugin

from pipeline.errors import ClusterError
from store.errors import ConfigError
from store.settings import build, check_types, read_toml, require

if TYPE_CHECKING:
    from dask_jobqueue.core import JobQueueCluster
    from distributed import Scheduler

_UNSAFE = set(" \t\n\"'`$\\")
"""Characters of paths that dask-jobqueue does not quote in job scripts."""
_CLASSES = {"slurm": "SLURMCluster", "pbs": "PBSCluster", "lsf": "LSFCluster", "sge": "SGECluster"}
"""Names in dask-jobqueue."""
_JOB_IDS = {
    "slurm": "$SLURM_JOB_ID",
    "pbs": "${PBS_JOBID%%.*}",
    "lsf": "$LSB_JOBID",
    "sge": "$JOB_ID",
}
"""Shell variables of a job that have its number."""
WORKER_ENVIRONMENT: Final = {"MALLOC_TRIM_THRESHOLD_": 2**25, "MALLOC_MMAP_THRESHOLD_": 2**24}
"""With Dask's default, the memory of each crop goes back to the system and is requested again:
cutting took twice as long. The memory of whole scans still goes back at once."""
_MAX_STAGGER_S, _MAX_MARGIN_S = 600, 300
"""Spread of the ends of workers, and time between the last and the end of the job."""
_START_SECONDS = 300
"""How long a worker may take to start and to connect, on a busy file system for instance."""
_LOST_SECONDS = 30.0
"""A job none of whose workers is connected for longer is lost; one that crashed restarts sooner."""
_IDLE_SECONDS = 60.0
"""Jobs end when there was no work for longer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """Jobs of a batch system. Each starts worker processes of one thread."""

    kind: Literal["slurm", "pbs", "lsf", "sge"]
    """Batch system."""
    max_jobs: int
    """Maximum number of jobs that run at once."""
    min_jobs: int = 0
    """Jobs that are kept while no work waits for workers, as while the autoencoder is trained."""
    workers_per_job: int = 1
    """Worker processes of a job, of one CPU core each."""
    memory_gib: float = 4.0
    """Memory of one worker in GiB. A job requests as many times this as it has workers."""
    walltime_minutes: int = 60
    """Time limit of a job in minutes. Workers end before it, and new jobs take their place."""
    queue: str | None = None
    """Queue or partition."""
    account: str | None = None
    """Account or project that is charged."""
    directives: tuple[str, ...] = ()
    """Further lines of the job script's header, such as "--constraint=cpu"."""
    skip_directives: tuple[str, ...] = ()
    """Lines of the header that contain one of these texts are left out, such as "--mem="."""
    prologue: tuple[str, ...] = ()
    """Lines of shell that run before the workers start, such as "module load python"."""
    python: str | None = None
    """Command that runs the Python of the workers. Default: the Python of this process."""
    interface: str | None = None
    """Network interface that connects the nodes, such as "ib0"."""
    log_folder: str | None = None
    """Folder for the output of the jobs. Default: STORE.catalogue/jobs."""
    tls: bool = True
    """Whether the connections are encrypted and authenticated. Without, anyone who reaches the
    scheduler's port can run code as you."""

    def __post_init__(self) -> None:
        """Raise ConfigError naming the setting, the allowed and the given value."""
        check_types(self)
        for name in ("max_jobs", "workers_per_job"):
            require(getattr(self, name) >= 1, name, ">= 1", getattr(self, name))
        in_range = 0 <= self.min_jobs <= self.max_jobs
        require(in_range, "min_jobs", f"0 to max_jobs ({self.max_jobs})", self.min_jobs)
        require(self.memory_gib > 0, "memory_gib", "> 0", self.memory_gib)
        require(self.walltime_minutes >= 5, "walltime_minutes", ">= 5", self.walltime_minutes)


def load_cluster_config(file: str | Path) -> ClusterConfig:
    """Settings of a batch system from a TOML file.

    Raises ConfigError on an unknown key, naming the nearest known one, and on a missing one.
    """
    values = read_toml(file)
    for name in ("kind", "max_jobs"):
        if name not in values:
            raise ConfigError(f"{file}: the setting {name} is missing")
    return build(ClusterConfig, values)


class Jobs:
    """The jobs of one `prepare`: as many as there is work for; a lost job is replaced."""

    def __init__(self, config: ClusterConfig, folder: Path) -> None:
        """Start a Dask scheduler in this process; no job is submitted yet.

        folder
            A private folder that the nodes can read, for the keys of the connections and the
            jobs' output.
        """
        self.config = config
        self.log_folder = Path(config.log_folder or folder / "jobs")
        self.cluster = _start_scheduler(config, folder, self.log_folder)
        self._last_work = time.monotonic()
        self._last_seen: dict[str, float] = {}  # jobs whose workers joined, or that ended
        self._arrivals = _Arrivals()
        scheduler: Any = self.cluster.scheduler  # in this process
        scheduler.add_plugin(self._arrivals)

    async def adapt(self, num_waiting: int) -> None:
        """Submit, replace or end jobs; to be called every few seconds, on the cluster's loop.

        num_waiting
            Tasks that run or wait for a worker.

        Raises ClusterError when the batch system refuses a job.
        """
        cluster, config, now = self.cluster, self.config, time.monotonic()
        joined = {worker["name"] for worker in cluster.scheduler_info["workers"].values()}
        joined |= self._arrivals.take()
        for job in self._last_seen.keys() - cluster.worker_spec.keys():
            del self._last_seen[job]  # a new job may get the name of one that ended
        for job, spec in list(cluster.worker_spec.items()):
            if joined & {job + suffix for suffix in spec.get("group", [""])}:
                self._last_seen[job] = now
            elif self._has_ended(job):
                self._last_seen.setdefault(job, now)
            if now - self._last_seen.get(job, now) > _LOST_SECONDS:
                await self._forget(job)
        if num_waiting:
            self._last_work = now
        idle = now - self._last_work > _IDLE_SECONDS
        wanted = math.ceil(num_waiting / config.workers_per_job)
        wanted = max(wanted, 0 if idle else len(cluster.worker_spec))
        cluster.scale(jobs=min(max(wanted, config.min_jobs), config.max_jobs))
        try:
            await cluster
        except (RuntimeError, OSError) as error:
            for job in [name for name, one in cluster.workers.items() if one.job_id is None]:
                await self._forget(job)
            raise ClusterError(f"no job could be submitted: {_explain(error)}") from error

    def _has_ended(self, job: str) -> bool:
        """Whether its script ended, perhaps before a worker joined."""
        submitted = self.cluster.workers.get(job)
        return submitted is not None and (self.log_folder / f"{submitted.job_id}.ended").exists()

    async def _forget(self, job: str) -> None:
        self.cluster.worker_spec.pop(job, None)
        self._last_seen.pop(job, None)
        forgotten = self.cluster.workers.pop(job)
        await forgotten.close()
        forgotten.status = Status.closed  # closing the cluster requires it

    def delete_keys(self) -> None:
        """Delete the files of keys, which dask-jobqueue leaves to the garbage collector."""
        for name in ("_job_key", "_job_cert", "_job_ca_file"):
            if hasattr(self.cluster, name):
                getattr(self.cluster, name).close()


class _Arrivals(SchedulerPlugin):
    """Names of workers that joined, also of those that were lost before anyone looked."""

    def __init__(self) -> None:
        self._names: set[str] = set()

    def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        self._names.add(str(scheduler.workers[worker].name))

    def take(self) -> set[str]:
        """The names since the last call."""
        names, self._names = self._names, set()
        return names


def _start_scheduler(config: ClusterConfig, folder: Path, log_folder: Path) -> JobQueueCluster:
    try:
        jobqueue = importlib.import_module("dask_jobqueue")
    except ImportError as error:
        raise ClusterError(
            'batch systems need dask-jobqueue; install it with `pip install "semgen[cluster]"`'
        ) from error
    for path in (folder, log_folder.resolve()):
        if set(str(path)) & _UNSAFE:
            raise ClusterError(
                f"{path}: paths in job scripts cannot have spaces, quotes, $ or `; give another"
                " STORE"
            )
    minutes = config.walltime_minutes
    walltime = f"{minutes // 60:02d}:{minutes % 60:02d}"
    leave_mark = f'touch "{log_folder.resolve()}/{_JOB_IDS[config.kind]}.ended"'
    at_end = f"trap {shlex.quote(leave_mark)} EXIT"
    exports = [f"export {name}={value}" for name, value in WORKER_ENVIRONMENT.items()]
    charged = "account" if config.kind in ("slurm", "pbs") else "project"
    cluster: JobQueueCluster = getattr(jobqueue, _CLASSES[config.kind])(
        cores=config.workers_per_job,
        processes=config.workers_per_job,
        memory=f"{config.memory_gib * config.workers_per_job} GiB",
        walltime=walltime if config.kind == "lsf" else f"{walltime}:00",
        queue=config.queue,
        **{charged: config.account},
        job_extra_directives=list(config.directives),
        job_directives_skip=list(config.skip_directives),
        job_script_prologue=[at_end, *config.prologue, *exports],
        python=config.python,
        interface=config.interface,
        log_directory=str(log_folder),
        death_timeout=_START_SECONDS,
        worker_extra_args=_worker_arguments(60 * minutes),
        security=config.tls or None,
        shared_temp_directory=str(folder),
        scheduler_options={"dashboard_address": "127.0.0.1:0"},
        silence_logs="critical",
    )
    return cluster


def _worker_arguments(walltime_s: int) -> list[str]:
    """A worker hands back its tasks before its job ends, and not all workers at the same time."""
    stagger = min(_MAX_STAGGER_S, walltime_s // 10)  # the lifetime is drawn within +- stagger
    margin = min(_MAX_MARGIN_S, walltime_s // 20)
    lifetime = walltime_s - margin - stagger
    return [
        *("--lifetime", f"{lifetime}s", "--lifetime-stagger", f"{stagger}s"),
        *("--memory-limit", "0"),  # the batch system has one; at Dask's, workers pause for ever
        "--no-dashboard",
    ]


def _explain(error: Exception) -> str:
    """One line of what the batch system's command answered."""
    if isinstance(error, FileNotFoundError):
        return f"{error.filename}: no such command; run this where jobs can be submitted"
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
