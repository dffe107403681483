"""Losses of short trainings, to compare with the record in tests/golden/losses.json.

After a change that is meant to change numbers, renew the record and say why in the commit:

    OMP_NUM_THREADS=1 python -m tests.support.golden_losses
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813
import torch

from tests.support.synthetic_store import make_store
from trainer import TrainConfig, pretrain
from trainer.finetuning import FinetuneConfig, finetune
from trainer.pretexts import PRETEXTS

RECORD = Path(__file__).parents[1] / "golden" / "losses.json"
Lines = list[dict[str, Any]]


def pretraining(pretext: str, folder: Path) -> Lines:
    """Two epochs of three steps; where two losses are learned, the first is the warm-up."""
    store = make_store(
        folder / "store", num_classes=3, num_train=8, num_validation=2, shape=(16, 16, 16)
    )
    config = TrainConfig(
        pretext=pretext, width=2, batch_size=8, epochs=2, warmup_epochs=1, shuffle_blocks=100,
        learning_rate=1e-4, log_every=1, device="cpu",
    )  # fmt: skip
    return read(pretrain(store, folder / "run", config).run)


def finetuning(folder: Path) -> Lines:
    """Segment a bright box, two epochs."""
    rng = np.random.default_rng(0)
    rows = ["image,mask,split"]
    for number, split in enumerate(("train", "train", "train", "validation", "test")):
        truth = np.zeros((12, 20, 20), np.uint8)
        low = rng.integers(1, 6, 3)
        truth[tuple(slice(at, at + 6) for at in low)] = 1
        image = (rng.normal(-200, 60, truth.shape) + 1000.0 * truth).astype(np.int16)
        for name, values in (("image", image), ("mask", truth)):
            sitk.WriteImage(sitk.GetImageFromArray(values), str(folder / f"{name}{number}.nii.gz"))
        rows.append(f"image{number}.nii.gz,mask{number}.nii.gz,{split}")
    (folder / "task.csv").write_text("\n".join(rows) + "\n")
    config = FinetuneConfig(
        width=2, shape=(8, 16, 16), batch_size=8, epochs=2, learning_rate=1e-4, log_every=1,
        patches_per_case=8, device="cpu",
    )  # fmt: skip
    finetune(folder / "task.csv", folder / "run", config)
    return read(folder / "run")


def read(run: Path) -> Lines:
    """Metrics of a run, except accuracies and overlaps: rounding may change one example of them."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    shares = ("accuracy", "dice", "iou")
    return [{k: v for k, v in line.items() if not k.endswith(shares)} for line in lines]


TRAININGS: dict[str, Callable[[Path], Lines]] = {
    **{name: lambda folder, name=name: pretraining(name, folder) for name in PRETEXTS},
    "finetuning": finetuning,
}


def main() -> None:
    torch.set_num_threads(1)
    record = {}
    for name, train in TRAININGS.items():
        with tempfile.TemporaryDirectory() as folder:
            record[name] = train(Path(folder))
    lines = [
        f'"{name}": [\n' + ",\n".join(f"  {json.dumps(line)}" for line in lines_of) + "\n]"
        for name, lines_of in record.items()
    ]
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
