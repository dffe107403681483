"""Does pretraining help? From scans to a comparison on real data, small enough for a CPU.

    python -m benchmarks.transfer --ct CT --work DIR [--width 8] [--pretrain-epochs 16]
        [--steps 100] [--trials 10] [--seeds 5] [--devices cpu,cpu] [--nets genesis resenc-s]
        [--pretexts restoration classification joint mae mae-joint] [--tasks sarcoma-ct]
        [--known FILE.jsonl]
    python -m benchmarks.transfer --work DIR --known FILE.jsonl --table    # without training

Prepares a store from CT/archive, CT/archive-2mm and CT/small, which have no patient of the tasks;
pretrains each net with restoration, with self-classification, and with both; and compares them with
random weights on four tasks: soft-tissue sarcomas of CT/sts in CT and in MR, cross-validated by
patient, and AdrenalMNIST3D at 28^3 (resized to 32^3) and at 64^3 with its official split.

Each start is pretrained with --seeds seeds, and each pretraining serves trials / seeds trials; the
number of a trial is the seed of its fine-tuning. DIR/SEED has the runs, and a plan for each task,
TASK.toml, which `semgen compare` reads, too. DIR/results has the results of all trials, TASK.jsonl,
and for each task the tables of `compare` and gains.md, the comparisons that `benchmarks.proof`
plans, which figure.png shows. Run again to resume. A seed and task whose trials are all in --known,
results of earlier campaigns, are not run again.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from click.testing import CliRunner

from benchmarks.proof_tables import (
    GAIN_HEADER,
    Line,
    draw_gains,
    gain_cells,
    markdown_table,
    planned_gains,
)
from cli import main as semgen
from store.atomic import replace_file
from trainer import TrainConfig, pretrain
from trainer.comparison import read_results, write_tables
from trainer.finetuning.datasets import MANIFEST, convert
from trainer.nets.registry import KINDS

PRETEXTS = {
    "restoration": {"pretext": "restoration", "classify": False},
    "classification": {"pretext": "none"},
    "joint": {"pretext": "restoration"},
    "mae": {"pretext": "mae", "classify": False},
    "mae-joint": {"pretext": "mae"},
}
ADDS_TO = {"joint": "restoration", "mae-joint": "mae"}
"""Starts that add self-classification to another one."""
ARCHIVES = ("archive", "archive-2mm", "small")
STORE = """classes = 44
validation_fraction = 0.2
window_hu = [{window[0]}, {window[1]}]
"""
WINDOW_HU = (-150, 250)  # soft tissue; for pretraining and fine-tuning
PLAN = """# Does pretraining help? One task; each start with the same settings.
trials = {trials}
label_fractions = {fractions}

[defaults]
seed = {seed}
width = {width}
batch_size = 8
steps = {steps}
validate_every = 4
patience = 1000

[tasks.{task}]
"""
TASKS = {
    "sarcoma-ct": """path = "../sarcoma-ct.csv"
folds = 3
window_hu = [{window[0]}, {window[1]}]
learning_rate = 4e-3
spacing_mm = [4.0, 3.0, 3.0]
shape = [16, 48, 48]
""",
    "sarcoma-mr": """path = "../sarcoma-mr.csv"
folds = 3
validation_fraction = 0.0
learning_rate = 4e-3
intensity = "per-image"
spacing_mm = [4.0, 3.0, 3.0]
shape = [16, 48, 48]
""",
    "adrenal-28": """path = "../adrenal-28/task.csv"
shape = [32, 32, 32]
""",
    "adrenal-64": """path = "../adrenal-64/task.csv"
shape = [64, 64, 64]
""",
}
TITLES = {
    "adrenal-28": "adrenals, AUC",
    "adrenal-64": "adrenals at 64^3, AUC",
    "sarcoma-ct": "sarcomas in CT, Dice",
    "sarcoma-mr": "sarcomas in MR, Dice",
}
FRACTIONS = {"adrenal-28": [0.1, 0.25, 1.0], "adrenal-64": [0.1, 0.25, 1.0]}
"""Shares of the training patients, where not all."""
ADRENALS = {"adrenal-28": "adrenalmnist3d.npz", "adrenal-64": "adrenalmnist3d_64.npz"}


def run_semgen(*arguments: object) -> str:
    """Run a command as a user types it; raises RuntimeError when it fails."""
    done = CliRunner().invoke(semgen, [str(argument) for argument in arguments])
    if done.exit_code:
        raise RuntimeError(done.stderr) from done.exception
    return done.stdout


def write_sarcomas(ct: Path, kind: str, file: Path) -> None:
    """Write the manifest of the images of one kind, one for each patient."""
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", "mask", "patient"])
        for image in sorted((ct / "sts").resolve().glob(f"*_{kind}_image.nii.gz")):
            mask = image.with_name(image.name.replace("_image", "_mask"))
            writer.writerow([image, mask, image.name[:7]])


def average_folds(results: Sequence[dict[str, Any]], net: str) -> list[Line]:
    """The mean score of each trial of a task and net: start, labels (share), trial, score."""
    scores: dict[tuple[str, float, int], list[float]] = defaultdict(list)
    for found in results:
        if found["start"].startswith(f"{net}-") and found["score"] is not None:
            start = found["start"].removeprefix(f"{net}-")
            scores[start, found["label_fraction"], found["trial"]].append(found["score"])
    return [
        {"start": start, "labels": share, "trial": trial, "score": float(np.mean(values))}
        for (start, share, trial), values in scores.items()
    ]


def tabulate_gains(lines: Sequence[Line], per_seed: int) -> str:
    """The planned comparisons of a task, trial by trial, for each share of labels and their mean.

    Trials of one pretraining are not independent, so the last rows compare one value of each
    pretraining: the mean of its `per_seed` trials. Holm's correction is for the comparisons with
    the same words in the first column.
    """
    means: dict[tuple[str, float, int], list[float]] = defaultdict(list)  # of the trials
    for line in lines:
        means[line["start"], line["labels"], line["trial"] // per_seed].append(line["score"])
    pretrainings = [
        {"start": start, "labels": share, "trial": seed, "score": float(np.mean(values))}
        for (start, share, seed), values in means.items()
        if len(values) == per_seed
    ]
    shares = sorted({line["labels"] for line in lines})
    groups = [(f"{labels:.0%}", lines, labels) for labels in shares]
    groups += [("mean", lines, None)] if shares[1:] else []
    groups += [("mean, pretrainings", pretrainings, None)]
    body = [
        [title, *gain_cells(gain, holm)]
        for title, chosen, labels in groups
        for gain, holm in planned_gains(chosen, labels)
    ]
    return markdown_table(["labels", *GAIN_HEADER], body)


def pretrain_starts(
    store: Path, folder: Path, seed: int, arguments: argparse.Namespace
) -> dict[str, dict[str, str]]:
    """Pretrain all starts with a seed; returns their settings in a plan in `folder`."""
    starts = {}
    for net in arguments.nets:
        starts[f"{net}-scratch"] = {"net": net}
        for name in arguments.pretexts:
            config = TrainConfig(
                net=net,
                width=arguments.width,
                batch_size=16,
                epochs=arguments.pretrain_epochs,
                warmup_epochs=arguments.pretrain_epochs // 2,  # of those with classes
                seed=seed,
                **PRETEXTS[name],
            )
            start = f"{net}-{name}"
            done = pretrain(store, folder / start, config)
            print(f"seed {seed}, {start}: {done.best} in {done.seconds:.0f} s", flush=True)
            starts[start] = {"init": start}
            if ADDS_TO.get(name) in arguments.pretexts:
                starts[start]["adds_to"] = f"{net}-{ADDS_TO[name]}"
    return starts


def write_plan(
    task: str, starts: dict[str, dict[str, str]], numbers: range, arguments: argparse.Namespace
) -> str:
    """The plan of some trials of a task, as TOML."""
    plan = (PLAN + TASKS[task]).format(
        task=task,
        seed=numbers.start,
        width=arguments.width,
        steps=arguments.steps,
        trials=len(numbers),
        fractions=FRACTIONS.get(task, [1.0]),
        window=WINDOW_HU,
    )
    for start, values in starts.items():
        plan += f"\n[starts.{start}]\n"
        plan += "".join(f'{name} = "{value}"\n' for name, value in values.items())
    return plan


class Results:
    """The results of all trials of each task, in a folder."""

    def __init__(self, folder: Path, known: Path | None, per_seed: int) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.per_seed = folder, per_seed
        lines = known.read_text().splitlines() if known else []
        self.known: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def read(self, task: str) -> list[dict[str, Any]]:
        file = self.folder / f"{task}.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        own = [json.loads(line) for line in lines]
        numbers = {found["trial"] for found in own}
        return own + [
            found for found in self.known if found["task"] == task and found["trial"] not in numbers
        ]

    def has(self, task: str, numbers: range) -> bool:
        return set(numbers) <= {found["trial"] for found in self.read(task)}

    def add(self, task: str, numbers: range, found: Sequence[dict[str, Any]]) -> None:
        """Add results whose trials are counted from 0."""
        added = [{**result, "trial": numbers[result["trial"]], "curve": []} for result in found]
        lines = [json.dumps(result) for result in [*self.read(task), *added]]
        with replace_file(self.folder / f"{task}.jsonl") as partial:
            partial.write_text("\n".join(lines) + "\n")

    def tabulate(self, task: str, nets: Sequence[str]) -> str:
        """Write and return the tables of a task."""
        found = self.read(task)
        out = self.folder / task
        out.mkdir(exist_ok=True)
        tables, _ = write_tables(found, out)
        gains = "\n".join(tabulate_gains(average_folds(found, net), self.per_seed) for net in nets)
        (out / "gains.md").write_text(gains)
        return f"{tables.read_text()}\n{gains}"

    def draw(self, net: str) -> None:
        """Draw the planned gains of each task: their mean, and those with the least labels."""
        panels = {}
        for task, title in TITLES.items():
            lines = average_folds(self.read(task), net)
            shares = sorted({line["labels"] for line in lines})
            if shares[1:]:
                panels[f"{title}, {100 * shares[0]:.0f} % of labels"] = planned_gains(
                    lines, shares[0]
                )
            if gains := planned_gains(lines):
                panels[title] = gains
        if panels:
            draw_gains(panels, self.folder / "figure.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ct", type=Path, help="needed without --table")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--pretrain-epochs", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--known", type=Path)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--devices", default="auto")
    parser.add_argument("--nets", nargs="+", choices=KINDS, default=["genesis"])
    parser.add_argument("--pretexts", nargs="*", choices=list(PRETEXTS), default=list(PRETEXTS)[:3])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    arguments = parser.parse_args()
    if arguments.trials % arguments.seeds:
        parser.error("--trials must be a multiple of --seeds")
    if not (arguments.ct or arguments.table):
        parser.error("--ct or --table is needed")
    arguments.work.mkdir(parents=True, exist_ok=True)
    per_seed = arguments.trials // arguments.seeds
    results = Results(arguments.work / "results", arguments.known, per_seed)
    if not arguments.table:
        began = time.perf_counter()
        run_all(results, arguments)
        where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        print(f"width {arguments.width}, {where}, {(time.perf_counter() - began) / 60:.0f} min")
    for task in arguments.tasks:
        if results.read(task):
            print(results.tabulate(task, arguments.nets))
    results.draw(arguments.nets[0])


def run_all(results: Results, arguments: argparse.Namespace) -> None:
    """Prepare the store and the tasks; run the trials that are not done yet."""
    work: Path = arguments.work
    store, settings = work / "archive.store", work / "archive.toml"
    settings.write_text(STORE.format(window=WINDOW_HU))
    archives = [arguments.ct / name for name in ARCHIVES]
    print(run_semgen("prepare", *archives, store, "--config", settings), flush=True)
    write_sarcomas(arguments.ct, "CT", work / "sarcoma-ct.csv")
    write_sarcomas(arguments.ct, "MR_T1", work / "sarcoma-mr.csv")
    for task, source in ADRENALS.items():
        if task in arguments.tasks and not (work / task / MANIFEST).exists():
            convert("medmnist", arguments.ct / "downstream" / source, work / task)
    for seed in range(arguments.seeds):
        numbers = range(seed * results.per_seed, (seed + 1) * results.per_seed)
        tasks = [task for task in arguments.tasks if not results.has(task, numbers)]
        starts = pretrain_starts(store, work / str(seed), seed, arguments) if tasks else {}
        for task in tasks:
            file = work / str(seed) / f"{task}.toml"
            file.write_text(write_plan(task, starts, numbers, arguments))
            out = file.with_suffix("")
            run_semgen("compare", file, out, "--devices", arguments.devices)
            results.add(task, numbers, read_results(out))
            print(f"seed {seed}, {task}: done", flush=True)


if __name__ == "__main__":
    main()
