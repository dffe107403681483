"""Weights in and out of a run."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.synthetic_store import make_store
from trainer import TrainConfig, TrainError, export_weights, load_weights, pretrain, read_weights
from trainer.models import UNet3D, build_unet


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    store = make_store(folder / "tiny.store", num_classes=3, num_train=4, num_validation=1)
    config = TrainConfig(width=2, batch_size=6, steps=2, shuffle_blocks=50)
    return pretrain(store, folder / "run", config).run


@pytest.fixture
def net() -> UNet3D:
    return build_unet(width=2, num_classes=3, seed=99)


def same(net: UNet3D, run: Path, prefix: str = "") -> bool:
    saved = torch.load(run / "best.pt", weights_only=True)["model"]
    ours = net.state_dict()
    return all(torch.equal(ours[key], saved[key]) for key in saved if key.startswith(prefix))


@pytest.mark.parametrize("format", ["safetensors", "torch"])
def test_an_export_loads_back_exactly(run: Path, net: UNet3D, tmp_path: Path, format: str) -> None:
    export_weights(run, tmp_path / "weights", format=format)
    report = load_weights(net, tmp_path / "weights")
    assert same(net, run)
    assert set(report.loaded) == net.state_dict().keys()


def test_a_checkpoint_loads_like_an_export(run: Path, net: UNet3D) -> None:
    load_weights(net, run / "best.pt")
    assert same(net, run)


def test_safetensors_carry_what_one_must_know(run: Path, tmp_path: Path) -> None:
    export_weights(run, tmp_path / "w.safetensors")
    with safe_open(tmp_path / "w.safetensors", framework="pt") as archive:
        known = json.loads(archive.metadata()["semgen"])
    assert (known["width"], known["num_classes"], known["axes"]) == (2, 3, "z,y,x")
    assert known["fingerprint"] == torch.load(run / "best.pt", weights_only=True)["fingerprint"]


def test_an_export_has_the_same_bytes_each_time(run: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        export_weights(run, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_an_encoder_export_holds_the_encoder_only(run: Path, tmp_path: Path) -> None:
    export_weights(run, tmp_path / "e.safetensors", part="encoder")
    keys = load_file(tmp_path / "e.safetensors").keys()
    assert {key.split(".")[0] for key in keys} == {
        "down_tr64", "down_tr128", "down_tr256", "down_tr512"}  # fmt: skip


def test_the_encoder_alone_fits_another_head(run: Path) -> None:
    other = build_unet(width=2, num_classes=9, seed=4)
    head = other.clc_out.fc1.weight.clone()
    load_weights(other, run / "best.pt", part="encoder")
    assert same(other, run, "down_tr")
    assert torch.equal(other.clc_out.fc1.weight, head)


def test_every_key_that_does_not_fit_is_named(run: Path, net: UNet3D, tmp_path: Path) -> None:
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
    assert "misshapen: clc_out.fc1.bias (7,) for (3,)" in str(caught.value)


def test_a_refused_file_changes_nothing(run: Path) -> None:
    other = build_unet(width=2, num_classes=9, seed=4)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(TrainError, match="misshapen"):
        load_weights(other, run / "best.pt")
    assert all(torch.equal(before[key], value) for key, value in other.state_dict().items())


def test_without_strictness_what_fits_is_loaded_and_the_rest_reported(run: Path) -> None:
    other = build_unet(width=2, num_classes=9, seed=4)
    report = load_weights(other, run / "best.pt", strict=False)
    assert same(other, run, "up_tr")
    assert len(report.misshapen) == 2


class Bomb:
    """Unpickling this would call the function that fails the test."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return pytest.fail, ("code was executed",)


def test_a_file_that_would_execute_code_is_refused(net: UNet3D, tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": Bomb()}}, tmp_path / "bomb.pt")
    (tmp_path / "bomb.pkl").write_bytes(pickle.dumps(Bomb()))
    for name in ("bomb.pt", "bomb.pkl"):
        with pytest.raises(TrainError, match="cannot be read as either"):
            load_weights(net, tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"nothing of the kind", b"\x10" + bytes(7) + b"{broken"])
def test_a_file_that_is_no_weights_is_refused(net: UNet3D, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(TrainError, match="file"):
        load_weights(net, tmp_path / "file")


def test_a_missing_file_or_an_empty_run_is_told(net: UNet3D, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="no such file"):
        load_weights(net, tmp_path / "nowhere")
    with pytest.raises(TrainError, match="no checkpoint here"):
        export_weights(tmp_path, tmp_path / "out")
    with pytest.raises(TrainError, match="format must be one of"):
        export_weights(tmp_path, tmp_path / "out", format="onnx")
