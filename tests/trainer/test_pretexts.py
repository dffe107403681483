"""Pretext tasks: perturbations, labels and losses."""

import itertools
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import l1_loss

from tests.support.runs import assert_same_run, read_metrics, tiny
from trainer import Event, Interrupted, Saved, TrainError, pretrain
from trainer.config import PretextName, TrainConfig
from trainer.nets.pretraining import Output
from trainer.nets.registry import build_net
from trainer.nets.subcubes import join_subcubes, split_subcubes
from trainer.pretexts import PRETEXTS, Example, Pretext
from trainer.transforms.draws import Draws
from trainer.transforms.rotate import find_rotations, rotate
from trainer.transforms.rubik import find_permutations, scramble_rubik
from trainer.transforms.swap import swap_patches
from trainer.weights import read_weights

SHAPE = (16, 32, 32)
NUMBERS = torch.arange(16.0 * 32 * 32).reshape(1, 1, *SHAPE)


def draws(num: int, *key: int) -> Draws:
    return Draws.keyed(0, "test", *key, rows=range(num))


def many(num: int) -> Tensor:
    """Crops whose values are the numbers of their voxels."""
    return NUMBERS.expand(num, -1, -1, -1, -1)


class TestEveryTask:
    @pytest.fixture(params=PRETEXTS)
    def task(self, request: pytest.FixtureRequest) -> Pretext:
        return PRETEXTS[request.param](SHAPE, TrainConfig(shuffle_blocks=200))

    def test_the_perturbation_of_a_crop_does_not_depend_on_its_batch(self, task: Pretext) -> None:
        crops = torch.rand(6, 1, *SHAPE)
        whole = task.perturb(crops, Draws.keyed(3, "train", 1, rows=[7, 2, 9, 4, 0, 5]))
        part = task.perturb(crops[2:4], Draws.keyed(3, "train", 1, rows=[9, 4]))
        assert torch.equal(whole.inputs[2:4], part.inputs)
        assert torch.equal(whole.target[2:4], part.target)

    def test_perturbing_does_not_change_the_crops(self, task: Pretext) -> None:
        crops = torch.rand(4, 1, *SHAPE)
        before = crops.clone()
        task.perturb(crops, draws(4)).inputs.zero_()
        assert torch.equal(crops, before)

    def test_the_loss_trains_the_head_and_the_encoder(self, task: Pretext) -> None:
        net = build_net(
            width=2,
            num_classes=3,
            decoder=task.decodes,
            head=task.make_head,
            parts_per_axis=task.parts_per_axis,
        )
        example = task.perturb(torch.rand(4, 1, *SHAPE), draws(4))
        output = net(example.inputs)
        assert output.logits is not None
        assert output.logits.shape == (4, 3)
        loss = task.loss(output, example)
        assert (loss is None) == (task.metric is None)
        if loss is not None:
            loss.backward()  # type: ignore[no-untyped-call]
            head = net.backbone.up_tr64 if task.decodes else net.pretext_out
            assert head is not None
            assert all(p.grad is not None and p.grad.any() for p in head.parameters())
            assert net.backbone.down_tr64.ops[0].conv1.weight.grad.any()
        assert all(0 <= value <= 1 for value in task.measure(output, example).values())

    def test_the_loss_of_perfect_predictions_is_almost_zero(self, task: Pretext) -> None:
        example = task.perturb(torch.rand(4, 1, *SHAPE), draws(4))
        output = Output(restored=example.target)
        if task.metric == "rotation":
            output = Output(
                pretext_logits=50 * torch.nn.functional.one_hot(example.target, 8).float()
            )
        elif task.metric == "rubik":
            order = torch.nn.functional.one_hot(example.target[:, 0], 100).float()
            output = Output(
                pretext_logits=50 * torch.cat((order, example.target[:, 1:] * 2 - 1), dim=1)
            )
        if task.metric:
            loss = task.loss(output, example)
            assert loss is not None
            assert loss < 1e-6
            assert all(value == 1 for value in task.measure(output, example).values())


class TestPatchSwaps:
    @staticmethod
    def slow(crop: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """The published loop: ten times, two small disjoint patches change places."""
        crop = crop.copy()
        for _ in range(10):
            side = [int(generator.integers(n // 8, n // 4 + 1)) for n in crop.shape]
            while True:
                one, two = (
                    [int(generator.integers(0, n - s + 1)) for n, s in zip(crop.shape, side)]
                    for _ in range(2)
                )
                if any(abs(a - b) >= s for a, b, s in zip(one, two, side, strict=True)):
                    break
            first, second = (
                tuple(slice(a, a + s) for a, s in zip(corner, side, strict=True))
                for corner in (one, two)
            )
            crop[first], crop[second] = crop[second].copy(), crop[first].copy()
        return crop

    def test_changes_as_many_voxels_as_the_loop(self) -> None:
        generator = np.random.default_rng(0)
        numbers = NUMBERS[0, 0].numpy()
        slow = [(self.slow(numbers, generator) != numbers).mean() for _ in range(300)]
        fast = (swap_patches(many(300), draws(300)) != NUMBERS).float().mean((1, 2, 3, 4))
        assert fast.mean() == pytest.approx(np.mean(slow), rel=0.04)
        assert fast.std() == pytest.approx(np.std(slow), rel=0.2)

    def test_no_voxel_is_lost_or_doubled(self) -> None:
        swapped = swap_patches(many(50), draws(50))
        assert torch.equal(swapped.flatten(1).sort().values, NUMBERS.flatten().expand(50, -1))

    def test_one_swap_exchanges_two_boxes(self) -> None:
        for swapped in swap_patches(many(40), draws(40, 1), num_swaps=1)[:, 0]:
            moved = torch.nonzero(swapped != NUMBERS[0, 0])
            shift = swapped[tuple(moved.T)] - NUMBERS[0, 0][tuple(moved.T)]
            assert len(shift.unique()) == 2  # there, and back
            assert shift.sum() == 0
            one = moved[shift > 0]
            sides = one.max(0).values - one.min(0).values + 1
            assert sides.prod() == len(one)
            assert (sides >= torch.tensor([2, 4, 4])).all()
            assert (sides <= torch.tensor([4, 8, 8])).all()


class TestRotation:
    @pytest.mark.parametrize(
        ("shape", "num"), [((8, 8, 8), 24), ((16, 32, 32), 8), ((8, 16, 24), 4)]
    )
    def test_every_rotation_of_a_box_is_drawn(self, shape: tuple[int, ...], num: int) -> None:
        numbers = torch.arange(float(np.prod(shape))).reshape(1, 1, *shape)
        turned, chosen = rotate(numbers.expand(400, -1, -1, -1, -1), draws(400))
        assert len(find_rotations(shape)) == num
        assert sorted(set(chosen.tolist())) == list(range(num))
        different = {tuple(crop.flatten().tolist()) for crop in turned}
        assert len(different) == num

    def test_rotations_are_not_mirror_images(self) -> None:
        # An arrow along each axis: a rotation keeps their handedness.
        for axes, flips in find_rotations((8, 8, 8)):
            arrows = np.eye(3)[list(axes)]
            arrows[list(flips)] *= -1
            assert np.linalg.det(arrows) == pytest.approx(1)

    def test_rotation_number_zero_changes_nothing(self) -> None:
        turned, chosen = rotate(many(40), draws(40))
        assert torch.equal(turned[chosen == 0], many(int((chosen == 0).sum())))

    def test_in_plane_quarter_turns_are_those_of_numpy(self) -> None:
        turned, _ = rotate(many(100), draws(100))
        plain = NUMBERS[0, 0].numpy()
        known = {crop[0].numpy().tobytes() for crop in turned}
        for quarters in range(4):
            assert np.ascontiguousarray(np.rot90(plain, quarters, (1, 2))).tobytes() in known

    def test_all_rotations_are_equally_likely(self) -> None:
        _, chosen = rotate(torch.zeros(4000, 1, 2, 4, 4), draws(4000))
        share = torch.bincount(chosen, minlength=8) / 4000
        torch.testing.assert_close(share, torch.full((8,), 1 / 8), atol=0.02, rtol=0)


class TestRubik:
    def test_orders_are_far_apart(self) -> None:
        orders = find_permutations(100).numpy()
        assert (np.sort(orders, 1) == np.arange(8)).all()
        distance = (orders[:, None] != orders[None]).sum(2)
        nearest = distance[~np.eye(100, dtype=bool)].min()
        random = np.random.default_rng(0).permuted(np.tile(np.arange(8), (100, 1)), axis=1)
        of_random = (random[:, None] != random[None]).sum(2)[~np.eye(100, dtype=bool)]
        assert nearest >= 5 > of_random.min()
        assert distance[~np.eye(100, dtype=bool)].mean() >= of_random.mean()

    def test_a_scrambled_crop_can_be_restored_from_its_labels(self) -> None:
        scrambled, chosen, rotated = scramble_rubik(many(30), draws(30), num_orders=100)
        parts = split_subcubes(scrambled, 2).reshape(30, 8, 8, 16, 16)
        plain = split_subcubes(NUMBERS, 2)[:, 0]  # (8, z, y, x)
        for crop, order, turned in zip(parts, find_permutations(100)[chosen], rotated, strict=True):
            for place, source in enumerate(order.tolist()):
                part = crop[place]
                ways = [part.flip((1, 2)), part.flip((0, 2))] if turned[place] else [part]
                assert any(torch.equal(way, plain[source]) for way in ways)

    def test_half_of_the_parts_are_rotated_about_either_axis(self) -> None:
        crops = torch.arange(64.0).reshape(1, 1, 4, 4, 4).expand(1000, -1, -1, -1, -1)
        _, chosen, rotated = scramble_rubik(crops, draws(1000), num_orders=100)
        assert rotated.float().mean() == pytest.approx(0.5, abs=0.02)
        assert len(set(chosen.tolist())) == 100

    def test_every_block_is_encoded_alone(self) -> None:
        net = build_net(
            width=1, decoder=False, parts_per_axis=2, head=lambda _: torch.nn.Identity()
        ).eval()
        crops = torch.rand(2, 1, *SHAPE)
        whole = net(crops).pretext_logits
        first = net.encode(crops[:, :, :8, :16, :16])[0]
        torch.testing.assert_close(whole[:, :, :1, :2, :2], first)
        changed = crops.clone()
        changed[:, :, 8:, :, :] += 1
        torch.testing.assert_close(net(changed).pretext_logits[:, :, :1], whole[:, :, :1])

    def test_joining_blocks_undoes_splitting(self) -> None:
        crops = torch.rand(2, 3, 4, 6, 8)
        parts = split_subcubes(crops, 2)
        assert parts.shape == (16, 3, 2, 3, 4)
        for number, (z, y, x) in enumerate(itertools.product((0, 1), repeat=3)):
            expected = crops[0, :, 2 * z : 2 * z + 2, 3 * y : 3 * y + 3, 4 * x : 4 * x + 4]
            assert torch.equal(parts[number], expected)
        assert torch.equal(join_subcubes(parts, 2), crops)


def test_every_task_has_a_name_in_the_settings_and_every_name_a_task() -> None:
    assert set(PRETEXTS) == set(get_args(PretextName))


class Denoising(Pretext):
    """A task of one's own."""

    metric, decodes, classification_weight = "denoising", True, 0.01

    def perturb(self, crops: Tensor, draws: Draws) -> Example:
        noisy = crops + 0.1 * draws.normal(*crops.shape[1:])
        return Example(noisy.clamp(0, 1), crops)

    def loss(self, output: Output, example: Example) -> Tensor:
        assert output.restored is not None
        return l1_loss(output.restored, example.target)


class TestATaskOfOnesOwn:
    def test_it_trains_and_a_stopped_run_resumes_to_the_same_weights(
        self, store: Path, tmp_path: Path
    ) -> None:
        def stop(event: Event) -> None:
            if isinstance(event, Saved) and event.step == 8:
                raise Interrupted

        pretrain(store, tmp_path / "whole", tiny(), pretext=Denoising)
        with pytest.raises(Interrupted):
            pretrain(store, tmp_path / "run", tiny(), pretext=Denoising, on_event=stop)
        pretrain(store, tmp_path / "run", tiny(), pretext=Denoising)
        assert_same_run(tmp_path / "run", tmp_path / "whole")
        losses = [line["denoising"] for line in read_metrics(tmp_path / "whole")[-2:]]
        assert all(0 < loss < 1 for loss in losses)
        assert read_weights(tmp_path / "run").metadata["pretext"] == "Denoising"

    def test_the_command_line_does_not_resume_it_with_another_task(
        self, store: Path, tmp_path: Path
    ) -> None:
        pretrain(store, tmp_path / "run", tiny(steps=1, warmup_epochs=0), pretext=Denoising)
        with pytest.raises(TrainError, match=r"pretext task of your own, Denoising; resume it"):
            pretrain(store, tmp_path / "run", tiny(steps=2, warmup_epochs=0))

    def test_it_needs_to_be_given_where_no_task_is_named(self, store: Path, tmp_path: Path) -> None:
        with pytest.raises(TrainError, match="pretext is None: name a task"):
            pretrain(store, tmp_path / "run", tiny(pretext=None))
