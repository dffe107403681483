"""Load a folder of `semgen export --format nnssl` with nnU-Net's own code, and compare tensors.

    PYTHONPATH=NNUNET:NNSSL/src ENVIRONMENT/bin/python scripts/nnunet/check_nnssl.py FOLDER --nnssl

NNUNET and NNSSL are checkouts of github.com/MIC-DKFZ/nnUNet and nnssl: nnU-Net 2.8.1 of PyPI lacks
this code. Builds the net as `nnUNetv2_train_pretrained` does, from the plan in the file, loads the
encoder, and compares every tensor of it, bit for bit. With --nnssl, also reads the plan with the
classes of nnssl. Exits with 1 where a tensor differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from nnunetv2.training.nnUNetTrainer.pretraining.pretrainedTrainer import PretrainedTrainer


def main() -> None:
    """Load and compare."""
    parser = argparse.ArgumentParser(description="Load an export with nnU-Net's own code.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nnssl", action="store_true")
    parser.add_argument("--channels", type=int, default=1, help="input channels of the task")
    options = parser.parse_args()
    file = options.folder / "checkpoint_final.pth"
    content = torch.load(file, weights_only=True)
    plan, weights = content["nnssl_adaptation_plan"], content["network_weights"]
    written = json.loads((options.folder / "adaptation_plan.json").read_text())
    assert {**plan, "trainer_name": content["trainer_name"]} == written
    architecture = plan["architecture_plans"]
    net = PretrainedTrainer.build_network_architecture(
        architecture["arch_class_name"],
        architecture["arch_kwargs"],
        architecture["arch_kwargs_requiring_import"],
        plan["recommended_downstream_patchsize"],
        options.channels,
        3,
        enable_deep_supervision=False,
    )
    (configuration,) = plan["pretrain_plan"]["configurations"].values()
    net, repeated = PretrainedTrainer.load_pretrained_weights(
        net,
        str(file),
        plan["pretrain_num_input_channels"],
        options.channels,
        configuration["patch_size"],
        plan["recommended_downstream_patchsize"],
        plan["key_to_encoder"],
        plan["key_to_stem"],
        tuple(plan["keys_to_in_proj"]),
        plan["key_to_lpe"],
    )
    first = {f"{key}.weight" for key in plan["keys_to_in_proj"]} if repeated else set()
    loaded = {k: t for k, t in net.state_dict().items() if k.startswith("encoder.")}
    compared = loaded.keys() - first
    equal = [key for key in compared if torch.equal(loaded[key], weights[key])]
    for key in first:  # one channel, repeated
        assert torch.allclose(loaded[key].sum(1, keepdim=True), weights[key])
    print(
        f"{architecture['arch_class_name']}: {len(equal)} of {len(compared)} tensors of the encoder"
        f" are equal, bit for bit; {len(first)} repeated for {options.channels} channels"
    )
    if options.nnssl:
        _read_with_nnssl(written)
    if len(equal) != len(compared):
        sys.exit(1)


def _read_with_nnssl(written: dict[str, object]) -> None:
    from nnssl.adaptation_planning.adaptation_plan import AdaptationPlan  # noqa: PLC0415 - optional

    plan = {key: value for key, value in written.items() if key != "trainer_name"}
    again = AdaptationPlan.from_dict(json.loads(json.dumps(plan))).serialize()
    again = json.loads(json.dumps(again))
    imported = "arch_kwargs_requiring_import"  # nnssl leaves out those that are None
    for side in (plan, again):
        names = side["architecture_plans"].pop(imported)
        assert names is None or {"conv_op", "norm_op", "nonlin"} <= set(names)
    assert again == plan
    print("nnssl reads the adaptation plan and writes the same again")


if __name__ == "__main__":
    main()
