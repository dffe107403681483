"""Nothing of a header or a path leaves the private catalogue, whatever a command does.

At any verbosity: what commands print, and what they write into the log file.
"""

import re
from pathlib import Path

import pydicom

from pipeline.phantom.files import write_archive
from tests.support.command import Semgen

WORDS = {
    "PatientName": "Zebrowski^Quirina",
    "PatientID": "QX-998877-Z",
    "PatientBirthDate": "19330412",
    "StudyDate": "20190723",
    "InstitutionName": "Klinik Xylophon",
    "StudyDescription": "Oesophagus zzz",
    "SeriesInstanceUID": None,
    "StudyInstanceUID": None,
    "SOPInstanceUID": None,
}


def test_no_word_of_a_header_or_a_path_leaves_the_catalogue(
    semgen: Semgen, config_file: Path, tmp_path: Path
) -> None:
    archive = tmp_path / "archive-of-zebrowski"
    write_archive(archive, patients=4, format="dicom", seed=2, matrix=64)
    secret = {"zebrowski", "geheim", "landmarks"}
    for file in archive.rglob("*.dcm"):
        data = pydicom.dcmread(file)
        for name, word in WORDS.items():
            if word is not None:
                setattr(data, name, word if name != "PatientID" else word + file.parent.name[-1])
            value = str(getattr(data, name))
            secret |= {value.lower(), value.partition("^")[0].lower()}
        data.save_as(file.with_name(f"geheim-{file.name}"))
        file.unlink()
    (archive / "geheim-kaputt.nii.gz").write_bytes(b"Zebrowski" * 100)
    broken = next(archive.rglob("*0.dcm"))
    broken.write_bytes(broken.read_bytes()[:2000])  # costs one of the four series

    outputs = []
    settings = ("--config", config_file, "--workers", 2)
    training = ("--width", 2, "--batch-size", 4, "--steps", 2)
    details = ("-v", "--log-file", "log.txt")
    for command in (
        ("prepare", archive, "s", *settings, *details),
        ("prepare", archive, "s", *settings, "--json"),
        ("prepare", archive, "other", *settings, "--frame", "scan", "--extend", "s", *details),
        ("inspect", "s", *details),
        ("inspect", "s", "--json"),
        ("inspect", "s", "--class", 0),
        ("verify", "s", "--against-archive", *details),
        ("pretrain", "s", "run", *training, *details),
        ("export", "run", "weights.safetensors"),
    ):
        done = semgen(*command, cwd=tmp_path)
        outputs.append(done.stdout + done.stderr)
        assert done.returncode == int("--extend" in command), outputs[-1]
    folders = (tmp_path / "s", tmp_path / "run")
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    content = {
        str(file.relative_to(tmp_path)): file.read_bytes().lower()
        for file in [*files, tmp_path / "weights.safetensors"]
    }
    assert re.search(r"^2 of 9: survey: \d scans .*; rejected: ", outputs[0], re.MULTILINE)
    log = (tmp_path / "log.txt").read_bytes()
    assert log.count(b"rejected: ") > 3
    assert b"accepted: scan " in log
    assert b"pretrain: step 2 of 2" in log
    content["log"] = log.lower()
    content |= {f"output {number}": text.lower().encode() for number, text in enumerate(outputs)}
    leaks = [
        (name, word)
        for name, data in content.items()
        for word in secret - {""}
        if word in name.lower() or word.encode() in data
    ]
    assert leaks == []
    assert len(content) > 50
