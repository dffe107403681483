"""Files that are unpacked without the reading library hold what the library reads."""

import gzip
import itertools
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from store.images.nifti import read_plain_nifti
from store.images.orientation import direction_of, find_turn

SIZE = (7, 6, 5)


def write(path: Path, dtype: str = "int16", seed: int = 0) -> sitk.Image:
    values = np.random.default_rng(seed).integers(0, 1000, SIZE[::-1]).astype(dtype)
    image = sitk.GetImageFromArray(values)
    sitk.WriteImage(image, str(path))
    return image


def patched(path: Path, at: int, content: bytes) -> Path:
    """The file with some header bytes replaced."""
    data = bytearray(path.read_bytes())
    data[at : at + len(content)] = content
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype", ["int16", "uint16", "int32", "float32", "float64"])
def test_voxels_are_those_that_the_library_reads(tmp_path: Path, dtype: str, suffix: str) -> None:
    image = write(tmp_path / f"scan{suffix}", dtype)
    values = read_plain_nifti(tmp_path / f"scan{suffix}", SIZE)
    assert values is not None
    np.testing.assert_array_equal(values, sitk.GetArrayFromImage(image))
    assert values.dtype == dtype
    assert values.flags.writeable  # padding is replaced in place


@pytest.mark.parametrize(
    ("at", "content"),
    [
        pytest.param(112, np.float32(2).tobytes(), id="slope"),
        pytest.param(112, np.float32("nan").tobytes(), id="slope not a number"),
        pytest.param(116, np.float32(-1024).tobytes(), id="intercept"),
        pytest.param(70, np.int16(2).tobytes(), id="8 bits"),
        pytest.param(70, np.int16(128).tobytes(), id="RGB"),
        pytest.param(344, b"ni1\0", id="voxels in another file"),
        pytest.param(0, (348).to_bytes(4, "big"), id="big-endian"),
        pytest.param(108, np.float32(3).tobytes(), id="voxels within the header"),
        pytest.param(108, np.float32("inf").tobytes(), id="voxels nowhere"),
        pytest.param(108, np.float32(60000).tobytes(), id="voxels past the end"),
    ],
)
def test_a_file_that_is_not_plain_is_left_to_the_library(
    tmp_path: Path, at: int, content: bytes
) -> None:
    path = tmp_path / "scan.nii"
    write(path)
    assert read_plain_nifti(path, SIZE) is not None
    patched(path, at, content)
    assert read_plain_nifti(path, SIZE) is None
    packed = tmp_path / "scan.nii.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read_plain_nifti(packed, SIZE) is None


def test_a_file_shorter_than_its_header_says_is_left_to_the_library(tmp_path: Path) -> None:
    path = tmp_path / "scan.nii"
    write(path)
    path.write_bytes(path.read_bytes()[:-1])
    assert read_plain_nifti(path, SIZE) is None


@pytest.mark.parametrize("broken", ["cut", "flipped", "two members", "more after it"])
def test_gzip_that_is_not_one_sound_member_is_left_to_the_library(
    tmp_path: Path, broken: str
) -> None:
    path = tmp_path / "scan.nii.gz"
    write(tmp_path / "scan.nii")
    content = (tmp_path / "scan.nii").read_bytes()
    packed = gzip.compress(content)
    flipped = bytearray(packed)
    flipped[len(packed) // 2] ^= 4
    path.write_bytes(
        {
            "cut": packed[:-20],
            "flipped": bytes(flipped),
            "two members": gzip.compress(content[:400]) + gzip.compress(content[400:]),
            "more after it": packed + b"\0" * 16,
        }[broken]
    )
    assert read_plain_nifti(path, SIZE) is None


def test_nothing_is_unpacked_beyond_what_the_header_may_ask_for(tmp_path: Path) -> None:
    path = tmp_path / "bomb.nii.gz"
    path.write_bytes(gzip.compress(b"\0" * 10_000_000))  # tells its length
    assert read_plain_nifti(path, SIZE) is None
    lying = path.read_bytes()[:-4] + (2000).to_bytes(4, "little")
    path.write_bytes(lying)
    assert read_plain_nifti(path, SIZE) is None


ORIENTATIONS = [
    "".join(letters[axis][sign] for axis, sign in zip(order, signs, strict=True))
    for letters in (("LR", "PA", "SI"),)
    for order in itertools.permutations(range(3))
    for signs in itertools.product((0, 1), repeat=3)
]


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_turning_a_view_equals_turning_the_image(orientation: str) -> None:
    image = sitk.GetImageFromArray(np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6))
    image.SetSpacing((0.5, 0.75, 2.0))
    image = sitk.DICOMOrient(image, orientation)
    wanted = sitk.DICOMOrient(image, "LPS")
    turn = find_turn(direction_of(image))
    turned = turn.view(sitk.GetArrayFromImage(image))
    np.testing.assert_array_equal(turned, sitk.GetArrayFromImage(wanted))
    assert turn.sort(image.GetSpacing()) == wanted.GetSpacing()[::-1]
