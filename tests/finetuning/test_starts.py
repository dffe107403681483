"""Starting points: nets of the published sizes, and weight files in the published layouts."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.support.synthetic_store import make_store
from trainer import TrainConfig, TrainError, export_weights, pretrain
from trainer.finetuning import FinetuneConfig
from trainer.finetuning.starts import make_start, rebuild
from trainer.nets.i3d import I3D
from trainer.nets.medicalnet import MedicalNet
from trainer.nets.registry import build_net

SHAPE = (16, 32, 32)
CUBES = torch.rand(2, 1, *SHAPE, generator=torch.Generator().manual_seed(0))


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def start(init: str | Path, *, segments: bool = True, outputs: int = 1, **more: object):
    config = FinetuneConfig(init=str(init), width=2, shape=SHAPE, **more)  # type: ignore[arg-type]
    return make_start(config, outputs=outputs, segments=segments)


# Architectures


@pytest.mark.parametrize(
    ("depth", "parameters"), [(10, 14_355_520), (18, 32_986_176), (50, 46_155_072)]
)
def test_medicalnet_has_the_published_size(depth: int, parameters: int) -> None:
    assert count(MedicalNet(depth)) == parameters


@pytest.mark.parametrize("depth", [10, 18, 50])
def test_the_deepest_features_of_medicalnet_have_an_eighth_of_the_resolution(depth: int) -> None:
    net = MedicalNet(depth).eval()
    with torch.no_grad():
        shapes = [tuple(f.shape[1:]) for f in net.encode(CUBES)]
    assert shapes == [
        (channels, *(side // factor for side in SHAPE))
        for channels, factor in zip(net.channels, (8, 8, 4, 2), strict=True)
    ]


def test_the_last_layer_of_medicalnet_is_dilated() -> None:
    kernels = [m for m in MedicalNet(10).layer4.modules() if isinstance(m, nn.Conv3d)]
    assert [m.dilation[0] for m in kernels if m.kernel_size[0] == 3] == [4, 4]


def test_i3d_has_the_published_size_and_resolutions() -> None:
    net = I3D().eval()
    colours = 2 * 64 * 7**3  # of the first kernel, whose channels are summed here
    assert count(net) + colours == 12_287_264
    with torch.no_grad():
        shapes = [tuple(f.shape[1:]) for f in net.encode(torch.rand(1, 1, 32, 64, 64))]
    assert shapes == [
        (1024, 4, 2, 2),
        (832, 8, 4, 4),
        (480, 16, 8, 8),
        (192, 16, 16, 16),
        (64, 16, 32, 32),
    ]


# Weight files as published


def published_medicalnet(depth: int) -> dict[str, Tensor]:
    """`module.` before keys, inside `state_dict`, no counters, as the authors saved them."""
    body = MedicalNet(depth).state_dict()
    return {f"module.{key}": t for key, t in body.items() if "num_batches" not in key}


def published_i3d() -> dict[str, Tensor]:
    """Three channels in, and the classifier of Kinetics."""
    tensors = I3D().state_dict()
    tensors["Conv3d_1a_7x7.conv3d.weight"] = 0.01 * torch.rand(64, 3, 7, 7, 7)
    tensors["logits.conv3d.weight"] = torch.rand(400, 1024, 1, 1, 1)
    tensors["logits.conv3d.bias"] = torch.rand(400)
    return tensors


@pytest.mark.parametrize("segments", [True, False])
@pytest.mark.parametrize("depth", [10, 18])
def test_medicalnet_loads(tmp_path: Path, depth: int, segments: bool) -> None:
    file = tmp_path / "resnet.pth"
    published = published_medicalnet(depth)
    torch.save({"state_dict": published}, file)
    started = start(f"medicalnet:{file}", segments=segments, outputs=3)
    ours = started.net.body.state_dict()
    assert all(torch.equal(ours[k.removeprefix("module.")], t) for k, t in published.items())
    shape = (2, 3, *SHAPE) if segments else (2, 3)
    assert started.net(CUBES).shape == shape


@pytest.mark.parametrize("segments", [True, False])
def test_i3d_loads(tmp_path: Path, segments: bool) -> None:
    file = tmp_path / "rgb_imagenet.pt"
    published = published_i3d()
    torch.save(published, file)
    started = start(f"i3d:{file}", segments=segments)
    ours = started.net.body.state_dict()
    first = "Conv3d_1a_7x7.conv3d.weight"
    assert torch.equal(ours[first], published[first].sum(1, keepdim=True))
    assert all(
        torch.equal(ours[k], t)
        for k, t in published.items()
        if k != first and not k.startswith("logits")
    )
    assert started.net(CUBES).shape == ((2, 1, *SHAPE) if segments else (2, 1))


def test_i3d_with_one_channel_equals_three_equal_channels() -> None:
    """Summing the first kernel's channels is the same as repeating the image."""
    weight, image = torch.rand(4, 3, 3, 3, 3), torch.rand(1, 1, 8, 8, 8)
    repeated = nn.functional.conv3d(image.expand(-1, 3, -1, -1, -1), weight)
    torch.testing.assert_close(nn.functional.conv3d(image, weight.sum(1, keepdim=True)), repeated)


@pytest.mark.parametrize("kind", ["medicalnet", "i3d"])
def test_the_error_for_a_missing_file_says_where_to_download_it(kind: str) -> None:
    with pytest.raises(TrainError, match=r"no such file; download .* of github\.com/"):
        start(f"{kind}:nowhere.pth")


@pytest.mark.parametrize("kind", ["medicalnet", "i3d"])
def test_a_file_of_another_net_is_refused(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "other.pth"
    torch.save({"fc.weight": torch.rand(2, 2)}, file)
    with pytest.raises(TrainError, match=r"missing:|no MedicalNet"):
        start(f"{kind}:{file}")


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    published = published_i3d()
    del published["Mixed_5c.b0.conv3d.weight"]
    torch.save(published, tmp_path / "i3d.pt")
    with pytest.raises(TrainError, match=r"missing: Mixed_5c\.b0\.conv3d\.weight$"):
        start(f"i3d:{tmp_path / 'i3d.pt'}")


# Weights of semgen


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    store = make_store(folder / "tiny.store", num_classes=3, num_train=4, num_validation=1)
    return {
        pretext: pretrain(
            store,
            folder / pretext,
            TrainConfig(width=2, batch_size=6, steps=2, shuffle_blocks=50, pretext=pretext),
        ).run
        for pretext in ("restoration", "none")
    }


def loaded_parts(net: nn.Module, run: Path) -> set[str]:
    """Parts of the net whose weights are those of the run."""
    saved = torch.load(run / "best.pt", weights_only=True)["model"]
    body = net.get_submodule("body").state_dict()
    same = {k: k in saved and torch.equal(t, saved[k]) for k, t in body.items() if t.ndim == 5}
    parts = {key.split(".")[0] for key in same}
    return {part for part in parts if all(v for k, v in same.items() if k.startswith(part))}


ENCODER = {"down_tr64", "down_tr128", "down_tr256", "down_tr512"}
DECODER = {"up_tr256", "up_tr128", "up_tr64"}


def test_segmentation_loads_encoder_and_decoder_of_a_run(runs: dict[str, Path]) -> None:
    assert loaded_parts(start(runs["restoration"]).net, runs["restoration"]) == ENCODER | DECODER


def test_init_part_encoder_loads_the_encoder_only(runs: dict[str, Path]) -> None:
    started = start(runs["restoration"], init_part="encoder")
    assert loaded_parts(started.net, runs["restoration"]) == ENCODER


def test_a_run_without_decoder_loads_its_encoder(runs: dict[str, Path]) -> None:
    assert loaded_parts(start(runs["none"]).net, runs["none"]) == ENCODER


def test_classification_loads_the_encoder_of_a_run(runs: dict[str, Path]) -> None:
    assert (
        loaded_parts(start(runs["restoration"], segments=False).net, runs["restoration"]) == ENCODER
    )


@pytest.mark.parametrize("format", ["safetensors", "torch", "genesis"])
def test_an_export_loads_the_same_parts_as_its_run(
    runs: dict[str, Path], tmp_path: Path, format: str
) -> None:
    export_weights(runs["restoration"], tmp_path / "weights", format=format)
    assert loaded_parts(start(tmp_path / "weights").net, runs["restoration"]) == ENCODER | DECODER


def test_kernels_of_an_official_checkpoint_are_transposed(tmp_path: Path) -> None:
    net = build_net(width=2)
    official = {
        f"module.{key}": t.permute(0, 1, 4, 3, 2) if t.ndim == 5 else t
        for key, t in net.state_dict().items()
    }
    torch.save({"epoch": 3, "state_dict": official}, tmp_path / "Genesis_Chest_CT.pt")
    body = start(tmp_path / "Genesis_Chest_CT.pt").net.get_submodule("body").state_dict()
    assert all(torch.equal(body[k], t) for k, t in net.state_dict().items() if k in body)


def test_weights_list_the_scans_that_they_were_pretrained_on(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    export_weights(runs["restoration"], tmp_path / "w.safetensors")
    known = start(tmp_path / "w.safetensors").scans
    assert known == start(runs["restoration"]).scans
    assert len(known) == 4
    assert all(len(name) == 16 and int(name, 16) >= 0 for name in known)


def test_initial_weights_depend_only_on_the_seed() -> None:
    state = torch.random.get_rng_state()
    one, same, other = start("scratch"), start("scratch"), start("scratch", seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    weight = "body.down_tr64.ops.0.conv1.weight"
    assert torch.equal(one.net.state_dict()[weight], same.net.state_dict()[weight])
    assert not torch.equal(one.net.state_dict()[weight], other.net.state_dict()[weight])


@pytest.mark.parametrize("segments", [True, False])
def test_the_net_is_rebuilt_from_a_checkpoint(tmp_path: Path, segments: bool) -> None:
    torch.save(published_medicalnet(10), tmp_path / "r.pth")
    torch.save(published_i3d(), tmp_path / "i.pt")
    for init in ("scratch", f"medicalnet:{tmp_path / 'r.pth'}", f"i3d:{tmp_path / 'i.pt'}"):
        started = start(init, segments=segments)
        net = rebuild(started.kind, started.net.state_dict(), outputs=1, segments=segments)
        torch.testing.assert_close(net(CUBES), started.net.eval()(CUBES))
