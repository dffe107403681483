"""Weights for nnU-Net and nnssl, and from them."""

import collections
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.finetuning import CONFIG, make_task
from tests.support.runs import SHAPE, tiny
from trainer import (
    Noticed,
    TrainError,
    export_weights,
    load_unet,
    load_weights,
    pretrain,
    read_weights,
)
from trainer.config import NetName
from trainer.finetuning import finetune
from trainer.finetuning.starts import make_start
from trainer.nets.registry import build_backbone
from trainer.nets.resenc import add_aliases
from trainer.nnunet.architecture import find_architecture
from trainer.nnunet.plans import compare_with_plans, read_plans
from trainer.nnunet.read import Origin, parse_origins

CITATIONS = [
    {"type": "Architecture", "name": "ResEncL", "apa_citations": ["Isensee et al.\n2024."]},
    {"type": "Dataset", "name": "OpenMind", "bibtex_citations": ["@article{wald}"]},
]
PAPERS = ("Isensee et al. 2024.", "@article{wald}")


@pytest.fixture(scope="module")
def run(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a tiny resenc-s."""
    run = tmp_path_factory.mktemp("runs") / "run"
    pretrain(store, run, settings())
    return run


def settings(**changes: Any) -> Any:
    return tiny(net="resenc-s", warmup_epochs=0, steps=2, validation_batches=1, **changes)


def plans_of(run: Path, **changes: Any) -> dict[str, Any]:
    """Plans of nnU-Net for the net of a run, with changes of its `arch_kwargs`."""
    description = find_architecture(read_weights(run).tensors).describe()
    return {
        "plans_name": "nnUNetResEncUNetLPlans",
        "dataset_name": "Dataset001_Tiny",
        "configurations": {
            "2d": {"patch_size": [64, 64]},
            "3d_fullres": {
                "data_identifier": "nnUNetPlans_3d_fullres",
                "batch_size": 2,
                "patch_size": [20, 48, 40],
                "spacing": [3.0, 0.8, 0.8],
                "normalization_schemes": ["CTNormalization"],
                "architecture": {
                    "network_class_name": "dynamic_network_architectures.architectures.unet"
                    ".ResidualEncoderUNet",
                    "arch_kwargs": {**description, **changes},
                    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
                },
            },
            "3d_inherited": {"inherits_from": "3d_fullres", "batch_size": 4},
        },
    }


def write_json(file: Path, content: Any) -> Path:
    file.write_text(json.dumps(content))
    return file


def field_checkpoint(file: Path, kind: NetName = "resenc-s", **changes: Any) -> dict[str, Tensor]:
    """Write a checkpoint as nnU-Net's trainer does; returns its tensors by their first names."""
    torch.manual_seed(7)
    tensors = build_backbone(kind, 2).state_dict()
    weights = add_aliases(tensors)
    for stage in range(3):
        weights[f"decoder.seg_layers.{stage}.weight"] = torch.zeros(2, 2, 1, 1, 1)
    content = {
        "network_weights": collections.OrderedDict(weights),
        "optimizer_state": {"state": {}, "param_groups": [{"lr": 0.01}]},
        "logging": {"train_losses": [np.float32(0.5), np.float64(0.25)], "n": np.int64(3)},
        "_best_ema": np.float64(0.5),
        "init_args": {"plans": {"plans_name": "nnUNetPlans"}, "device": torch.device("cpu")},
        "trainer_name": "nnUNetTrainer",
        **changes,
    }
    torch.save(content, file)
    return tensors


def published_folder(folder: Path) -> dict[str, Tensor]:
    """Write a folder as nnssl publishes it."""
    folder.mkdir()
    plan = {
        "key_to_encoder": "encoder.stages",
        "key_to_stem": "encoder.stem",
        "pretrain_plan": {
            "configurations": {"onemmiso": {"normalization_schemes": ["ZScoreNormalization"]}}
        },
    }
    tensors = field_checkpoint(
        folder / "checkpoint_final.pth", nnssl_adaptation_plan=plan, citations=CITATIONS
    )
    write_json(folder / "adaptation_plan.json", plan)
    (folder / "README.md").write_text("---\nlicense: cc-by-4.0\ntags:\n- medical\n---\n# Weights\n")
    return tensors


# nnU-Net


def test_the_file_for_nnunet_has_every_tensor_of_its_net_under_every_name(
    run: Path, tmp_path: Path
) -> None:
    export_weights(run, tmp_path / "weights.pth", format="nnunet")
    weights = torch.load(tmp_path / "weights.pth", weights_only=True)["network_weights"]
    ours = read_weights(run).tensors
    backbone = {k: t for k, t in ours.items() if k.startswith(("encoder.", "decoder."))}
    assert weights.keys() == add_aliases(backbone).keys()
    for key, tensor in backbone.items():
        assert torch.equal(weights[key], tensor), key
    conv = "encoder.stages.1.blocks.0.conv1"
    alias = f"decoder.{conv}.all_modules.0.weight"
    assert torch.equal(weights[alias], ours[f"{conv}.conv.weight"])
    assert not any("out" in key for key in weights)


def test_plans_of_the_same_net_fit(run: Path, tmp_path: Path) -> None:
    plans = write_json(tmp_path / "plans.json", plans_of(run))
    for configuration in ("3d_fullres", "3d_inherited"):
        done = export_weights(
            run, tmp_path / "w.pth", format="nnunet", plans=plans, configuration=configuration
        )
        assert done["net"] == "resenc-s"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"features_per_stage": [2, 4, 8, 32]}, "features per stage: 2 4 8 16 .*, 2 4 8 32"),
        ({"n_blocks_per_stage": 1}, "blocks per stage: 1 3 4 6 .*, 1 1 1 1"),
        ({"kernel_sizes": [[1, 3, 3]] + [[3, 3, 3]] * 3}, "kernel sizes: 3x3x3 .*, 1x3x3 3x3x3"),
        ({"strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]]}, "strides: .*, 1x1x1 1x2x2"),
        ({"n_conv_per_stage_decoder": [2, 2, 2]}, "convolutions per stage of the decoder: 1 1 1"),
        ({"norm_op": "torch.nn.BatchNorm3d"}, "norm_op: .*InstanceNorm3d .*BatchNorm3d"),
        ({"conv_bias": False}, "conv_bias: True in the weights, False in the plans"),
        (
            {
                "n_stages": 3,
                "features_per_stage": [2, 4, 8],
                "n_blocks_per_stage": [1, 3, 4],
                "kernel_sizes": 3,
                "strides": [1, 2, 2],
                "n_conv_per_stage_decoder": [1, 1],
            },
            "stages: 4 in the weights, 3 in the plans",
        ),
    ],
)
def test_plans_of_another_net_are_refused_naming_what_differs(
    run: Path, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    plans = write_json(tmp_path / "plans.json", plans_of(run, **changes))
    with pytest.raises(TrainError, match=named):
        export_weights(run, tmp_path / "weights.pth", format="nnunet", plans=plans)
    assert not (tmp_path / "weights.pth").exists()


def test_a_plain_unet_and_several_channels_are_refused(run: Path, tmp_path: Path) -> None:
    content = plans_of(run)
    settings = content["configurations"]["3d_fullres"]
    settings["normalization_schemes"] *= 2
    plans = read_plans(write_json(tmp_path / "two.json", content), "3d_fullres")
    ours = find_architecture(read_weights(run).tensors)
    assert compare_with_plans(plans, ours) == ["input channels: 1 in the weights, 2 in the plans"]
    settings["architecture"]["network_class_name"] = "some.where.PlainConvUNet"
    plans = read_plans(write_json(tmp_path / "plain.json", content), "3d_fullres")
    assert "PlainConvUNet in the plans" in compare_with_plans(plans, ours)[0]
    with pytest.raises(TrainError, match="not 3-D"):
        read_plans(plans.file, "2d")
    with pytest.raises(TrainError, match="no configuration '3d_lowres'"):
        read_plans(plans.file, "3d_lowres")


def test_plans_are_adapted_in_a_copy(run: Path, tmp_path: Path) -> None:
    original = plans_of(run, n_blocks_per_stage=1)
    plans = write_json(tmp_path / "plans.json", original)
    export_weights(run, tmp_path / "w.pth", format="nnunet", plans=plans, adapt="SemgenPlans")
    assert json.loads(plans.read_text()) == original
    adapted = json.loads((tmp_path / "SemgenPlans.json").read_text())
    assert adapted["plans_name"] == "SemgenPlans"
    chosen = adapted["configurations"]["3d_fullres"]
    assert chosen["patch_size"] == [24, 48, 40], "multiples of 8"
    assert chosen["data_identifier"] == "nnUNetPlans_3d_fullres", "preprocessed data are shared"
    ours = find_architecture(read_weights(run).tensors)
    assert compare_with_plans(read_plans(tmp_path / "SemgenPlans.json", "3d_fullres"), ours) == []
    (tmp_path / "SemgenPlans.json").write_text("{}")
    with pytest.raises(TrainError, match="exists with other content"):
        export_weights(run, tmp_path / "w.pth", format="nnunet", plans=plans, adapt="SemgenPlans")


# nnssl


def test_the_folder_for_nnssl_is_complete_and_names_no_scan(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "published"
    export_weights(run, folder, format="nnssl", licence="cc-by-4.0", patch_size=(64, 64, 64))
    assert {path.name for path in folder.iterdir()} == {
        "checkpoint_final.pth", "adaptation_plan.json", "config.json", "README.md"
    }  # fmt: skip
    content = torch.load(folder / "checkpoint_final.pth", weights_only=True)
    plan = content["nnssl_adaptation_plan"]
    assert json.loads((folder / "adaptation_plan.json").read_text()) == {
        **plan, "trainer_name": "semgen"
    }  # fmt: skip
    assert plan["architecture_plans"]["arch_class_name"] == "ResidualEncoderUNet"
    assert plan["architecture_plans"]["arch_kwargs"]["features_per_stage"] == [2, 4, 8, 16]
    assert plan["recommended_downstream_patchsize"] == [64, 64, 64]
    (configuration,) = plan["pretrain_plan"]["configurations"].values()
    assert configuration["patch_size"] == list(SHAPE)
    assert all(f"{key}.weight" in content["network_weights"] for key in plan["keys_to_in_proj"])
    card = (folder / "README.md").read_text()
    scans = read_weights(run).metadata["scans"]
    assert card.startswith("---\nlicense: cc-by-4.0\n")
    assert f"{len(scans)} CT scans" in card
    assert "Haghighi" in card
    everything = b"".join(path.read_bytes() for path in folder.iterdir())
    assert not [scan for scan in scans if scan.encode() in everything]
    assert str(tmp_path).encode() not in everything


def test_a_resenc_l_is_named_as_nnssl_names_it(store: Path, tmp_path: Path) -> None:
    from trainer.nnunet.write import write_nnssl

    with torch.device("meta"):
        shapes = {
            key: tensor.shape for key, tensor in build_backbone("resenc-l").state_dict().items()
        }
    tensors = {key: torch.zeros(1).expand(shape) for key, shape in shapes.items()}
    facts = {"net": "resenc-l", "step": 1, "crop_shape": [32, 64, 64], "spacing_mm": "native"}
    write_nnssl(tmp_path / "l", tensors, facts, {"classify": False})
    plan = json.loads((tmp_path / "l" / "adaptation_plan.json").read_text())
    assert plan["architecture_plans"]["arch_class_name"] == "ResEncL"
    assert list(plan["pretrain_plan"]["configurations"]) == ["noresample"]


def test_an_export_in_the_warm_up_has_the_encoder_only(run: Path, tmp_path: Path) -> None:
    content = torch.load(run / "last.pt", weights_only=True)
    content["config"]["warmup_epochs"], content["progress"]["joint"] = 1, False
    torch.save(content, tmp_path / "last.pt")
    with pytest.raises(TrainError, match="warm-up"):
        export_weights(tmp_path, tmp_path / "w.pth", format="nnunet")
    done = export_weights(tmp_path, tmp_path / "out", format="nnssl")
    assert done["part"] == "encoder"
    assert read_weights(tmp_path / "out").metadata["part"] == "encoder"


def test_options_that_do_not_belong_to_the_format_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="licence is for format nnssl only"):
        export_weights(run, tmp_path / "w.pth", format="nnunet", licence="mit")
    with pytest.raises(TrainError, match="plans is for format nnunet only"):
        export_weights(run, tmp_path / "w.pth", plans=tmp_path / "plans.json")
    with pytest.raises(TrainError, match="give --plans"):
        export_weights(run, tmp_path / "w.pth", format="nnunet", adapt="Name")
    with pytest.raises(TrainError, match="multiples of 8 8 8"):
        export_weights(run, tmp_path / "out", format="nnssl", patch_size=(20, 64, 64))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "other.txt").touch()
    with pytest.raises(TrainError, match="other files"):
        export_weights(run, tmp_path / "out", format="nnssl")


def test_the_genesis_net_is_refused(store: Path, tmp_path: Path) -> None:
    pretrain(store, tmp_path / "run", tiny(warmup_epochs=0, steps=1))
    for name in ("nnunet", "nnssl"):
        with pytest.raises(TrainError, match="none of nnU-Net's"):
            export_weights(tmp_path / "run", tmp_path / "out", format=name)


# From the field


def test_a_checkpoint_of_nnunet_is_read_without_executing_code(tmp_path: Path) -> None:
    tensors = field_checkpoint(tmp_path / "checkpoint_best.pth")
    weights = read_weights(tmp_path / "checkpoint_best.pth")
    assert weights.tensors.keys() == tensors.keys()
    assert all(torch.equal(weights.tensors[key], tensors[key]) for key in tensors)
    (origin,) = parse_origins(weights.metadata["origins"])
    assert origin == Origin(kind="nnU-Net", file="checkpoint_best.pth")
    with pytest.raises(TrainError, match="no layer that restores"):
        load_unet(tmp_path / "checkpoint_best.pth")
    net = build_backbone("resenc-s", 2)
    report = load_weights(net, tmp_path / "checkpoint_best.pth")
    assert set(report.loaded) == tensors.keys()
    assert not report.missing


class Attack:
    """Calls `open` when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.file), "w")


def test_a_checkpoint_with_other_classes_is_refused(tmp_path: Path) -> None:
    field_checkpoint(tmp_path / "bad.pth", extra=Attack(tmp_path / "made"))
    with pytest.raises(TrainError, match="UnpicklingError"):
        read_weights(tmp_path / "bad.pth")
    assert not (tmp_path / "made").exists()


def test_another_net_is_refused_naming_what_differs(tmp_path: Path) -> None:
    tensors = build_backbone("resenc-s", 2).state_dict()
    tensors["encoder.stages.0.blocks.0.conv1.conv.weight"] = torch.zeros(2, 2, 1, 3, 3)
    torch.save({"network_weights": tensors}, tmp_path / "kernels.pth")
    with pytest.raises(TrainError, match=r"kernel sizes: 1x3x3 .* 3x3x3 .* in resenc-s"):
        read_weights(tmp_path / "kernels.pth")
    plain = {"network_weights": {"encoder.stages.0.0.convs.0.conv.weight": torch.zeros(2)}}
    torch.save({**plain, "trainer_name": "nnUNetTrainer"}, tmp_path / "plain.pth")
    with pytest.raises(TrainError, match=r"not a 3-D residual encoder U-Net \(trainer nnUNet"):
        read_weights(tmp_path / "plain.pth")


def test_tensors_of_other_parts_are_left_out_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = build_backbone("resenc-s", 2).state_dict() | {"projector.weight": torch.zeros(2)}
    torch.save({"network_weights": tensors}, tmp_path / "more.pth")
    assert "projector.weight" not in read_weights(tmp_path / "more.pth").tensors
    assert "more.pth: not used: projector.weight" in caplog.text


def test_a_run_from_a_published_folder_tells_and_keeps_licence_and_papers(
    store: Path, tmp_path: Path
) -> None:
    tensors = published_folder(tmp_path / "openmind")
    events: list[Any] = []
    config = settings(init=str(tmp_path / "openmind"), learning_rate=1e-30)
    pretrain(store, tmp_path / "run", config, on_event=events.append)
    (text,) = (event.text for event in events if isinstance(event, Noticed))
    assert all(word in text for word in ("nnssl", "cc-by-4.0", *PAPERS))
    trained = read_weights(tmp_path / "run")
    assert trained.metadata["normalise"] == "zscore"
    for key, tensor in tensors.items():
        torch.testing.assert_close(trained.tensors[key], tensor, rtol=0, atol=1e-20)

    resumed: list[Any] = []
    pretrain(
        store, tmp_path / "run", settings(learning_rate=1e-30, epochs=1), on_event=resumed.append
    )
    assert not [event for event in resumed if isinstance(event, Noticed)]
    for file, options in (("a.safetensors", {}), ("b", {"format": "nnssl", "licence": "mit"})):
        export_weights(tmp_path / "run", tmp_path / file, **options)  # type: ignore[arg-type]
        first, *later = parse_origins(read_weights(tmp_path / file).metadata["origins"])
        assert first == Origin(
            kind="nnssl", file="checkpoint_final.pth", licence="cc-by-4.0", citations=PAPERS
        )
        assert [origin.licence for origin in later] == (["mit"] if file == "b" else [])
    card = (tmp_path / "b" / "README.md").read_text()
    assert "cc-by-4.0" in card
    assert PAPERS[0] in card


def test_an_export_for_nnunet_starts_a_run_and_remembers_its_scans(
    run: Path, store: Path, tmp_path: Path
) -> None:
    export_weights(run, tmp_path / "weights.pth", format="nnunet")
    weights = read_weights(tmp_path / "weights.pth")
    assert weights.metadata["scans"] == read_weights(run).metadata["scans"]
    assert weights.metadata["origins"] == [], "it is our own"
    pretrain(store, tmp_path / "run", settings(init=str(tmp_path / "weights.pth")))


def test_fine_tuning_starts_from_a_published_folder(tmp_path: Path) -> None:
    tensors = published_folder(tmp_path / "openmind")
    config = dataclasses.replace(CONFIG, init=str(tmp_path / "openmind"), steps=2, batch_size=4)
    for segments, prefix in ((True, ("encoder.", "decoder.")), (False, ("encoder.",))):
        net = make_start(config, outputs=2, segments=segments).net.state_dict()
        for key, tensor in tensors.items():
            if key.startswith(prefix):
                assert torch.equal(net[f"body.{key}"], tensor), key
    events: list[Any] = []
    task = make_task(tmp_path / "task", range(5))
    summary = finetune(task, tmp_path / "tuned", config, on_event=events.append)
    assert summary.training.steps == 2
    (text,) = (event.text for event in events if isinstance(event, Noticed))
    assert "cc-by-4.0" in text
    origins = parse_origins(read_weights(tmp_path / "tuned").metadata["origins"])
    assert [origin.licence for origin in origins] == ["cc-by-4.0"]
