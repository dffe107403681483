"""From unlabeled scans to nnU-Net: pretrain, export, and fine-tune with nnU-Net, at tiny size.

    python scripts/nnunet/example.py WORK --nnunet NNUNET_ENVIRONMENT/bin

Makes phantom patients with organ masks in WORK, pretrains on them without the masks, exports the
weights, and runs the commands of nnU-Net that a user runs: fingerprint, plan, preprocess, train.
Then compares every tensor that nnU-Net loaded with ours. nnU-Net must be in an environment of its
own: `pip install nnunetv2==2.8.1`. Run this file with the Python of semgen.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from pipeline import load_config, prepare
from pipeline.phantom.files import masks_folder, write_archive
from trainer import TrainConfig, export_weights, pretrain

HERE = Path(__file__).resolve().parent
DATASET, ID, FOLD = "Dataset901_Phantoms", "901", "all"
PLANNED, ADAPTED = "nnUNetResEncUNetMPlans", "SemgenPlans"


def main() -> None:
    """Run all steps; each resumes or starts again."""
    options = _read_options()
    work, tools = options.work.resolve(), options.nnunet
    archive, store, run = work / "archive", work / "store", work / "run"
    if not (archive / "landmarks.json").exists():
        write_archive(archive, patients=options.patients, seed=1, matrix=96, masks=True)
    print(prepare(archive, store, load_config(preset="demo")), flush=True)
    config = TrainConfig(
        net=options.net, width=options.width, pretext=options.pretext, steps=options.steps,
        warmup_epochs=0, batch_size=options.batch_size, device="cpu",
    )  # fmt: skip
    print(pretrain(store, run, config), flush=True)

    nnunet = NnUNet(work / "nnunet", tools, iterations=options.iterations)
    plans = nnunet.make_plans(archive)
    weights = work / "weights.pth"
    export_weights(run, weights, format="nnunet", plans=plans, adapt=ADAPTED)
    loaded = nnunet.train(weights)
    compare(weights, loaded)


class NnUNet:
    """The commands of nnU-Net, in folders of their own."""

    def __init__(self, folder: Path, tools: Path, *, iterations: int) -> None:
        self.tools, self.folder = tools, folder
        self.raw, self.preprocessed = folder / "raw", folder / "preprocessed"
        self.results = folder / "results"
        self.environment = {
            **os.environ,
            "nnUNet_raw": str(self.raw),
            "nnUNet_preprocessed": str(self.preprocessed),
            "nnUNet_results": str(self.results),
            "nnUNet_extTrainer": str(HERE / "trainers"),
            "nnUNet_compile": "false",
            "nnUNet_n_proc_DA": "1",
            "SHORT_ITERATIONS": str(iterations),
        }
        self.environment.pop("PYTHONPATH", None)
        if self._call("python", "-c", "import torchvision", check=False):
            self.environment["PYTHONPATH"] = str(HERE / "without_torchvision")

    def make_plans(self, archive: Path) -> Path:
        """Make the raw data set and plan; returns the plans of nnU-Net."""
        make_dataset(archive, self.raw / DATASET)
        self._call("nnUNetv2_extract_fingerprint", "-d", ID, "-np", "1")
        self._call("nnUNetv2_plan_experiment", "-d", ID, "-pl", "nnUNetPlannerResEncM")
        return self.preprocessed / DATASET / f"{PLANNED}.json"

    def train(self, weights: Path) -> Path:
        """Preprocess and train; returns the net as nnU-Net had it before the first iteration."""
        self._call("nnUNetv2_preprocess", "-d", ID, "-plans_name", ADAPTED, "-c", "3d_fullres",
                   "-np", "1")  # fmt: skip
        self._call("nnUNetv2_train", ID, "3d_fullres", FOLD, "-p", ADAPTED, "-tr", "ShortTrainer",
                   "-pretrained_weights", weights, "-device", "cpu")  # fmt: skip
        folder = self.results / DATASET / f"ShortTrainer__{ADAPTED}__3d_fullres" / f"fold_{FOLD}"
        return folder / "loaded.pth"

    def _call(self, command: str, *arguments: object, check: bool = True) -> int:
        line = [str(self.tools / command), *map(str, arguments)]
        print("$", command, *line[1:], flush=True)
        silent = None if check else subprocess.DEVNULL
        return subprocess.run(line, env=self.environment, check=check, stderr=silent).returncode


def make_dataset(archive: Path, folder: Path) -> None:
    """A raw data set of nnU-Net: the phantoms and their organ masks."""
    masks = masks_folder(archive)
    labels = json.loads((masks / "labels.json").read_text())
    images, targets = folder / "imagesTr", folder / "labelsTr"
    images.mkdir(parents=True, exist_ok=True)
    targets.mkdir(exist_ok=True)
    files = sorted(archive.glob("*.nii.gz"))
    for file in files:
        name = file.name.removesuffix(".nii.gz")
        shutil.copyfile(file, images / f"{name}_0000.nii.gz")
        shutil.copyfile(masks / file.name, targets / file.name)
    content = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, **labels},
        "numTraining": len(files),
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(content, indent=1))


def compare(weights: Path, loaded: Path) -> None:
    """Exit with 1 unless nnU-Net's net has every tensor of ours, bit for bit, and no others."""
    ours = torch.load(weights, weights_only=True)["network_weights"]
    theirs = torch.load(loaded, weights_only=True, map_location="cpu")
    theirs = {key: tensor for key, tensor in theirs.items() if ".seg_layers." not in key}
    equal = [key for key in theirs if key in ours and torch.equal(ours[key], theirs[key])]
    print(f"{len(equal)} of {len(theirs)} tensors of encoder and decoder are equal, bit for bit")
    if len(equal) != len(theirs) or ours.keys() != theirs.keys():
        sys.exit(1)


def _read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="From unlabeled scans to nnU-Net, at tiny size.")
    parser.add_argument("work", type=Path, help="folder for everything that is made")
    parser.add_argument("--nnunet", type=Path, required=True, metavar="BIN",
                        help="folder of nnUNetv2_train and of its Python")  # fmt: skip
    parser.add_argument("--net", default="resenc-s")
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--pretext", default="restoration")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--patients", type=int, default=10)
    parser.add_argument("--iterations", type=int, default=3, help="of nnU-Net's training")
    return parser.parse_args()


if __name__ == "__main__":
    main()
