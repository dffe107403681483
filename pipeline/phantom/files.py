"""Write synthetic patients as files: NIfTI, DICOM series, a whole archive."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import SimpleITK
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, generate_uid

from pipeline.phantom.patients import STORAGE, Phantom, draw_phantom
from pipeline.phantom.solids import LABELS
from store.atomic import fill_folder, replace_file
from store.images.write import write_image
from store.progress import SILENT, Progress

DICOM_ATTRIBUTES: Final[dict[str, Any]] = {  # of DICOM files; those of type 2 may be empty
    **dict.fromkeys(("PatientBirthDate", "PatientSex", "StudyID", "AccessionNumber", "StudyDate",
                     "StudyTime", "ReferringPhysicianName", "PositionReferenceIndicator"), ""),
    "SOPClassUID": CTImageStorage, "Modality": "CT", "Manufacturer": "semgen", "KVP": 120,
    "ImageType": ["DERIVED", "PRIMARY", "AXIAL"], "PatientPosition": "HFS", "SeriesNumber": 1,
    "AcquisitionNumber": 1, "ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "SamplesPerPixel": 1,
    "PhotometricInterpretation": "MONOCHROME2", "BitsAllocated": 16, "BitsStored": 16,
    "HighBit": 15, "RescaleSlope": 1, "RescaleIntercept": -1024, "RescaleType": "HU",
}  # fmt: skip


TRUTH: Final = "landmarks.json"
_MASK_LABELS: Final = "labels.json"


def write_nifti(phantom: Phantom, path: str | Path) -> None:
    """Write the scan as one .nii or .nii.gz file, with axes in `phantom.orientation`."""
    _write_nifti(phantom, phantom.render(), path, phantom.orientation)


def write_masks(phantom: Phantom, path: str | Path, *, orientation: str) -> None:
    """Write the organs as one .nii or .nii.gz file: the labels of `Phantom.render_masks`.

    orientation
        Of the axes: `phantom.orientation` to match a NIfTI scan, "LPS" to match a DICOM series.
    """
    _write_nifti(phantom, phantom.render_masks(), path, orientation)


def _write_nifti(phantom: Phantom, voxels: Any, path: str | Path, orientation: str) -> None:
    itk: Any = SimpleITK  # its functions carry no types
    image = itk.GetImageFromArray(voxels)
    image.SetSpacing(phantom.spacing_mm[::-1])
    image.SetOrigin(phantom.origin_mm[::-1])
    write_image(itk.DICOMOrient(image, orientation), Path(path))


def write_dicom(phantom: Phantom, directory: str | Path) -> None:
    """Write the scan as a DICOM CT series, one file for each slice, named in random order.

    Raises FileExistsError when the directory is not empty.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise FileExistsError(errno.EEXIST, "must be empty; give another folder", str(directory))
    scan = phantom.render().astype(np.int32) + 1024
    rng = np.random.default_rng([phantom.seed, phantom.index, STORAGE, 1])
    (z, y, x), dz = phantom.origin_mm, phantom.spacing_mm[0]
    data = _series(phantom)
    for number, name in enumerate(rng.permutation(len(scan))):
        data.SOPInstanceUID = _uid(phantom, number)
        data.InstanceNumber = number + 1
        data.ImagePositionPatient = [round(x, 3), round(y, 3), round(z + number * dz, 3)]
        data.PixelData = scan[number].astype("<i2" if phantom.signed else "<u2").tobytes()
        data.save_as(directory / f"{name:04d}.dcm", enforce_file_format=True)


def _uid(phantom: Phantom, what: object) -> UID:
    key = ["semgen phantom", phantom.seed, phantom.index, phantom.size, what]
    key += ["varied"] if phantom.varied else []
    return generate_uid(entropy_srcs=[str(part) for part in key])


def _series(phantom: Phantom) -> Dataset:
    """The elements that all slices share."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.ImplementationClassUID = generate_uid(entropy_srcs=["semgen phantom"])
    data.file_meta.ImplementationVersionName = "SEMGEN"  # pydicom's changes with its version
    for name, value in {
        **DICOM_ATTRIBUTES,
        "StudyInstanceUID": _uid(phantom, "study"), "SeriesInstanceUID": _uid(phantom, "series"),
        "FrameOfReferenceUID": _uid(phantom, "frame"),
        "PatientID": f"PHANTOM-{phantom.seed}-{phantom.index:04d}{'V' if phantom.varied else ''}",
        "PatientName": f"Phantom^{phantom.index:04d}",
        "SeriesDescription": f"synthetic {phantom.protocol}",
        "PixelSpacing": list(phantom.spacing_mm[1:]), "SliceThickness": phantom.spacing_mm[0],
        "Rows": phantom.size[1], "Columns": phantom.size[2],
        "PixelRepresentation": int(phantom.signed),
    }.items():  # fmt: skip
        setattr(data, name, value)
    return data


def write_archive(
    directory: str | Path,
    *,
    patients: int,
    format: Literal["nifti", "dicom", "mixed"] = "nifti",
    seed: int = 0,
    matrix: int = 256,
    varied: bool = False,
    masks: bool = False,
    progress: Progress = SILENT,
) -> None:
    """Write an archive of synthetic patients, and the true positions of their landmarks.

    Makes `phantom-0000.nii.gz` or folders `phantom-0000` and up. `landmarks.json`, written last,
    has each scan's protocol, size, spacing, arms, disease and landmarks (z, y, x in mm).

    format
        "mixed" stores patients of even index as NIfTI and of odd index as DICOM.
    varied
        Draw harder patients, see `draw_phantom`.
    masks
        Write the true organs, too: `phantom-0000.nii.gz` and up, and the names of the labels
        (`labels.json`), into `masks_folder(directory)`, where no scan is searched for.

    The scans appear when all are written. Raises ValueError for an unknown format or fewer than one
    patient, SemgenError when one of the folders is not empty.
    """
    if format not in ("nifti", "dicom", "mixed"):
        raise ValueError(f"format must be nifti, dicom or mixed, got {format!r}")
    if patients < 1:
        raise ValueError(f"patients must be >= 1, got {patients}")
    truth = {}
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(fill_folder(Path(directory), last=TRUTH))
        if masks:
            organs = stack.enter_context(fill_folder(masks_folder(directory), last=_MASK_LABELS))
            _write_json(organs / _MASK_LABELS, LABELS)
        advance = stack.enter_context(progress.stage("phantoms", patients, "patients"))
        for index in range(patients):
            phantom = draw_phantom(seed, index, matrix=matrix, varied=varied)
            name = f"phantom-{index:04d}"
            nifti = format == "nifti" or (format == "mixed" and index % 2 == 0)
            if masks:
                orientation = phantom.orientation if nifti else "LPS"
                write_masks(phantom, organs / f"{name}.nii.gz", orientation=orientation)
            if nifti:
                name += ".nii.gz"
                write_nifti(phantom, folder / name)
            else:
                write_dicom(phantom, folder / name)
            truth[name] = {
                "protocol": phantom.protocol,
                "size": phantom.size,
                "spacing_mm": phantom.spacing_mm,
                "arms": phantom.arms and phantom.arms.pose,
                "disease": phantom.disease
                and {"kind": phantom.disease.kind, "organ": phantom.disease.organ},
                "landmarks": phantom.landmarks(),
            }
            advance(1)
        facts = {"seed": seed, "matrix": matrix, "varied": varied, "patients": truth}
        _write_json(folder / TRUTH, facts)


def masks_folder(directory: str | Path) -> Path:
    """Folder of an archive's masks: beside the archive, so that no mask is taken for a scan."""
    directory = Path(os.path.abspath(directory))
    return directory.with_name(f"{directory.name}.masks")


def _write_json(file: Path, value: object) -> None:
    with replace_file(file) as partial:
        partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
