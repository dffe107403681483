"""The training recipe: optimisers, schedules, clipping, average of the weights, recomputation."""

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from store.settings import to_json
from tests.support.runs import assert_same_run, read_metrics, tiny
from trainer import Event, Stepped, TrainConfig, TrainError, pretrain
from trainer.config import find_differences
from trainer.nets.pretraining import PretrainingNet
from trainer.nets.registry import build_net
from trainer.recipe import (
    Average,
    clip_gradient,
    learning_rate_at,
    make_optimiser,
    resume_optimiser,
)
from trainer.recompute import recompute_stages

CPU = torch.device("cpu")
RECIPES: dict[str, dict[str, Any]] = {
    "adam": {},
    "sgd": {
        "optimiser": "sgd", "lr_schedule": "poly", "learning_rate": 0.01, "clip_norm": 12.0,
        "lr_warmup_steps": 2,
    },
    "adamw": {
        "optimiser": "adamw", "lr_schedule": "cosine", "lr_warmup_steps": 3, "ema_decay": 0.9,
        "recompute": True,
    },
}  # fmt: skip


class Interrupted(Exception):
    """Stands for a kill."""


def load(run: Path, name: str = "last.pt") -> dict[str, Any]:
    content: dict[str, Any] = torch.load(run / name, weights_only=True)
    return content


# Optimisers


def one_step(net: nn.Module, config: TrainConfig) -> dict[str, Tensor]:
    """The change of each parameter in a step whose gradient is zero: decay alone."""
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimiser = make_optimiser(net, config, CPU)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    return {name: p.detach() - before[name] for name, p in net.named_parameters()}


def test_adamw_decays_kernels_but_neither_norms_nor_biases() -> None:
    net = build_net(width=2, num_classes=3)
    config = TrainConfig(optimiser="adamw", learning_rate=0.1, weight_decay=0.5)
    kernels = {name for name, p in net.named_parameters() if p.ndim > 1}
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    for name, change in one_step(net, config).items():
        expected = -0.05 * weights[name] if name in kernels else torch.zeros_like(change)
        torch.testing.assert_close(change, expected, msg=name)
    assert {"backbone.down_tr64.ops.0.conv1.weight", "clc_out.fc1.weight"} <= kernels


@pytest.mark.parametrize(("name", "decay"), [("adam", 0.0), ("adamw", 0.05), ("sgd", 3e-5)])
def test_each_optimiser_has_its_own_default_of_weight_decay(name: Any, decay: float) -> None:
    net = build_net(width=1)
    groups = make_optimiser(net, TrainConfig(optimiser=name), CPU).param_groups
    assert groups[0]["weight_decay"] == decay
    assert sum(len(group["params"]) for group in groups) == len(list(net.parameters()))


def test_sgd_is_that_of_nnunet() -> None:
    group = make_optimiser(build_net(width=1), TrainConfig(optimiser="sgd"), CPU).param_groups[0]
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.99, True, 3e-5)


def test_a_resumed_optimiser_stays_as_fused_as_its_device_wants() -> None:
    """A CPU's checkpoint must not make a GPU slow, nor the reverse."""
    net = build_net(width=1)
    optimiser = make_optimiser(net, TrainConfig(optimiser="adamw"), CPU)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    state = copy.deepcopy(optimiser.state_dict())
    for group in state["param_groups"]:
        group.update(fused=True, lr=0.5)
    resumed = make_optimiser(net, TrainConfig(optimiser="adamw"), CPU)
    resume_optimiser(resumed, state)
    assert [group["fused"] for group in resumed.param_groups] == [False, False]
    assert [group["lr"] for group in resumed.param_groups] == [0.5, 0.5]
    assert len(resumed.state) == len(optimiser.state)


@pytest.mark.parametrize(("limit", "norm"), [(None, 50.0), (12.0, 12.0), (100.0, 50.0)])
def test_a_long_gradient_is_shortened_and_a_short_one_is_not(
    limit: float | None, norm: float
) -> None:
    net = nn.Linear(2, 1, bias=False)
    net.weight.grad = torch.tensor([[30.0, 40.0]])
    clip_gradient(net, TrainConfig(clip_norm=limit))
    assert net.weight.grad.norm() == pytest.approx(norm)
    assert net.weight.grad[0, 1] / net.weight.grad[0, 0] == pytest.approx(4 / 3)


# Learning rate


def rates(num_steps: int, **settings: Any) -> list[float]:
    config = TrainConfig(learning_rate=1.0, **settings)
    return [
        learning_rate_at(config, step, num_steps=num_steps, num_cuts=0) for step in range(num_steps)
    ]


def test_poly_is_that_of_nnunet() -> None:
    assert rates(10, lr_schedule="poly") == pytest.approx([(1 - s / 10) ** 0.9 for s in range(10)])


def test_cosine_falls_from_the_highest_to_the_lowest_rate() -> None:
    found = rates(100, lr_schedule="cosine", lr_minimum=0.2)
    assert found[0] == 1.0
    assert found[50] == pytest.approx(0.6)
    assert found[25] == pytest.approx(0.2 + 0.4 * (1 + math.sqrt(0.5)))
    assert 0.2 < found[-1] < 0.201
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize("schedule", ["step", "poly", "cosine"])
def test_the_rate_rises_linearly_and_falls_only_then(schedule: str) -> None:
    found = rates(20, lr_schedule=schedule, lr_warmup_steps=4)
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert found[4:] == pytest.approx(rates(16, lr_schedule=schedule))


def test_both_phases_fall_to_the_end_of_their_own_steps(store: Path, tmp_path: Path) -> None:
    config = tiny(lr_schedule="poly", log_every=1, warmup_epochs=1, epochs=3)
    pretrain(store, tmp_path / "run", config)
    found = [m["learning_rate"] for m in read_metrics(tmp_path / "run") if m["kind"] == "train"]
    expected = [1e-3 * (1 - step / num) ** 0.9 for num in (5, 10) for step in range(num)]
    assert found == pytest.approx(expected)


# Average of the weights


def test_the_average_is_that_of_all_steps() -> None:
    net = nn.BatchNorm3d(1)
    average, expected = Average(net, 0.5), 1.0
    for step in range(1, 30):
        with torch.no_grad():
            net.weight.fill_(float(step))
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert average.state_dict()["weight"].item() == pytest.approx(expected)
    with average.swapped():
        assert net.weight.item() == pytest.approx(expected)
    assert net.weight.item() == 29.0
    assert average.state_dict()["weight"].item() == pytest.approx(expected)


def test_two_names_of_one_tensor_are_averaged_once() -> None:
    net = nn.ModuleDict({"one": (shared := nn.Linear(1, 1)), "other": shared})
    average = Average(net, 0.9)
    with torch.no_grad():
        shared.weight.add_(1)
    average.update(1)
    found = average.state_dict()
    assert found["one.weight"] is found["other.weight"]
    change = found["one.weight"] - (shared.weight - 1)
    assert change.item() == pytest.approx(1 - 2 / 11)


def test_validation_and_the_exported_weights_are_the_average(store: Path, tmp_path: Path) -> None:
    config = tiny(pretext="none", epochs=2, ema_decay=0.9)
    pretrain(store, tmp_path / "run", config)
    pretrain(store, tmp_path / "plain", dataclasses.replace(config, ema_decay=None))
    saved, plain = load(tmp_path / "run"), load(tmp_path / "plain")
    assert "trained" not in plain
    key = "down_tr64.ops.0.conv1.weight"
    assert torch.equal(saved["trained"][key], plain["model"][key])
    assert not torch.equal(saved["model"][key], plain["model"][key])
    validation, expected = (
        [line["loss"] for line in read_metrics(tmp_path / name) if line["kind"] == "validation"]
        for name in ("run", "plain")
    )
    assert not set(validation) & set(expected)
    again = tiny(pretext="none", init=str(tmp_path / "run/last.pt"), learning_rate=1e-30, steps=1)
    summary = pretrain(store, tmp_path / "again", again)  # batch norm has seen a batch more
    started = load(tmp_path / "again")["model"]
    assert torch.equal(started[key], saved["model"][key])
    assert summary.last["loss"] == pytest.approx(validation[-1], rel=0.05)


# Resume


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_resumes_bit_for_bit(store: Path, tmp_path: Path, recipe: str) -> None:
    config = tiny(pretext="mae", epochs=2, checkpoint_every=2, **RECIPES[recipe])
    moments = [4, 8]  # in the warm-up and in the joint phase

    def interrupt(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == moments[0]:
            raise Interrupted

    pretrain(store, tmp_path / "whole", config)
    while moments:
        with pytest.raises(Interrupted):
            pretrain(store, tmp_path / "run", config, on_event=interrupt)
        moments.pop(0)
    pretrain(store, tmp_path / "run", config)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    ours, theirs = (load(tmp_path / name).get("trained", {}) for name in ("run", "whole"))
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    assert bool(theirs) == ("ema_decay" in RECIPES[recipe])


def test_a_run_of_before_these_settings_can_be_resumed() -> None:
    new = {"optimiser", "momentum", "weight_decay", "clip_norm", "ema_decay", "lr_warmup_steps",
           "mask_ratio", "mask_block", "recompute"}  # fmt: skip
    saved = {name: value for name, value in to_json(tiny()).items() if name not in new}
    assert find_differences(saved, tiny()) == []
    assert find_differences(saved, tiny(optimiser="sgd", recompute=True)) == [
        "optimiser: adam -> sgd"
    ]


# Recomputation


@pytest.mark.parametrize("kind", ["genesis", "resenc-s"])
def test_recomputed_activations_give_the_same_gradients_and_statistics(kind: Any) -> None:
    crops, found = torch.rand(2, 1, 8, 16, 16), []
    for recompute in (False, True):
        net = build_net(kind, width=2, num_classes=3).train()
        if recompute:
            recompute_stages(net.stages())
        kept: list[int] = []

        def count(tensor: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            output = net(crops)
        (output.restored.square().mean() + output.logits.square().mean()).backward()
        found.append((net, sum(kept)))
    (plain, much), (recomputed, little) = found
    assert little < much / 2
    for (name, ours), theirs in zip(recomputed.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name
    assert plain.state_dict().keys() == recomputed.state_dict().keys()
    for (name, ours), theirs in zip(recomputed.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs), name


def test_recomputing_a_net_without_stages_is_refused(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PretrainingNet, "stages", lambda net: [])
    with pytest.raises(TrainError, match="recompute needs a net with a method stages"):
        pretrain(store, tmp_path / "run", tiny(recompute=True))
