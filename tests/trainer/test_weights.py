"""Weights in and out of a run."""

import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from store import SemgenError
from tests.support.synthetic_store import make_store
from trainer import (
    Event,
    Saved,
    TrainConfig,
    TrainError,
    export_weights,
    load_encoder,
    load_unet,
    load_weights,
    pretrain,
    read_weights,
)
from trainer.nets.pretraining import PretrainingNet
from trainer.nets.registry import PARTS, build_net


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    store = make_store(folder / "tiny.store", num_classes=3, num_train=4, num_validation=1)
    config = TrainConfig(width=2, batch_size=6, steps=2, shuffle_blocks=50)
    return pretrain(store, folder / "run", config).run


@pytest.fixture
def net() -> PretrainingNet:
    return build_net(width=2, num_classes=3, seed=99)


def same(net: PretrainingNet, run: Path, prefix: str = "") -> bool:
    saved = torch.load(run / "best.pt", weights_only=True)["model"]
    ours = net.state_dict()
    return all(torch.equal(ours[key], saved[key]) for key in saved if key.startswith(prefix))


@pytest.mark.parametrize("format", ["safetensors", "torch"])
def test_an_export_loads_back_exactly(
    run: Path, net: PretrainingNet, tmp_path: Path, format: str
) -> None:
    export_weights(run, tmp_path / "weights", format=format)
    report = load_weights(net, tmp_path / "weights")
    assert same(net, run)
    assert set(report.loaded) == net.state_dict().keys()


def test_a_checkpoint_loads_like_an_export(run: Path, net: PretrainingNet) -> None:
    load_weights(net, run / "best.pt")
    assert same(net, run)


def test_safetensors_hold_the_metadata(run: Path, tmp_path: Path) -> None:
    export_weights(run, tmp_path / "w.safetensors")
    with safe_open(tmp_path / "w.safetensors", framework="pt") as archive:
        known = json.loads(archive.metadata()["semgen"])
    assert (known["width"], known["num_classes"], known["axes"]) == (2, 3, "z,y,x")
    assert known["fingerprint"] == torch.load(run / "best.pt", weights_only=True)["fingerprint"]


def test_an_export_has_the_same_bytes_each_time(run: Path, tmp_path: Path) -> None:
    files = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for file in files:
        export_weights(run, file)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_export_reads_the_checkpoint_once(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, load = [], torch.load

    def watched(file: Path, **options: Any) -> Any:
        read.append(file)
        return load(file, **options)

    monkeypatch.setattr(torch, "load", watched)
    export_weights(run, tmp_path / "w.safetensors")
    assert read == [run / "best.pt"]


def test_an_encoder_export_holds_the_encoder_only(run: Path, tmp_path: Path) -> None:
    export_weights(run, tmp_path / "e.safetensors", part="encoder")
    keys = load_file(tmp_path / "e.safetensors").keys()
    assert {key.split(".")[0] for key in keys} == {
        "down_tr64", "down_tr128", "down_tr256", "down_tr512"}  # fmt: skip


def test_the_encoder_alone_fits_another_head(run: Path) -> None:
    other = build_net(width=2, num_classes=9, seed=4)
    head = other.clc_out.fc1.weight.clone()
    load_weights(other, run / "best.pt", part="encoder")
    assert same(other, run, "down_tr")
    assert torch.equal(other.clc_out.fc1.weight, head)


def test_every_key_that_does_not_fit_is_named(
    run: Path, net: PretrainingNet, tmp_path: Path
) -> None:
    saved = read_weights(run / "best.pt").tensors
    tensors = {key: value.contiguous() for key, value in saved.items()}
    del tensors["out_tr.final_conv.bias"]
    tensors["extra.weight"] = torch.zeros(1)
    tensors["clc_out.fc1.bias"] = torch.zeros(7)
    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(TrainError) as caught:
        load_weights(net, tmp_path / "odd.safetensors")
    assert "missing: out_tr.final_conv.bias" in str(caught.value)
    assert "unexpected: extra.weight" in str(caught.value)
    assert "wrong shape: clc_out.fc1.bias (7,) for (3,)" in str(caught.value)


def test_a_refused_file_does_not_change_the_net(run: Path) -> None:
    other = build_net(width=2, num_classes=9, seed=4)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(TrainError, match="wrong shape"):
        load_weights(other, run / "best.pt")
    assert all(torch.equal(before[key], value) for key, value in other.state_dict().items())


def test_without_strict_matching_keys_are_loaded_and_the_rest_reported(run: Path) -> None:
    other = build_net(width=2, num_classes=9, seed=4)
    report = load_weights(other, run / "best.pt", strict=False)
    assert same(other, run, "up_tr")
    assert len(report.wrong_shape) == 2


class Bomb:
    """Unpickling this would call the function that fails the test."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return pytest.fail, ("code was executed",)


def test_a_file_that_would_execute_code_is_refused(net: PretrainingNet, tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": Bomb()}}, tmp_path / "bomb.pt")
    (tmp_path / "bomb.pkl").write_bytes(pickle.dumps(Bomb()))
    for name in ("bomb.pt", "bomb.pkl"):
        with pytest.raises(TrainError, match="cannot be read as either"):
            load_weights(net, tmp_path / name)


@pytest.mark.parametrize(
    "content",
    [b"", b"nothing of the kind", b"\x10" + bytes(7) + b"{broken", b"http://a", b"total 3", b"a,b"],
)
def test_a_file_that_is_no_weights_is_refused(
    net: PretrainingNet, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(TrainError, match="file"):
        load_weights(net, tmp_path / "file")


def test_a_missing_file_and_an_empty_run_are_refused(net: PretrainingNet, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="no such run or weights file"):
        load_weights(net, tmp_path / "nowhere")
    with pytest.raises(TrainError, match="no checkpoint here"):
        export_weights(tmp_path, tmp_path / "out.pt")


class TestFormatOfAnExport:
    @pytest.mark.parametrize(
        ("name", "format"),
        [("w.safetensors", "safetensors"), ("w.pt", "torch"), ("w.pth", "torch")],
    )
    def test_its_suffix_chooses_it(self, run: Path, tmp_path: Path, name: str, format: str) -> None:
        export_weights(run, tmp_path / name)
        export_weights(run, tmp_path / "named", format=format)
        assert (tmp_path / name).read_bytes()[:8] == (tmp_path / "named").read_bytes()[:8]

    @pytest.mark.parametrize("name", ["weights", "weights.onnx"])
    def test_a_suffix_of_no_format_is_refused(self, run: Path, tmp_path: Path, name: str) -> None:
        with pytest.raises(TrainError, match=r"end the name in \.safetensors, \.pt, \.pth"):
            export_weights(run, tmp_path / name)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("name", "format"), [("w.pt", "safetensors"), ("w.safetensors", "torch"),
                             ("w.safetensors", "genesis")]
    )  # fmt: skip
    def test_a_suffix_that_contradicts_the_format_is_refused(
        self, run: Path, tmp_path: Path, name: str, format: str
    ) -> None:
        with pytest.raises(TrainError, match=f"the suffix contradicts format '{format}'"):
            export_weights(run, tmp_path / name, format=format)

    def test_an_unknown_format_is_refused(self, run: Path, tmp_path: Path) -> None:
        with pytest.raises(TrainError, match="format must be one of"):
            export_weights(run, tmp_path / "out", format="onnx")


@pytest.mark.parametrize("name", ["best.pt", "config.json"])
def test_an_export_never_replaces_a_file_of_its_run(run: Path, name: str) -> None:
    before = (run / name).read_bytes()
    with pytest.raises(TrainError, match="a file of a run"):
        export_weights(run, run / name, format="torch")
    assert (run / name).read_bytes() == before


def test_an_export_is_a_file_here(run: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="is a folder; give a FILE in it"):
        export_weights(run, tmp_path, format="torch")
    with pytest.raises(SemgenError, match="is a URL"):
        export_weights(run, "http://server/weights.pt")
    with pytest.raises(SemgenError, match="is a URL"):
        pretrain(tmp_path, "http://server/run")


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was left in the second of two epochs of warm-up."""
    return leave(tmp_path_factory.mktemp("data"), step=4)


@pytest.fixture(scope="module")
def beyond(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was left in the first joint epoch: its best.pt is of the warm-up."""
    run = leave(tmp_path_factory.mktemp("data"), step=8)
    best, last = (torch.load(run / name, weights_only=True) for name in ("best.pt", "last.pt"))
    assert (best["progress"]["joint"], last["progress"]["joint"]) == (False, True)
    return run


class TestARunInItsWarmUp:
    """The warm-up trains encoder and head; the decoder still has its random weights."""

    @pytest.mark.parametrize("part", ["all", "unet"])
    def test_its_decoder_is_not_exported(self, begun: Path, tmp_path: Path, part: str) -> None:
        with pytest.raises(TrainError, match=r"decoder is untrained: these weights are of step 3"):
            export_weights(begun, tmp_path / "w.safetensors", part=part)

    def test_its_encoder_is_exported(self, begun: Path, tmp_path: Path) -> None:
        export_weights(begun, tmp_path / "w.safetensors", part="encoder")
        assert load_encoder(tmp_path / "w.safetensors").state_dict().keys()

    @pytest.mark.parametrize("name", ["", "best.pt"])
    def test_its_decoder_is_not_loaded(self, begun: Path, net: PretrainingNet, name: str) -> None:
        for load in (load_unet, lambda file: load_weights(net, file, part="unet")):
            with pytest.raises(TrainError, match="decoder is untrained"):
                load(begun / name)
        load_weights(net, begun / name, part="encoder")
        assert same(net, begun, "down_tr")

    def test_before_the_first_joint_validation_the_last_weights_are_exported(
        self, beyond: Path, tmp_path: Path
    ) -> None:
        assert export_weights(beyond, tmp_path / "w.pt")["step"] == 8
        saved = torch.load(beyond / "last.pt", weights_only=True)["model"]
        exported = torch.load(tmp_path / "w.pt", weights_only=True)["state_dict"]
        assert all(torch.equal(exported[key], saved[key]) for key in saved)


def leave(folder: Path, *, step: int) -> Path:
    """A run of 3 steps an epoch and 2 epochs of warm-up, left when it saved `step`."""
    store = make_store(folder / "tiny.store", num_classes=3, num_train=4, num_validation=1)
    config = TrainConfig(
        width=2, batch_size=4, epochs=4, warmup_epochs=2, shuffle_blocks=50, checkpoint_every=1
    )

    class Left(Exception):
        pass

    def leave_it(event: Event) -> None:
        if isinstance(event, Saved) and event.step == step:
            raise Left

    with pytest.raises(Left):
        pretrain(store, folder / "run", config, on_event=leave_it)
    return folder / "run"


# The official checkpoints' layout


def official(width: int, num_classes: int | None, seed: int = 0) -> dict[str, Tensor]:
    """Random weights under the published keys, kernels (x, y, z), from the table alone."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / max(1, math.prod(shape[1:])) ** 0.5

    def convolution(name: str, *shape: int, bias: int) -> None:
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = draw(*shape), draw(bias)

    def norm(name: str, channels: int) -> None:
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = 1 + draw(channels), draw(channels)
        tensors[f"{name}.running_mean"] = draw(channels)
        tensors[f"{name}.running_var"] = draw(channels).abs()
        tensors[f"{name}.num_batches_tracked"] = torch.tensor(7)

    for block, channels in BLOCKS.items():
        a, b, c = (n if n == 1 else n * width // 32 for n in channels)
        if block.startswith("up"):
            up = UP_CHANNELS[block] * width // 32
            convolution(f"{block}.up_conv", up, up, 2, 2, 2, bias=up)
        for number, (into, out) in enumerate(((a, b), (b, c))):
            convolution(f"{block}.ops.{number}.conv1", out, into, 3, 3, 3, bias=out)
            norm(f"{block}.ops.{number}.bn1", out)
    convolution("out_tr.final_conv", 1, 2 * width, 1, 1, 1, bias=1)
    if num_classes is not None:
        convolution("clc_out.conv1", 32 * width, 16 * width, 3, 3, 3, bias=32 * width)
        norm("clc_out.bn1", 32 * width)
        convolution("clc_out.fc1", num_classes, 32 * width, bias=num_classes)
    return tensors


BLOCKS = {
    "down_tr64": (1, 32, 64),
    "down_tr128": (64, 64, 128),
    "down_tr256": (128, 128, 256),
    "down_tr512": (256, 256, 512),
    "up_tr256": (768, 256, 256),
    "up_tr128": (384, 128, 128),
    "up_tr64": (192, 64, 64),
}
UP_CHANNELS = {"up_tr256": 512, "up_tr128": 256, "up_tr64": 128}


def read_table(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Restored crop and class logits of crops (n, 1, X, Y, Z), as the table says."""

    def unit(name: str, x: Tensor) -> Tensor:
        x = F.conv3d(x, w[f"{name}.conv1.weight"], w[f"{name}.conv1.bias"], padding=1)
        return F.relu(
            F.batch_norm(x, None, None, w[f"{name}.bn1.weight"], w[f"{name}.bn1.bias"], True)
        )

    def both(name: str, x: Tensor) -> Tensor:
        return unit(f"{name}.ops.1", unit(f"{name}.ops.0", x))

    skips = []
    for block in ("down_tr64", "down_tr128", "down_tr256"):
        x = both(block, x)
        skips.append(x)
        x = F.max_pool3d(x, 2)
    x = bottleneck = both("down_tr512", x)
    for block in ("up_tr256", "up_tr128", "up_tr64"):
        name = f"{block}.up_conv"
        x = F.conv_transpose3d(x, w[f"{name}.weight"], w[f"{name}.bias"], stride=2)
        x = both(block, torch.cat((x, skips.pop()), dim=1))
    x = torch.sigmoid(F.conv3d(x, w["out_tr.final_conv.weight"], w["out_tr.final_conv.bias"]))
    features = unit("clc_out", bottleneck).mean((2, 3, 4))
    return x, F.linear(features, w["clc_out.fc1.weight"], w["clc_out.fc1.bias"])


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapped", [True, False])
def test_an_official_checkpoint_gives_the_outputs_of_the_published_net(
    tmp_path: Path, prefix: str, wrapped: bool
) -> None:
    tensors = official(4, 5)
    content = {prefix + key: tensor for key, tensor in tensors.items()}
    torch.save({"epoch": 3, "state_dict": content} if wrapped else content, tmp_path / "sg.pt")
    crops = torch.rand(3, 1, 32, 16, 24, generator=torch.Generator().manual_seed(1))  # x, y, z
    restored, logits = read_table(tensors, crops)
    ours = load_unet(tmp_path / "sg.pt")(crops.permute(0, 1, 4, 3, 2))
    torch.testing.assert_close(ours.restored.permute(0, 1, 4, 3, 2), restored, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.logits, logits, atol=1e-5, rtol=1e-4)


def test_the_published_width_has_the_published_weights() -> None:
    net = build_net(width=32, num_classes=44)
    published = {key: tuple(tensor.shape) for key, tensor in official(32, 44).items()}
    assert {key: tuple(tensor.shape) for key, tensor in net.state_dict().items()} == published
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 2) == 33.28


def test_models_genesis_weights_load_as_part_unet(tmp_path: Path, net: PretrainingNet) -> None:
    torch.save({"state_dict": official(2, None)}, tmp_path / "Genesis_Chest_CT.pt")
    with pytest.raises(TrainError, match=r"missing: clc_out\.conv1\.weight.*part \"unet\""):
        load_weights(net, tmp_path / "Genesis_Chest_CT.pt")
    report = load_weights(net, tmp_path / "Genesis_Chest_CT.pt", part="unet")
    assert {key.split(".")[0] for key in net.state_dict()} - {
        key.split(".")[0] for key in report.loaded
    } == {"clc_out"}
    assert load_unet(tmp_path / "Genesis_Chest_CT.pt").num_classes is None


def test_a_tensor_of_no_part_is_refused_for_each_part(tmp_path: Path, net: PretrainingNet) -> None:
    tensors = official(2, 3) | {"foo.bar": torch.zeros(3)}
    torch.save({"state_dict": tensors}, tmp_path / "extra.pt")
    for part in PARTS:
        with pytest.raises(TrainError, match=r"unexpected: foo\.bar"):
            load_weights(net, tmp_path / "extra.pt", part=part)
    with pytest.raises(TrainError, match=r"unexpected: foo\.bar"):
        load_encoder(tmp_path / "extra.pt")


def test_the_axes_of_an_official_encoder_are_reversed(tmp_path: Path) -> None:
    torch.save({"state_dict": official(2, 3)}, tmp_path / "sg.pt")
    crops = torch.rand(2, 1, 8, 16, 24)
    features = load_encoder(tmp_path / "sg.pt")(crops)
    assert features.shape == (2, 32, 1, 2, 3)
    torch.testing.assert_close(features, load_unet(tmp_path / "sg.pt").encode(crops)[0])


def test_a_genesis_export_is_what_the_official_code_loads(run: Path, tmp_path: Path) -> None:
    export_weights(run, tmp_path / "genesis.pt", format="genesis")
    content = torch.load(tmp_path / "genesis.pt", weights_only=True)["state_dict"]
    expected = official(2, 3)
    assert {k: t.shape for k, t in content.items()} == {k: t.shape for k, t in expected.items()}
    crops = torch.rand(3, 1, 32, 16, 24)  # x, y, z
    restored, logits = read_table(content, crops)
    net = load_unet(run / "best.pt").train()  # the official code uses the batch's statistics
    ours = net(crops.permute(0, 1, 4, 3, 2))
    torch.testing.assert_close(ours.restored.permute(0, 1, 4, 3, 2), restored, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.logits, logits, atol=1e-5, rtol=1e-4)


def test_a_genesis_export_keeps_the_scans_it_was_trained_on(run: Path, tmp_path: Path) -> None:
    export_weights(run, tmp_path / "genesis.pt", format="genesis")
    known, exported = (read_weights(file).metadata for file in (run, tmp_path / "genesis.pt"))
    assert known["scans"]
    assert {**exported, "axes": known["axes"]} == known


def test_a_genesis_export_loads_back_exactly(
    run: Path, net: PretrainingNet, tmp_path: Path
) -> None:
    export_weights(run, tmp_path / "genesis.pt", format="genesis")
    load_weights(net, tmp_path / "genesis.pt")
    assert same(net, run)
    assert same(load_unet(tmp_path / "genesis.pt"), run)  # with the statistics of the training


@pytest.mark.parametrize("format", ["safetensors", "torch"])
def test_loaded_nets_have_the_documented_outputs(run: Path, tmp_path: Path, format: str) -> None:
    export_weights(run, tmp_path / "weights", format=format)
    crops = torch.rand(2, 1, 16, 24, 32)
    restored, logits, _ = load_unet(tmp_path / "weights")(crops)
    assert (restored.shape, logits.shape) == (crops.shape, (2, 3))
    features = load_encoder(tmp_path / "weights")(crops)
    assert features.shape == (2, 32, 2, 3, 4)
    assert same(load_unet(tmp_path / "weights"), run)


def test_an_encoder_comes_from_an_export_of_the_encoder(run: Path, tmp_path: Path) -> None:
    export_weights(run, tmp_path / "encoder.pt", part="encoder")
    assert not load_encoder(tmp_path / "encoder.pt").training
    assert load_unet(tmp_path / "encoder.pt")(torch.rand(2, 1, 8, 8, 8)) == (None, None, None)


def test_weights_of_another_kind_of_net_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"layer1.weight": torch.zeros(3)}}, tmp_path / "resnet.pth")
    with pytest.raises(TrainError, match=r"not U-Net weights; expected keys such as down_tr64"):
        load_unet(tmp_path / "resnet.pth")


def test_a_checkpoint_of_every_task_gives_a_unet_or_an_encoder(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", num_classes=2, num_train=4, num_validation=1)
    for pretext in ("rotation", "inpainting"):
        config = TrainConfig(width=2, batch_size=4, steps=1, pretext=pretext, classify=False)
        run = pretrain(store, tmp_path / pretext, config).run
        assert load_encoder(run / "best.pt")(torch.rand(1, 1, 8, 8, 8)).shape == (1, 32, 1, 1, 1)
        output = load_unet(run / "best.pt")(torch.rand(1, 1, 8, 8, 8))
        assert (output.restored is None) == (pretext == "rotation")
