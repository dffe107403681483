"""Does pretraining help, and do the discovered classes add to it? Measured on phantoms.

    export OMP_NUM_THREADS=1
    python -m benchmarks.proof WORK --size cpu --workers 2 --known benchmarks/proof_cpu.jsonl
    python -m benchmarks.proof WORK --table

Pretrains a small net on unlabeled phantoms in several ways, fine-tunes each on few labeled
phantoms, and compares them with random weights and with controls whose classes are wrong. Trial n
has the seed n in pretraining and in fine-tuning, and its own draw of labeled phantoms, which all
starts share. All trials in WORK have the same stores and test phantoms. docs/design/0019-proof.md
has hypotheses, sizes and planned comparisons. Run again to resume, or with more --trials. Trials
that are complete in the results of an earlier campaign, --known, are not run again; its stores may
have other crops, because machines round differently.

WORK gets the archive, two stores (classes placed by matching and by the frame), two tasks, runs/,
compared/, and results/: results.jsonl (a line for each trial), tables.md, and figure.png. --table
makes these three again from the trials that are done.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from benchmarks.proof_data import make_archive, make_disease, make_organs
from benchmarks.proof_tables import (
    STARTS,
    TASKS,
    gather_results,
    read_complete,
    split_start,
    write_results,
)
from pipeline import PrepareConfig, prepare
from pipeline.config import AutoencoderConfig
from store import PatchStore
from trainer import TrainConfig, pretrain
from trainer.comparison import compare
from trainer.comparison.trials import end_with_parent
from trainer.config import NetName, PretextName

_WINDOW_HU = (-200, 300)
_PRETEXTS: Final[dict[str, tuple[PretextName, bool]]] = {
    "restoration": ("restoration", False), "mae": ("mae", False),
    "classification": ("none", True), "joint": ("restoration", True), "mae-joint": ("mae", True),
}  # fmt: skip
"""Pretext task, and whether classes are learned. A control's name goes on with a dash."""
_SHUFFLE = 1904
"""Role of the generator that shuffles labels."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """What is fixed in one WORK; every field is an option, too."""

    archive: int = 300
    """Unlabeled phantoms."""
    matrix: int = 64
    """Voxels of a phantom along y and x."""
    classes: int = 20
    neighbours: int = 90
    """Members of a class among the training scans."""
    autoencoder_steps: int = 150
    side: int = 16
    """Voxels of a crop along each axis."""
    spacing_mm: float = 8.0
    net: NetName = "genesis"
    width: int = 4
    pretrain_steps: int = 500
    pretrain_batch: int = 16
    train: int = 64
    """Labeled phantoms from which a trial draws; for disease, pairs of crops."""
    organs_test: int = 30
    """Test phantoms."""
    disease_test: int = 60
    """Pairs of test crops."""
    organs_labels: tuple[int, ...] = (5, 10, 20, 50)
    """Numbers of labeled phantoms."""
    disease_labels: tuple[int, ...] = (20, 50, 100)
    """Numbers of labeled crops."""
    organs_steps: int = 300
    disease_steps: int = 200
    batch: int = 8
    organs_rate: float = 1e-2
    """Learning rate of fine-tuning."""
    disease_rate: float = 3e-3

    def labels(self, task: str) -> tuple[int, ...]:
        return self.organs_labels if task == "organs" else self.disease_labels

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.side, self.side, self.side)

    @property
    def spacings_mm(self) -> tuple[float, float, float]:
        return (self.spacing_mm, self.spacing_mm, self.spacing_mm)

    @property
    def pools(self) -> dict[str, int]:
        """Labeled cases of each task from which a trial draws."""
        return {"organs": self.train, "disease": 2 * self.train}


SIZES: Final = {
    "small": Size(
        archive=40, matrix=48, classes=8, neighbours=12, autoencoder_steps=10, width=2,
        pretrain_steps=20, train=20, organs_test=10, disease_test=10, organs_labels=(5, 10),
        disease_labels=(20,), organs_steps=20, disease_steps=20,
    ),
    "cpu": Size(),
    "gpu": Size(
        archive=1000, matrix=128, classes=40, neighbours=300, autoencoder_steps=1500, side=32,
        spacing_mm=4.0, width=32, pretrain_steps=10_000, pretrain_batch=64, organs_steps=1000,
        disease_steps=500, batch=16, organs_rate=1e-3, disease_rate=1e-3,
    ),
}  # fmt: skip


# Data


def make_data(work: Path, size: Size, workers: int) -> None:
    """Archive, stores and tasks; what exists is kept."""
    parts = np.array_split(np.arange(size.archive), workers)
    jobs: list[tuple[Callable[..., None], tuple[Any, ...]]] = [
        (make_archive, (work / "archive", range(part[0], part[-1] + 1), size.matrix))
        for part in parts
        if len(part)
    ]
    jobs.append((make_organs, (work / "organs", size.train, size.organs_test, size.matrix)))
    jobs.append((make_disease, (work / "disease", size.train, size.disease_test, size.matrix)))
    _run_all(jobs, workers)
    for place in ("match", "frame"):
        config = PrepareConfig(
            classes=size.classes,
            neighbours=size.neighbours,
            validation_neighbours=10,
            place=place,
            shape=size.shape,
            spacing_mm=size.spacings_mm,
            window_hu=_WINDOW_HU,
            max_overlap=0.5,
            autoencoder=AutoencoderConfig(max_steps=size.autoencoder_steps),
        )
        same = work / "match" if place == "frame" else None  # the same neighbours
        prepare(work / "archive", work / place, config, workers=workers, autoencoder=same)


def open_store(work: Path, control: str, trial: int) -> PatchStore:
    """The store of a start; for control "shuffled", the labels of its crops are permuted.

    So classes keep their sizes and crops, and only what belongs together is lost.
    """
    store = PatchStore(work / ("frame" if control == "frame" else "match"))
    if control == "shuffled":
        for number, split in enumerate((store.train, store.validation)):
            rng = np.random.default_rng([_SHUFFLE, trial, number])
            split.label = rng.permutation(split.label)
        store.fingerprint = f"{store.fingerprint}, shuffled {trial}"  # runs record it
    return store


def checksum_crops(work: Path) -> int:
    """CRC-32 of the labels and places of the training crops of both stores."""
    total = 0
    for place in ("match", "frame"):
        rows = PatchStore(work / place).train
        total = zlib.crc32(rows.label.tobytes() + rows.origin_mm.tobytes(), total)
    return total


# A trial


def run_start(
    work: Path, size: Size, trial: int, start: str, tasks: Sequence[str], device: str
) -> None:
    """Pretrain one start of a trial, then fine-tune it on every task."""
    torch.set_num_threads(1 if device == "cpu" else torch.get_num_threads())
    run = work / "runs" / str(trial) / start
    if start != "scratch":
        _pretrain(work, size, trial, start, run, device)
    for task in tasks:
        plan = work / "plans" / f"{task}-{trial}-{start}.toml"
        plan.parent.mkdir(exist_ok=True)
        plan.write_text(_write_plan(size, trial, start, task, run))
        began = time.perf_counter()
        compare(plan, work / "compared" / task / str(trial) / start, devices=[device])
        print(f"trial {trial}, {start}, {task}: {time.perf_counter() - began:.0f} s", flush=True)


def _pretrain(work: Path, size: Size, trial: int, start: str, run: Path, device: str) -> None:
    kind, control = split_start(start)
    pretext, classify = _PRETEXTS[kind]
    store = open_store(work, control, trial)
    config = TrainConfig(
        pretext=pretext,
        classify=classify,
        warmup_epochs=0,  # so restoration has as many steps with classes as without
        net=size.net,
        width=size.width,
        batch_size=size.pretrain_batch,
        steps=size.pretrain_steps,
        **_train_to_the_end(),
        seed=trial,
        device=device,
        threads=1,
        shuffle_blocks=1000,  # crops have fewer voxels than the default is made for
    )
    done = pretrain(store, run, config)
    if not done.already_complete:
        print(f"trial {trial}, {start}: {done.last} in {done.seconds:.0f} s", flush=True)


def _train_to_the_end() -> dict[str, Any]:
    """Settings of a training whose last weights count: no early stop, no choice by validation."""
    never = 10**6
    return {
        "epochs": never, "patience": never, "validate_every": never, "checkpoint_every": never,
        "lr_schedule": "cosine",
    }  # fmt: skip


def _write_plan(size: Size, trial: int, start: str, task: str, run: Path) -> str:
    """A plan of `semgen compare`, as TOML, for one start in one trial of one task."""
    defaults = {
        **_train_to_the_end(),
        "seed": trial,
        "split_seed": trial,  # draws the labeled phantoms
        "validation_fraction": 0.0,
        "net": size.net,
        "width": size.width,
        "shape": size.shape,
        "spacing_mm": size.spacings_mm,
        "window_hu": _WINDOW_HU,
        "batch_size": size.batch,
        "steps": size.organs_steps if task == "organs" else size.disease_steps,
        "learning_rate": size.organs_rate if task == "organs" else size.disease_rate,
        "patches_per_case": 32,  # long epochs, because each ends with a checkpoint
        "loss": "dice" if task == "organs" else "cross-entropy",
        "overlap": 0.0,
        "threads": 1,
    }
    path = f"../{task}" if task == "organs" else f"../{task}/task.csv"
    tables: dict[str, dict[str, Any]] = {"defaults": defaults, f"tasks.{task}": {"path": path}}
    tables[f"starts.{start}"] = {} if start == "scratch" else {"init": str(run.resolve())}
    shares = [labels / size.pools[task] for labels in size.labels(task)]
    text = f"trials = 1\nlabel_fractions = {json.dumps(shares)}\n"
    for name, values in tables.items():
        lines = (f"{key} = {json.dumps(value)}\n" for key, value in values.items())
        text += f"\n[{name}]\n{''.join(lines)}"
    return text


def _run_all(jobs: Sequence[tuple[Callable[..., None], tuple[Any, ...]]], workers: int) -> None:
    if workers == 1:
        for job, values in jobs:
            job(*values)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, end_with_parent) as pool:
        for future in [pool.submit(job, *values) for job, values in jobs]:
            future.result()


# Command line


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--size", choices=list(SIZES), default="cpu")
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=STARTS)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--known", type=Path, help="results.jsonl of another campaign")
    parser.add_argument("--table", action="store_true")
    for field in dataclasses.fields(Size):
        default = field.default
        many = (
            {"nargs": "+", "type": int} if isinstance(default, tuple) else {"type": type(default)}
        )
        parser.add_argument(f"--{field.name.replace('_', '-')}", **many)
    given = parser.parse_args()
    work: Path = given.work
    if given.table:
        size = Size(**json.loads((work / "size.json").read_text()))
    else:
        own = {f.name: getattr(given, f.name) for f in dataclasses.fields(Size)}
        own = {k: tuple(v) if isinstance(v, list) else v for k, v in own.items() if v is not None}
        size = dataclasses.replace(SIZES[given.size], **own)
        _record(work, size)
    num_lines = len(given.starts) * sum(len(size.labels(task)) for task in given.tasks)
    settings = zlib.crc32(json.dumps(dataclasses.asdict(size)).encode())
    known = read_complete(given.known, num_lines) if given.known else []
    if any(line["settings"] != settings for line in known):
        raise SystemExit(f"{given.known}: has another size than {work}")
    done = {line["trial"] for line in known}
    if not given.table:
        began = time.perf_counter()
        make_data(work, size, given.workers)
        print(f"data: {(time.perf_counter() - began) / 60:.0f} min", flush=True)
        todo = [
            (run_start, (work, size, trial, start, given.tasks, given.device))
            for trial in range(given.trials)
            if trial not in done
            for start in given.starts
        ]
        _run_all(todo, given.workers)
        print(f"all: {(time.perf_counter() - began) / 60:.0f} min", flush=True)
    found = gather_results(work / "compared", size.pools)
    new = [line for line in found if line["trial"] not in done]
    crops = checksum_crops(work)
    new = [{**line, "crops": crops, "settings": settings} for line in new]
    print(write_results([*known, *new], work / "results"))


def _record(work: Path, size: Size) -> None:
    """Write the size to WORK; another one may not continue there."""
    work.mkdir(parents=True, exist_ok=True)
    file, text = work / "size.json", json.dumps(dataclasses.asdict(size), indent=1)
    if file.exists() and file.read_text() != text:
        raise SystemExit(f"{file}: has another size; give its options, or another WORK")
    file.write_text(text)


if __name__ == "__main__":
    main()
