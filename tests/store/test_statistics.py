"""Mean and standard deviation of each scan's HU, and stores of earlier versions without them."""

from pathlib import Path

import numpy as np
import pytest
import zarr

from pipeline.archive.lookup import read_series
from pipeline.archive.volume import read_volume
from pipeline.config import PrepareConfig
from store import PatchStore
from store.format import STATISTICS
from store.group import compute_fingerprint
from store.inspect import describe_store, format_store
from store.scans import mean_and_std
from store.verification import verify
from tests.support.crops import change_attribute
from tests.support.stores import copy_with_catalogue


def test_they_are_those_of_all_voxels(patches: PatchStore, config: PrepareConfig) -> None:
    rows = range(len(patches.scans.id))
    for row, series in zip(rows, read_series(patches.path, rows), strict=True):
        hu = read_volume(series, config).hu.astype(np.float64)
        assert patches.scans.mean_hu[row] == pytest.approx(hu.mean(), rel=1e-12)
        assert patches.scans.std_hu[row] == pytest.approx(hu.std(), rel=1e-12)


def test_they_do_not_depend_on_how_a_scan_is_stored() -> None:
    hu = np.random.default_rng(0).integers(-32768, 32767, (20, 30, 40)).astype(np.int16)
    found = {
        mean_and_std(turned)
        for turned in (hu, hu[::-1, :, ::-1], hu.transpose(2, 0, 1), hu.T[:, ::-1], hu.copy("F"))
    }
    assert len(found) == 1
    assert found.pop() == pytest.approx((hu.mean(), hu.std()), rel=1e-12)


def test_fractions_have_them_too() -> None:
    values = np.random.default_rng(0).normal(3, 2, (4, 5, 6)).astype(np.float32)
    assert mean_and_std(values) == pytest.approx((values.mean(), values.std()), rel=1e-5)


@pytest.fixture
def old(patches: PatchStore, tmp_path: Path) -> PatchStore:
    """The prepared store as an earlier version made it."""
    path = copy_with_catalogue(patches.path, tmp_path / "old.store")
    group = zarr.open_group(str(path), mode="r+")
    for name in STATISTICS:
        del group[name]
    survey = {**patches.stages["survey"], "version": 2}
    change_attribute(path, "stages", {**patches.stages, "survey": survey})
    change_attribute(path, "fingerprint", compute_fingerprint(path))
    return PatchStore(path)


def test_a_store_without_them_is_valid_and_says_so(old: PatchStore, patches: PatchStore) -> None:
    assert list(verify(old.path)) == []
    assert not old.has_statistics
    assert patches.has_statistics
    with pytest.raises(AttributeError, match="mean_hu"):
        _ = old.scans.mean_hu
    assert old.members(0).rows.tolist() == patches.members(0).rows.tolist()
    said = "without mean and deviation of each scan"
    for store in (old, patches):
        facts = describe_store(store)
        assert facts["statistics"] == store.has_statistics
        assert (said in format_store("s", facts)) == (store is old)


def test_verify_names_scans_whose_deviation_is_impossible(
    patches: PatchStore, tmp_path: Path
) -> None:
    path = copy_with_catalogue(patches.path, tmp_path / "bad.store")
    zarr.open_array(str(path / "scans/std_hu"), mode="r+")[1] = 0
    (first, *_) = verify(path)
    assert (first.where, first.rows) == ("scans/std_hu", (1,))
