"""Matching by workers: the same results as here, and an interrupted job keeps them."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from distributed import Client

from pipeline.config import PrepareConfig
from pipeline.match import describe_scan, match_place
from pipeline.place import Scans
from pipeline.stages import placing
from pipeline.stages.placing import Draft, Placing
from store import PatchStore
from store.progress import SILENT


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with Client(
        processes=False, n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0",
        set_as_default=False,
    ) as client:  # fmt: skip
        yield client


@pytest.fixture(scope="module")
def scans(patches: PatchStore) -> Scans:
    return Scans(
        split=patches.scans.split,
        spacing_mm=patches.scans.spacing_mm,
        size=patches.scans.size,
        frame_mm=patches.scans.frame_mm,
        embedding=patches.scans.embedding,
        thumbnail=lambda row: patches.thumbnails.read([row])[0],
    )


def middle(scans: Scans, row: int, shift_mm: float = 0) -> Draft:
    """A draft near the middle of a scan."""
    centre = np.full(3, 0.5)
    place_mm = scans.frame_mm[row].mean(axis=0) + np.array([0, shift_mm, 0])
    return Draft(row, centre, place_mm, 1.0)


def placer(client: Client, patches: PatchStore, scans: Scans, folder: Path) -> Placing:
    return Placing(client, patches.path, scans, PrepareConfig(), folder, SILENT, lambda _: None)


def test_workers_find_what_is_found_here(
    client: Client, patches: PatchStore, scans: Scans, tmp_path: Path
) -> None:
    drafts = [middle(scans, 0), middle(scans, 1), middle(scans, 2)]
    wanted = [np.array([2, 1]), np.array([], np.intp), np.array([0])]
    found = placer(client, patches, scans, tmp_path / "placing").match(drafts, wanted)

    def features(row: int):  # type: ignore[no-untyped-def]
        spacing_mm, size = scans.spacing_mm[row], scans.size[row]
        edges_mm = np.stack([-0.5 * spacing_mm, (size - 0.5) * spacing_mm])
        return describe_scan(
            scans.thumbnail(row),
            box_mm=scans.frame_mm[row],
            edges_mm=edges_mm,
            window_hu=(-1000.0, 1000.0),
        )

    assert [len(one.score) for one in found] == [2, 0, 1]
    for draft, rows, one in zip(drafts, wanted, found, strict=True):
        here = features(draft.reference)
        for number, row in enumerate(rows.tolist()):
            match = match_place(draft.place_mm, here, features(row))
            if match is None:
                assert np.isnan(one.score[number])
                continue
            assert one.score[number] == pytest.approx(match.score, abs=1e-3)
            np.testing.assert_allclose(one.place_mm[number], match.place_mm, atol=0.1)


def test_what_was_matched_before_is_not_matched_again(
    client: Client,
    patches: PatchStore,
    scans: Scans,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    request = [middle(scans, 0)], [np.array([1, 2])]
    (first,) = placer(client, patches, scans, tmp_path).match(*request)

    def refuse(*_: object) -> None:
        raise AssertionError("matched again")

    monkeypatch.setattr(placing, "run_bounded", refuse)
    (again,) = placer(client, patches, scans, tmp_path).match(*request)
    np.testing.assert_array_equal(first.place_mm, again.place_mm)
    with pytest.raises(AssertionError, match="matched again"):  # another place
        placer(client, patches, scans, tmp_path).match([middle(scans, 0, 5)], request[1])
    (tmp_path / "000000.npz").write_bytes(b"damaged")
    with pytest.raises(AssertionError, match="matched again"):
        placer(client, patches, scans, tmp_path).match(*request)
