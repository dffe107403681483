"""Which scans belong to one patient, and which patients are for validation."""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pipeline.config import PrepareConfig
from pipeline.seeds import VALIDATION
from store.errors import SemgenError

Pairs: TypeAlias = NDArray[np.integer[Any]]
NO_PAIRS: Final[Pairs] = np.empty((0, 2), np.intp)
_REPAIR = "correct the manifest, delete the store, and prepare again"


def number_patients(
    scan: NDArray[np.integer[Any]], patient: NDArray[Any], same: Pairs = NO_PAIRS
) -> NDArray[np.int32]:
    """(N,) numbers of the scans' patients, in the order of their first scans.

    scan, patient
        (M,) each: the row of a scan, and a key of the patient it belongs to. Each of N scans has at
        least one entry. Keys with a scan in common are one patient, also through scans of further
        keys.
    same
        (P, 2) rows of scans that belong to one patient whatever their keys.
    """
    # workers import this module, and do not need these 12 MiB
    from scipy.sparse import coo_array  # noqa: PLC0415
    from scipy.sparse.csgraph import connected_components  # noqa: PLC0415

    num_scans = int(scan.max()) + 1
    keys, key = np.unique(patient, return_inverse=True)
    size = num_scans + len(keys)
    ends = np.concatenate([scan, same[:, 0]]), np.concatenate([num_scans + key, same[:, 1]])
    linked = coo_array((np.ones(len(ends[0]), bool), ends), shape=(size, size))
    _, group = connected_components(linked, directed=False)
    first: dict[int, int] = {}
    return np.array([first.setdefault(g, len(first)) for g in group[:num_scans].tolist()], np.int32)


def split_patients(
    *,
    scan: NDArray[np.integer[Any]],
    patient: NDArray[Any],
    wanted_split: NDArray[np.integer[Any]],
    same: Pairs = NO_PAIRS,
    config: PrepareConfig,
) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Number the patients and draw those whose scans are for validation.

    scan, patient, same
        As for `number_patients`. Pairs are ignored where they would join scans that the manifest
        wants in different splits.
    wanted_split
        (M,) the split that the manifest wants for an entry: 0 or 1, else -1.

    Returns (N,) patient numbers and splits (0 train, 1 validation). Patients are numbered by
    their first scan, so that the numbers do not depend on any header. At least one patient is left
    for training.

    Raises SemgenError when a patient is wanted in both splits, or all patients in validation.
    """

    def wanted_in(number: NDArray[np.int32]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        patients = np.arange(number.max() + 1)
        train, validation = (
            np.isin(patients, number[scan[wanted_split == split]]) for split in (0, 1)
        )
        return train, validation

    number = number_patients(scan, patient)
    in_train, in_validation = wanted_in(number)
    if (in_train & in_validation).any():
        raise SemgenError(
            f"the manifest assigns scans of {(in_train & in_validation).sum()} patient(s) to both"
            " splits."
            " Scans belong to one patient if they share a PatientID or manifest patient, or if two"
            " patients have an identical scan (semgen inspect STORE --paths lists duplicates);"
            f" {_REPAIR}"
        )
    if len(same):
        number = number_patients(scan, patient, same)
        in_train, in_validation = wanted_in(number)
        torn = (in_train & in_validation)[number[same[:, 0]]]
        number = number_patients(scan, patient, same[~torn])
        in_train, in_validation = wanted_in(number)
    if in_validation.all():
        raise SemgenError(f"the manifest leaves no patient for training; {_REPAIR}")
    num_patients = len(in_train)
    wanted = round(config.validation_fraction * num_patients)
    if config.validation_fraction > 0:
        wanted = max(1, wanted)
    num_given = int(in_validation.sum())
    wanted = max(0, min(wanted - num_given, num_patients - num_given - 1))
    order = np.random.default_rng([config.seed, VALIDATION]).permutation(num_patients)
    free = ~(in_train | in_validation)
    chosen = np.concatenate([order[free[order]][:wanted], np.flatnonzero(in_validation)])
    return number, np.isin(number, chosen).astype(np.uint8)
