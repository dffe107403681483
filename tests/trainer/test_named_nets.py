"""Nets by name, and nets of one's own."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.synthetic_store import make_store
from trainer import (
    TrainConfig,
    TrainError,
    export_weights,
    load_encoder,
    load_unet,
    load_weights,
    pretrain,
    read_weights,
)
from trainer.config import NetName, find_differences
from trainer.finetuning import FinetuneConfig
from trainer.finetuning.starts import make_start, rebuild
from trainer.nets.backbone import check_outputs, check_protocol, check_shape
from trainer.nets.pretraining import PretrainingNet
from trainer.nets.registry import KINDS, STAGES, build_backbone, build_net, find_kind, find_width
from trainer.nets.resenc import ResEncUNet, add_aliases

SHAPES: dict[NetName, tuple[int, int, int]] = {
    "genesis": (16, 16, 16),
    "resenc-s": (16, 16, 32),
    "resenc-m": (16, 16, 32),
    "resenc-l": (32, 32, 64),
}
"""Small crops that suit each net; those of the first two suit eighths of a crop, too."""
CONFIG = TrainConfig(
    width=1, batch_size=2, steps=2, shuffle_blocks=10, log_every=1, validation_batches=1,
    device="cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int, int], Path]:
    folder = tmp_path_factory.mktemp("data")
    return {
        shape: make_store(
            folder / f"{shape}.store", num_classes=2, num_train=2, num_validation=1, shape=shape
        )
        for shape in set(SHAPES.values())
    }


@pytest.fixture(scope="module")
def runs(
    stores: dict[tuple[int, int, int], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[NetName, Path]:
    """Two steps of restoration and classes with each net."""
    folder = tmp_path_factory.mktemp("runs")
    for kind, shape in SHAPES.items():
        pretrain(stores[shape], folder / kind, dataclasses.replace(CONFIG, net=kind))
    return {kind: folder / kind for kind in SHAPES}


def saved(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(run / "last.pt", weights_only=True)
    return content


def assert_same_weights(run: Path, other: Path) -> None:
    one, two = saved(run), saved(other)
    assert one["model"].keys() == two["model"].keys()
    for key, tensor in one["model"].items():
        assert torch.equal(tensor, two["model"][key]), key
    for index, state in one["optimiser"]["state"].items():
        for key, value in state.items():
            assert torch.equal(value, two["optimiser"]["state"][index][key])


# Training ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHAPES)
def test_restoration_with_classes_resumes_exactly(
    kind: NetName,
    runs: dict[NetName, Path],
    stores: dict[tuple[int, int, int], Path],
    tmp_path: Path,
) -> None:
    config = dataclasses.replace(CONFIG, net=kind)
    for steps in (1, 2):
        config = dataclasses.replace(config, steps=steps)
        pretrain(stores[SHAPES[kind]], tmp_path / "run", config)
    assert_same_weights(tmp_path / "run", runs[kind])


@pytest.mark.parametrize(
    ("kind", "pretext"),
    [
        ("genesis", "rubik"),
        ("resenc-s", "rubik"),
        ("resenc-m", "rotation"),
        ("resenc-l", "rotation"),
    ],
)
def test_a_task_with_its_own_head_trains_an_encoder_and_resumes_exactly(
    kind: NetName, pretext: Any, stores: dict[tuple[int, int, int], Path], tmp_path: Path
) -> None:
    config = dataclasses.replace(CONFIG, net=kind, pretext=pretext, classify=False)
    for name, steps in (("whole", 2), ("run", 1), ("run", 2)):
        config = dataclasses.replace(config, steps=steps)
        pretrain(stores[SHAPES[kind]], tmp_path / name, config)
    assert_same_weights(tmp_path / "run", tmp_path / "whole")
    keys = saved(tmp_path / "run")["model"].keys()
    assert not any(key.startswith(("up_tr", "decoder.", "out_tr", "clc_out")) for key in keys)


@pytest.mark.parametrize("kind", SHAPES)
def test_training_changes_every_weight_of_the_net(kind: NetName, runs: dict[NetName, Path]) -> None:
    before = build_net(kind, width=1, num_classes=2, seed=CONFIG.seed)
    after = saved(runs[kind])["model"]
    assert [k for k, p in before.state_dict().items() if torch.equal(p, after[k])] == []


def test_a_setting_that_a_run_does_not_know_had_its_default() -> None:
    older = {k: v for k, v in dataclasses.asdict(CONFIG).items() if k != "accumulate"}
    assert find_differences(older, CONFIG) == []
    wanted = dataclasses.replace(CONFIG, accumulate=2)
    assert find_differences(older, wanted) == ["accumulate: 1 -> 2"]


@pytest.mark.parametrize(
    ("kind", "shape", "parts", "message"),
    [
        ("genesis", (12, 16, 16), 1, "multiples of 8 for this net, got (12, 16, 16)"),
        ("resenc-s", (12, 16, 16), 1, "multiples of 8"),
        ("resenc-m", (24, 16, 16), 1, "multiples of 16"),
        ("resenc-l", (32, 64, 48), 1, "multiples of 32"),
        ("resenc-l", (32, 64, 64), 2, "multiples of 64"),
        ("resenc-l", (32, 32, 32), 1, "a side of at least 64"),
        ("resenc-s", (16, 16, 16), 2, "a side of at least 32"),
    ],
)
def test_sides_that_do_not_suit_the_net_are_refused(
    kind: NetName, shape: tuple[int, ...], parts: int, message: str
) -> None:
    with pytest.raises(TrainError) as caught:
        check_shape(shape, build_backbone(kind, 1), parts)
    assert message in str(caught.value)


def test_a_store_with_other_sides_is_refused_before_training(
    stores: dict[tuple[int, int, int], Path], tmp_path: Path
) -> None:
    with pytest.raises(TrainError, match="multiples of 32 for this net, got"):
        pretrain(stores[16, 16, 16], tmp_path / "run", dataclasses.replace(CONFIG, net="resenc-l"))
    assert not (tmp_path / "run").exists()


# Weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHAPES)
def test_weights_of_every_net_are_exported_and_loaded(
    kind: NetName, runs: dict[NetName, Path], tmp_path: Path
) -> None:
    metadata = export_weights(runs[kind], tmp_path / "w.safetensors")
    assert (metadata["net"], metadata["width"]) == (kind, 1)
    crops = torch.rand(2, 1, *SHAPES[kind])
    net, encoder = load_unet(tmp_path / "w.safetensors"), load_encoder(tmp_path / "w.safetensors")
    expected = load_unet(runs[kind])(crops)
    restored, logits, _ = net(crops)
    assert torch.equal(restored, expected.restored)
    assert torch.equal(logits, expected.logits)
    assert torch.equal(encoder(crops), net.encode(crops)[0])
    assert find_kind(encoder.state_dict()) == kind
    assert find_width(encoder.state_dict()) == 1


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("part", ["unet", "encoder"])
def test_a_part_of_every_net_is_a_starting_point(
    kind: NetName, part: Any, runs: dict[NetName, Path], tmp_path: Path
) -> None:
    export_weights(runs[kind], tmp_path / "part.pt", part=part)
    net = build_net(kind, width=1, num_classes=7, seed=9)
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    report = load_weights(net, tmp_path / "part.pt", part=part)
    trained = saved(runs[kind])["model"]
    encoder, decoder = ("down_tr", "encoder."), ("up_tr", "decoder.", "out_tr")
    wanted = encoder if part == "encoder" else encoder + decoder
    assert set(report.loaded) == {key for key in before if key.startswith(wanted)}
    for key, tensor in net.state_dict().items():
        expected = trained if key.startswith(wanted) else before
        assert torch.equal(tensor, expected[key]), key


def test_pretraining_goes_on_from_weights_of_the_same_net_only(
    runs: dict[NetName, Path], stores: dict[tuple[int, int, int], Path], tmp_path: Path
) -> None:
    config = dataclasses.replace(CONFIG, net="resenc-s", init=str(runs["resenc-s"]), steps=1)
    config = dataclasses.replace(config, learning_rate=1e-12)
    pretrain(stores[SHAPES["resenc-s"]], tmp_path / "run", config)
    before, after = saved(runs["resenc-s"])["model"], saved(tmp_path / "run")["model"]
    key = "decoder.stages.0.convs.0.conv.weight"
    torch.testing.assert_close(after[key], before[key])
    other = dataclasses.replace(config, init=str(runs["genesis"]))
    with pytest.raises(TrainError, match="holds weights of the net genesis, not of resenc-s"):
        pretrain(stores[SHAPES["resenc-s"]], tmp_path / "other", other)


def test_only_genesis_has_the_official_format(runs: dict[NetName, Path], tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="format genesis is for the net genesis only"):
        export_weights(runs["resenc-s"], tmp_path / "w.pt", format="genesis")


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("segments", [True, False])
def test_fine_tuning_starts_from_every_net(
    kind: NetName, segments: bool, runs: dict[NetName, Path]
) -> None:
    config = FinetuneConfig(init=str(runs[kind]), shape=SHAPES[kind])
    net = make_start(config, outputs=3, segments=segments).net
    trained = saved(runs[kind])["model"]
    body = net.get_submodule("body").state_dict()
    assert all(torch.equal(tensor, trained[key]) for key, tensor in body.items())
    assert any(key.startswith(("up_tr", "decoder.")) for key in body) == segments
    crops = torch.rand(2, 1, *SHAPES[kind])
    logits = net.eval()(crops)
    assert logits.shape == ((2, 3, *SHAPES[kind]) if segments else (2, 3))
    again = rebuild("unet", net.state_dict(), outputs=3, segments=segments)
    assert torch.equal(again(crops), logits)


def test_fine_tuning_from_scratch_takes_a_net_by_name() -> None:
    config = FinetuneConfig(net="resenc-m", width=1, shape=(16, 16, 32))
    body = make_start(config, outputs=2, segments=True).net.get_submodule("body")
    assert find_kind(body.state_dict()) == "resenc-m"
    with pytest.raises(TrainError, match="multiples of 16 for this net"):
        make_start(dataclasses.replace(config, shape=(8, 16, 16)), outputs=2, segments=True)


# The residual-encoder U-Net ---------------------------------------------------------------------

PACKAGES = {
    "resenc-s": (25.894912, 530, "4ee946424f65104d"),
    "resenc-m": (62.80896, 744, "8934fe611c1741a6"),
    "resenc-l": (102.34816, 946, "75d44fee79433c30"),
}
"""Millions of parameters, number of tensors with aliases, and digest of their keys and shapes, of
the package's nets at width 32, without its layers `seg_layers`."""


def digest(tensors: dict[str, Tensor]) -> str:
    shapes = sorted((key, tuple(tensor.shape)) for key, tensor in tensors.items())
    return hashlib.sha256(repr(shapes).encode()).hexdigest()[:16]


@pytest.mark.parametrize("kind", STAGES)
def test_keys_and_shapes_are_those_of_nnunet(kind: NetName) -> None:
    with torch.device("meta"):
        net = build_backbone(kind, 32)
    named = add_aliases(net.state_dict())
    millions = sum(parameter.numel() for parameter in net.parameters()) / 1e6
    assert (millions, len(named), digest(named)) == PACKAGES[kind]


@pytest.mark.parametrize("kind", STAGES)
def test_outputs_are_those_of_the_package(kind: NetName) -> None:
    unet = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    net, stages = build_backbone(kind, 2), STAGES[kind]
    strides, blocks = (1, 2, 2, 2, 2, 2)[:stages], (1, 3, 4, 6, 6, 6)[:stages]
    assert isinstance(net, ResEncUNet)
    norm, activation = {"eps": 1e-5, "affine": True}, {"inplace": True}
    theirs = unet.ResidualEncoderUNet(
        1, stages, net.channels, nn.Conv3d, 3, strides, blocks, 3, 1, True,
        nn.InstanceNorm3d, norm, None, None, nn.LeakyReLU, activation,
    )  # fmt: skip
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    own = {key: tensor for key, tensor in theirs.state_dict().items() if ".seg_layers." in key}
    theirs.load_state_dict(add_aliases(net.state_dict()) | own)
    theirs.decoder.seg_layers[-1] = nn.Identity()
    crops = torch.rand(2, 1, 32, 32, 64)
    assert torch.equal(net(crops), theirs(crops))


def test_a_residual_block_begins_as_its_skip() -> None:
    net = build_backbone("resenc-s", 2)
    assert isinstance(net, ResEncUNet)
    features = torch.rand(1, 4, 4, 4, 4)
    block = net.stages()[2].get_submodule("blocks.1")  # neither stride nor change of channels
    assert torch.equal(block(features), features)


# The net around a backbone ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHAPES)
def test_complete_crops_are_classified_beside_masked_ones(kind: NetName) -> None:
    net = build_net(kind, width=1, num_classes=2).eval()
    masked, originals = torch.rand(2, 2, 1, *SHAPES[kind])
    both = net(masked, originals=originals)
    torch.testing.assert_close(both.restored, net(masked).restored)
    torch.testing.assert_close(both.logits, net(originals).logits)
    warming_up = net(masked, originals=originals, pretext=False)
    assert warming_up.restored is None
    torch.testing.assert_close(warming_up.logits, both.logits)
    torch.testing.assert_close(net(masked, originals=originals, classify=False).restored,
                               both.restored)  # fmt: skip


def test_restored_crops_may_have_any_range() -> None:
    net = PretrainingNet(build_backbone("genesis", 1), activation="linear")
    with torch.no_grad():
        net.out_tr.final_conv.bias.fill_(-3.0)  # type: ignore[operator]
    assert net(torch.rand(1, 1, 8, 8, 16)).restored.min() < 0


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_hold_nearly_all_weights_of_a_net(kind: NetName) -> None:
    net = build_net(kind, width=2, num_classes=None)
    held = {id(p) for block in net.stages() for p in block.parameters()}
    others = {k.split(".")[0] for k, p in net.named_parameters() if id(p) not in held}
    assert others <= {"out_tr", "backbone"}
    assert len(held) > 0.9 * len(list(net.parameters()))


# A net of one's own -----------------------------------------------------------------------------


class Tiny(nn.Module):
    """Two resolutions."""

    factor, bottleneck_channels, decoded_channels = 2, 4, 3
    encoder_keys: tuple[str, ...] = ("first", "second")
    decoder_keys: tuple[str, ...] = ("last",)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, 3, 3, padding=1)
        self.second = nn.Conv3d(3, 4, 2, stride=2)
        self.last = nn.ConvTranspose3d(4, 3, 2, stride=2)

    def encode(self, x: Tensor) -> Sequence[Tensor]:
        fine = torch.relu(self.first(x))
        return torch.relu(self.second(fine)), fine

    def decode(self, features: Sequence[Tensor]) -> Tensor:
        deep, fine = features
        up: Tensor = self.last(deep)
        return up + fine


class TinyEncoder(nn.Module):
    factor, bottleneck_channels, encoder_keys = 2, 4, ("only",)

    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Conv3d(1, 4, 2, stride=2)

    def encode(self, x: Tensor) -> Sequence[Tensor]:
        return (self.only(x),)


@pytest.fixture(scope="module")
def own_run(
    stores: dict[tuple[int, int, int], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Tiny]:
    """Two steps with a net of one's own, in two calls; and that net."""
    torch.manual_seed(0)
    run, net = tmp_path_factory.mktemp("own") / "run", Tiny()
    for steps in (1, 2):
        pretrain(stores[16, 16, 16], run, dataclasses.replace(CONFIG, steps=steps), net=net)
    return run, net


class TestANetOfOnesOwn:
    def test_is_trained_on_a_copy_and_resumes_exactly(
        self,
        own_run: tuple[Path, Tiny],
        stores: dict[tuple[int, int, int], Path],
        tmp_path: Path,
    ) -> None:
        run, net = own_run
        before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
        pretrain(stores[16, 16, 16], tmp_path / "whole", CONFIG, net=net)
        assert_same_weights(run, tmp_path / "whole")
        trained = saved(run)["model"]
        assert all(torch.equal(net.state_dict()[key], tensor) for key, tensor in before.items())
        assert not any(torch.equal(trained[key], tensor) for key, tensor in before.items())

    def test_gets_its_trained_weights(self, own_run: tuple[Path, Tiny], tmp_path: Path) -> None:
        run, net = own_run[0], Tiny()
        export_weights(run, tmp_path / "w.safetensors", part="encoder")
        assert set(read_weights(tmp_path / "w.safetensors").tensors) == {
            "first.weight", "first.bias", "second.weight", "second.bias"}  # fmt: skip
        load_weights(net, tmp_path / "w.safetensors", part="encoder")
        trained = torch.load(run / "best.pt", weights_only=True)["model"]
        assert torch.equal(net.first.weight, trained["first.weight"])
        assert not torch.equal(net.last.weight, trained["last.weight"])

    def test_is_needed_to_resume(
        self, own_run: tuple[Path, Tiny], stores: dict[tuple[int, int, int], Path]
    ) -> None:
        store = stores[16, 16, 16]
        message = r"trains a net of your own, Tiny; resume it from Python"
        with pytest.raises(TrainError, match=message):
            pretrain(store, own_run[0], CONFIG)
        with pytest.raises(TrainError, match=message):
            pretrain(store, own_run[0], CONFIG, net=build_backbone("genesis", 1))

    def test_does_not_resume_a_run_of_a_named_net(
        self, runs: dict[NetName, Path], stores: dict[tuple[int, int, int], Path]
    ) -> None:
        with pytest.raises(TrainError, match="net: genesis -> None"):
            pretrain(stores[16, 16, 16], runs["genesis"], CONFIG, net=Tiny())

    @pytest.mark.parametrize("load", [load_unet, load_encoder])
    def test_cannot_be_built_from_a_file(self, own_run: tuple[Path, Tiny], load: Any) -> None:
        with pytest.raises(TrainError, match=r"weights of a net of your own \(Tiny\)"):
            load(own_run[0])

    def test_needs_no_decoder_for_a_task_with_its_own_head(
        self, stores: dict[tuple[int, int, int], Path], tmp_path: Path
    ) -> None:
        config = dataclasses.replace(CONFIG, pretext="rotation", steps=1)
        pretrain(stores[16, 16, 16], tmp_path / "run", config, net=TinyEncoder())
        message = "net TinyEncoder: decoded_channels must be a whole number.*got nothing"
        with pytest.raises(TrainError, match=message):
            pretrain(stores[16, 16, 16], tmp_path / "other", CONFIG, net=TinyEncoder())

    def test_without_a_decoder_in_use_keeps_only_its_encoder(
        self, stores: dict[tuple[int, int, int], Path], tmp_path: Path
    ) -> None:
        config = dataclasses.replace(CONFIG, pretext="rotation", steps=1)
        pretrain(stores[16, 16, 16], tmp_path / "run", config, net=Tiny())
        assert not any(key.startswith("last") for key in read_weights(tmp_path / "run").tensors)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"factor": 0}, "net Tiny: factor must be a whole number"),
            ({"bottleneck_channels": "4"}, "bottleneck_channels must be a whole number"),
            ({"encoder_keys": ["first"]}, "encoder_keys must be a tuple of text"),
            ({"encode": None}, "encode must be a method"),
            ({"decode": None}, "decode must be a method"),
            ({"encoder_keys": ("first",)}, "key second.weight belongs neither to encoder_keys"),
            ({"decoder_keys": ("last", "more")}, "no weight has a key that starts with 'more'"),
            ({"out_tr": nn.Conv3d(1, 1, 1)}, "key out_tr.weight is reserved for a head"),
        ],
    )
    def test_is_told_what_it_lacks(self, changes: dict[str, Any], message: str) -> None:
        net = Tiny()
        for name, value in changes.items():
            setattr(net, name, value)
        with pytest.raises(TrainError) as caught:
            check_protocol(net, decoder=True)
        assert message in str(caught.value)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"bottleneck_channels": 3}, "bottleneck_channels = 3; got (2, 4, 8, 8, 8)"),
            ({"decoded_channels": 4}, "decode must return (2, 4, 16, 16, 16) for crops"),
            ({"encode": lambda x: x}, "features as a tuple or list, got Tensor"),
            ({"encode": lambda x: (x.mean(),)}, "features 0 of encode must be (n, c, z, y, x)"),
        ],
    )
    def test_is_told_which_output_does_not_fit(self, changes: dict[str, Any], message: str) -> None:
        net = Tiny()
        for name, value in changes.items():
            setattr(net, name, value)
        with pytest.raises(TrainError) as caught:
            check_outputs(net, decoder=True)
        assert message in str(caught.value)
        assert net.training
