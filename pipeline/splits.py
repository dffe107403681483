"""Which scans belong to one patient, and which patients are for validation."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import PrepareConfig
from pipeline.seeds import VALIDATION
from store.errors import SemgenError

_REPAIR = "correct the manifest, delete the store, and prepare again"


def split_patients(
    *,
    scan: NDArray[np.integer[Any]],
    patient: NDArray[Any],
    wanted_split: NDArray[np.integer[Any]],
    config: PrepareConfig,
) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Number the patients and draw those whose scans are for validation.

    scan, patient, wanted_split
        (M,) each: the row of a scan, a key of the patient it belongs to, and the split that the
        manifest wants (0 or 1, else -1). Each of N scans has at least one entry. Keys with a scan
        in common are one patient, also through scans of further keys.

    Returns (N,) patient numbers and splits (0 train, 1 validation). Patients are numbered by
    their first scan, so that the numbers do not depend on any header. At least one patient is left
    for training.

    Raises SemgenError when a patient is wanted in both splits, or all patients in validation.
    """
    # workers import this module, and do not need these 12 MiB
    from scipy.sparse import coo_array  # noqa: PLC0415
    from scipy.sparse.csgraph import connected_components  # noqa: PLC0415

    num_scans = int(scan.max()) + 1
    keys, key = np.unique(patient, return_inverse=True)
    size = num_scans + len(keys)
    linked = coo_array((np.ones(len(scan), bool), (scan, num_scans + key)), shape=(size, size))
    _, group = connected_components(linked, directed=False)
    first: dict[int, int] = {}
    number = np.array(
        [first.setdefault(g, len(first)) for g in group[:num_scans].tolist()], np.int32
    )
    in_train, in_validation = (
        np.isin(np.arange(len(first)), number[scan[wanted_split == split]]) for split in (0, 1)
    )
    if (in_train & in_validation).any():
        raise SemgenError(
            f"the manifest assigns scans of {(in_train & in_validation).sum()} patient(s) to both"
            " splits."
            " Scans belong to one patient if they share a PatientID or manifest patient, or if two"
            " patients have an identical scan (semgen inspect STORE --paths lists duplicates);"
            f" {_REPAIR}"
        )
    if in_validation.all():
        raise SemgenError(f"the manifest leaves no patient for training; {_REPAIR}")
    wanted = round(config.validation_fraction * len(first))
    if config.validation_fraction > 0:
        wanted = max(1, wanted)
    num_given = int(in_validation.sum())
    wanted = max(0, min(wanted - num_given, len(first) - num_given - 1))
    order = np.random.default_rng([config.seed, VALIDATION]).permutation(len(first))
    free = ~(in_train | in_validation)
    chosen = np.concatenate([order[free[order]][:wanted], np.flatnonzero(in_validation)])
    return number, np.isin(number, chosen).astype(np.uint8)
