"""Images are written whole or not at all, also where SimpleITK does not notice."""

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from store.errors import SemgenError, check_suffix
from store.images.write import write_image


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha"])
@pytest.mark.parametrize("kept", [0.0, 0.4, 0.99])
def test_a_disk_that_becomes_full_is_an_error_and_the_old_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, kept: float
) -> None:
    values = np.random.default_rng(0).integers(-1000, 1000, (9, 8, 7), np.int16)
    image, file = sitk.GetImageFromArray(values), tmp_path / f"a{suffix}"
    write_image(image, file)
    before = file.read_bytes()
    write = sitk.WriteImage

    def write_on_full_disk(image: sitk.Image, path: str, **options: object) -> None:
        write(image, path, **options)
        content = Path(path).read_bytes()
        Path(path).write_bytes(content[: int(kept * len(content))])

    monkeypatch.setattr(sitk, "WriteImage", write_on_full_disk)
    with pytest.raises(SemgenError, match=f"a{suffix}: cannot be written; free disk space"):
        write_image(image + 1, file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_of_another_kind_is_not_overwritten() -> None:
    check_suffix("a/page.HTML", ".html", ".htm")
    with pytest.raises(SemgenError, match=r"best\.pt: give a file that ends in \.html or \.htm"):
        check_suffix("run/best.pt", ".html", ".htm")
