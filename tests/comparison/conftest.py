"""A small comparison for the tests of plans and of trials."""

from pathlib import Path

import pytest
import SimpleITK as sitk  # noqa: N813

from tests.support.comparison import PLAN
from tests.support.finetuning import draw_case, write_manifest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of six images, and a plan of two starts and two trials."""
    folder = tmp_path_factory.mktemp("comparison")
    rows: list[dict[str, object]] = []
    for number in range(6):
        for name, image in zip(("image", "mask"), draw_case(number), strict=True):
            sitk.WriteImage(image, str(folder / f"{number}_{name}.nii.gz"))
        rows.append({"image": f"{number}_image.nii.gz", "mask": f"{number}_mask.nii.gz"})
    write_manifest(folder / "balls.csv", rows)
    (folder / "plan.toml").write_text(PLAN)
    return folder
