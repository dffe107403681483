"""Crops of a store against its archive."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from click.testing import CliRunner
from threadpoolctl import threadpool_info, threadpool_limits

from cli import main
from pipeline.archive.lookup import catalogue_folder, read_sources
from pipeline.audit import audit
from pipeline.crops import one_blas_thread
from store import PatchStore
from store.format import StoreError
from store.verification import Problem
from store.writer import write_shard
from tests.support.progress import CountedProgress
from tests.support.stores import copy_with_catalogue


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    """The prepared store and its catalogue, to be changed."""
    return copy_with_catalogue(prepared, tmp_path / "copy.store")


def test_a_store_is_what_its_archive_gives(prepared: Path, patches: PatchStore) -> None:
    progress = CountedProgress()
    assert list(audit(prepared, sample=10**6, progress=progress)) == []
    num_crops = len(patches.train) + len(patches.validation)
    assert progress.totals["re-cut"] == progress.units["re-cut"] == num_crops


def test_a_sample_compares_only_as_many_crops_as_asked_for(prepared: Path) -> None:
    progress = CountedProgress()
    assert list(audit(prepared, sample=3, progress=progress)) == []
    assert progress.totals["re-cut"] == progress.units["re-cut"] == 3


def test_a_crop_with_other_voxels_is_found(copy: Path, patches: PatchStore) -> None:
    rows = patches.train.patch.grid.rows_of(1)
    crops = np.array(patches.train.read(rows))
    crops[2, 0, 0, 0] += 1
    write_shard(copy, "train/patch", 1, crops)
    assert list(audit(copy, sample=10**6)) == [
        Problem("train/patch", "differs from the archive", (rows[2],))
    ]


def test_a_crop_that_was_planned_elsewhere_is_found(copy: Path) -> None:
    origin = zarr.open_array(str(copy / "validation/origin_mm"), mode="r+")
    origin[0] = np.add(origin[0], [0, 3.0, 0])
    (problem,) = audit(copy, sample=10**6)
    assert (problem.where, problem.rows) == ("validation/patch", (0,))


def test_a_missing_source_is_reported_by_its_scan(copy: Path) -> None:
    sources = read_sources(copy)
    gone = next(row for row, file in sources.items() if file.endswith(".nii.gz"))
    file = Path(sources[gone])
    file.rename(file.with_suffix(".away"))
    try:
        done = CliRunner().invoke(
            main, ["verify", str(copy), "--against-archive", "--sample", "9999", "--json"]
        )
    finally:
        file.with_suffix(".away").rename(file)
    assert done.exit_code == 1
    assert json.loads(done.stdout) == [
        {
            "where": "scans",
            "what": "source is missing or changed since the survey",
            "rows": [gone],
        }
    ]


def test_there_is_no_audit_without_the_private_catalogue(copy: Path) -> None:
    shutil.rmtree(catalogue_folder(copy))
    with pytest.raises(StoreError, match="only this file records"):
        list(audit(copy, sample=1))


def test_crops_are_cut_with_one_blas_thread_and_the_number_is_restored() -> None:
    """Several threads add in another order, which changes the last bit of some voxels."""

    def num_threads() -> set[int]:
        return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

    with threadpool_limits(2, user_api="blas"):
        with one_blas_thread():
            assert num_threads() == {1}
        assert num_threads() == {2}
