"""Assign the cases of a task to training, validation and test, by patient."""

from __future__ import annotations

import dataclasses

import numpy as np

from trainer.data.plan import draw_patients
from trainer.errors import TrainError
from trainer.finetuning.config import FinetuneConfig
from trainer.finetuning.task import Split, Task
from trainer.seeds import derive_seeds


def assign_splits(task: Task, config: FinetuneConfig) -> Task:
    """The task with a split for every case, and with the wanted share of training patients.

    Patients that have a split in the task keep it; `split_seed` decides for the others.

    Raises TrainError where too few patients are left.
    """
    open_patients = sorted({case.patient for case in task.cases if case.split is None})
    order = np.random.default_rng(derive_seeds(config.split_seed, "split")).permutation(
        len(open_patients)
    )
    shuffled = [open_patients[i] for i in order]
    given = {case.split for case in task.cases}
    test: set[str] = set()
    if config.folds is not None:
        if config.folds > len(shuffled):
            raise TrainError(
                f"{task.name}: {config.folds} folds need at least {config.folds} patients without"
                f" a split, but the task has only {len(shuffled)}; give fewer folds"
            )
        test = set(shuffled[config.fold :: config.folds])
    elif "test" not in given:
        test = set(shuffled[: _share(config.test_fraction, len(shuffled))])
    rest = [patient for patient in shuffled if patient not in test]
    validation: set[str] = set()
    if "validation" not in given:
        validation = set(rest[: _share(config.validation_fraction, len(rest))])
    drawn: dict[str, Split] = {
        patient: "test" if patient in test else "validation" if patient in validation else "train"
        for patient in open_patients
    }
    cases = [
        dataclasses.replace(case, split=case.split or drawn[case.patient]) for case in task.cases
    ]
    patients = sorted({case.patient for case in cases if case.split == "train"})
    if not patients:
        raise TrainError(
            f"{task.name}: no patient is left for training; give smaller shares for validation and"
            " testing"
        )
    numbers = draw_patients(np.arange(len(patients)), config.label_fraction, config.split_seed)
    kept = {patients[number] for number in numbers.tolist()}
    cases = [case for case in cases if case.split != "train" or case.patient in kept]
    return dataclasses.replace(task, cases=tuple(cases))


def _share(fraction: float, total: int) -> int:
    """A share of the patients: at least one if the share is not 0, and never all of them."""
    return min(max(1, round(fraction * total)), total - 1) if fraction and total > 1 else 0
