"""Perturbations, against slow and obvious versions of their published definitions."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from trainer.transforms.draws import Draws
from trainer.transforms.elastic import deform, displace, draw_displacement
from trainer.transforms.genesis import draw_kinds, perturb_genesis
from trainer.transforms.intensity import draw_curves, nonlinear_intensity
from trainer.transforms.paint import inpaint, outpaint
from trainer.transforms.shuffle import shuffle_pixels

SHAPE = (32, 64, 64)
NUMBERS = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
NUM_BLOCKS = 10_000
ALL = (
    deform,
    partial(shuffle_pixels, num_blocks=NUM_BLOCKS),
    nonlinear_intensity,
    inpaint,
    outpaint,
    partial(perturb_genesis, num_blocks=NUM_BLOCKS),
)


def draws(num: int, *key: int) -> Draws:
    return Draws.keyed(0, "test", *key, rows=range(num))


@pytest.fixture(scope="module")
def crops() -> Tensor:
    """(4, 1, 32, 64, 64) smooth structure in [0, 1], different in every crop."""
    generator = np.random.default_rng(0)
    smooth = ndimage.gaussian_filter(generator.normal(size=(4, *SHAPE)), (0, 3, 3, 3))
    low, high = smooth.min(), smooth.max()
    return torch.from_numpy(((smooth - low) / (high - low)).astype(np.float32))[:, None]


@pytest.mark.parametrize("change", ALL)
class TestEveryPerturbation:
    def test_does_not_change_its_input(
        self, change: Callable[[Tensor, Draws], Tensor], crops: Tensor
    ) -> None:
        before = crops.clone()
        changed = change(crops, draws(4))
        assert torch.equal(crops, before)
        assert changed.data_ptr() != crops.data_ptr()

    def test_depends_on_its_key_alone(
        self, change: Callable[[Tensor, Draws], Tensor], crops: Tensor
    ) -> None:
        torch.manual_seed(0)
        one = change(crops, draws(4, 1))
        torch.manual_seed(1)
        assert torch.equal(one, change(crops, draws(4, 1)))

    def test_differs_for_another_key(
        self, change: Callable[[Tensor, Draws], Tensor], crops: Tensor
    ) -> None:
        assert not torch.equal(change(crops, draws(4, 1)), change(crops, draws(4, 2)))

    def test_treats_crops_of_a_batch_differently(
        self, change: Callable[[Tensor, Draws], Tensor], crops: Tensor
    ) -> None:
        twins = change(crops[:1].expand(4, -1, -1, -1, -1), draws(4, 3))
        assert not torch.equal(twins[0], twins[1])

    def test_stays_within_zero_and_one_and_keeps_shape_and_type(
        self, change: Callable[[Tensor, Draws], Tensor], crops: Tensor
    ) -> None:
        changed = change(crops, draws(4))
        assert (changed.shape, changed.dtype) == (crops.shape, torch.float32)
        assert changed.min() >= 0
        assert changed.max() <= 1

    def test_works_on_small_crops(self, change: Callable[[Tensor, Draws], Tensor]) -> None:
        small = torch.rand(6, 1, 8, 8, 16)
        assert change(small, draws(6)).shape == small.shape


class TestElasticDeformation:
    def test_displaces_as_scipy_does(self, crops: Tensor) -> None:
        field = draw_displacement(SHAPE, draws(1))  # (1, Z, 2, Y, X): along x, along y
        z, y, x = np.indices(SHAPE).astype(np.float64)
        places = (z, y + field[0, :, 1].numpy(), x + field[0, :, 0].numpy())
        expected = ndimage.map_coordinates(crops[0, 0].numpy(), places, order=1, mode="reflect")
        ours = displace(crops[:1], field)[0, 0].numpy()
        np.testing.assert_allclose(ours, expected, atol=1e-4)

    def test_moves_nothing_along_z(self) -> None:
        slices = torch.arange(32.0)[None, None, :, None, None].expand(1, 1, *SHAPE) / 32
        torch.testing.assert_close(deform(slices, draws(1)), slices, atol=1e-5, rtol=0)

    def test_fields_have_the_size_of_smoothed_noise(self) -> None:
        ours = draw_displacement(SHAPE, draws(40)).numpy()
        theirs = slow_displacement(40)
        middle = (slice(None), 16, slice(None), 32, slice(20, 44))
        assert ours[middle].std() == pytest.approx(theirs[middle].std(), rel=0.15)
        assert ours.std() == pytest.approx(theirs.std(), rel=0.1)

    def test_fields_are_as_smooth_as_smoothed_noise(self) -> None:
        ours = draw_displacement(SHAPE, draws(40)).numpy()
        theirs = slow_displacement(40)
        for axis in (1, 3, 4):
            assert roughness(ours, axis) == pytest.approx(roughness(theirs, axis), rel=0.1)

    def test_fields_have_the_exact_covariance_of_smoothed_noise(self) -> None:
        fields = draw_displacement((8, 8, 16), draws(3000), alpha=100, sigma=2)
        impulses = np.eye(8 * 8 * 16).reshape(-1, 8, 8, 16)
        smoothed = ndimage.gaussian_filter(impulses, (0, 2, 2, 2), mode="constant", cval=0)
        kernel = 100 * smoothed.reshape(len(smoothed), -1)
        expected = kernel.T @ kernel / 3  # noise in [-1, 1] has variance 1/3
        flat = fields.permute(0, 2, 1, 3, 4).reshape(6000, -1).double().numpy()
        measured = flat.T @ flat / len(flat)
        assert np.abs(measured - expected).max() < 0.1 * expected.max()

    def test_both_directions_are_independent(self) -> None:
        field = draw_displacement((8, 16, 16), draws(200))
        x, y = field[:, 4, 0, 8, 8], field[:, 4, 1, 8, 8]
        assert abs(torch.corrcoef(torch.stack((x, y)))[0, 1]) < 0.2


def slow_displacement(num: int) -> np.ndarray:
    """(num, Z, 2, Y, X): noise in [-1, 1], smoothed by a Gaussian of 8 voxels, times 991."""
    noise = np.random.default_rng(5).uniform(-1, 1, (num, 2, *SHAPE)).astype(np.float32)
    sigma = (0, 0, 8, 8, 8)
    return 991 * ndimage.gaussian_filter(noise, sigma, mode="constant", cval=0).swapaxes(1, 2)


def roughness(field: np.ndarray, axis: int) -> float:
    """Root mean square of steps between neighbours, over that of the field."""
    return float(np.sqrt((np.diff(field, axis=axis) ** 2).mean() / (field**2).mean()))


class TestLocalShuffling:
    @staticmethod
    def slow(crop: np.ndarray, num_blocks: int, generator: np.random.Generator) -> np.ndarray:
        """The published loop: blocks of the original, shuffled, one written over the other."""
        out = crop.copy()
        for _ in range(num_blocks):
            side = [int(generator.integers(1, max(1, n // 10) + 1)) for n in crop.shape]
            low = [int(generator.integers(0, n - s + 1)) for n, s in zip(crop.shape, side,
                                                                        strict=True)]  # fmt: skip
            block = tuple(slice(a, a + s) for a, s in zip(low, side, strict=True))
            out[block] = generator.permutation(crop[block].ravel()).reshape(side)
        return out

    @staticmethod
    def sources(shuffled: np.ndarray) -> np.ndarray:
        """(3, Z, Y, X) where the value of each voxel came from, for crops of NUMBERS."""
        return np.array(np.unravel_index(shuffled.astype(int), SHAPE))

    @pytest.mark.parametrize(("num_blocks", "times"), [(10_000, 2), (1000, 12)])
    def test_changes_as_many_voxels_as_the_loop(self, num_blocks: int, times: int) -> None:
        generator = np.random.default_rng(0)
        slow = [(self.slow(NUMBERS, num_blocks, generator) != NUMBERS).mean() for _ in range(times)]
        crops = torch.from_numpy(NUMBERS).expand(20, 1, *SHAPE)
        fast = (shuffle_pixels(crops, draws(20), num_blocks=num_blocks) != crops).double().mean()
        assert fast == pytest.approx(np.mean(slow), rel=0.05)

    def test_moves_voxels_as_far_as_the_loop_does(self) -> None:
        generator = np.random.default_rng(0)
        slow = [self.sources(self.slow(NUMBERS, 10_000, generator)) for _ in range(3)]
        crops = torch.from_numpy(NUMBERS).expand(10, 1, *SHAPE)
        shuffled = shuffle_pixels(crops, draws(10), num_blocks=NUM_BLOCKS)
        fast = [self.sources(crop[0].numpy()) for crop in shuffled]
        theirs, ours = (np.abs(np.stack(found) - np.indices(SHAPE)) for found in (slow, fast))
        assert ours.max((0, 2, 3, 4)).tolist() == [2, 5, 5]  # within a block: sides 3, 6, 6
        np.testing.assert_allclose(ours.mean((0, 2, 3, 4)), theirs.mean((0, 2, 3, 4)), rtol=0.03)

    def test_keeps_the_histogram_except_for_overwritten_blocks(self, crops: Tensor) -> None:
        shuffled = shuffle_pixels(crops, draws(4), num_blocks=NUM_BLOCKS)
        before, after = (torch.histc(part, 50, 0, 1) / part.numel() for part in (crops, shuffled))
        assert (before - after).abs().sum() < 0.01

    def test_one_block_is_a_permutation_of_a_small_box(self) -> None:
        for key in range(30):
            numbers = torch.arange(32.0 * 64 * 64).reshape(1, 1, *SHAPE)
            shuffled = shuffle_pixels(numbers, draws(1, key), num_blocks=1)
            assert torch.equal(shuffled.flatten().sort().values, numbers.flatten())
            touched = torch.nonzero((shuffled != numbers)[0, 0])
            if len(touched):
                extent = touched.max(0).values - touched.min(0).values + 1
                assert (extent <= torch.tensor([3, 6, 6])).all()

    def test_every_order_within_a_block_is_equally_likely(self) -> None:
        # In a crop of 8 x 8 x 20 the only real block is two voxels side by side: kept or swapped.
        numbers = torch.arange(8.0 * 8 * 20).reshape(1, 1, 8, 8, 20)
        many = shuffle_pixels(numbers.expand(4000, -1, -1, -1, -1), draws(4000), num_blocks=1)
        swapped = (many != numbers).any(dim=4).any(dim=3).any(dim=2).float().mean()
        assert swapped == pytest.approx(0.25, abs=0.03)  # side 2 half of the time, half of those

    def test_zero_blocks_change_nothing(self, crops: Tensor) -> None:
        assert torch.equal(shuffle_pixels(crops, draws(4), num_blocks=0), crops)


class TestNonLinearIntensity:
    def test_curves_are_monotone(self) -> None:
        steps = draw_curves(draws(300)).diff(dim=1)
        falling = steps.sum(1) < 0
        assert (steps[falling] <= 1e-6).all()
        assert (steps[~falling] >= -1e-6).all()

    def test_half_of_the_curves_fall(self) -> None:
        curves = draw_curves(draws(2000))
        assert (curves[:, 0] > curves[:, -1]).float().mean() == pytest.approx(0.5, abs=0.05)

    def test_curves_run_from_corner_to_corner(self) -> None:
        ends = draw_curves(draws(100))[:, [0, -1]].sort(dim=1).values
        torch.testing.assert_close(ends, torch.tensor([[0.0, 1.0]]).expand(100, -1),
                                   atol=0.02, rtol=0)  # fmt: skip

    def test_curves_are_the_published_bezier_curves(self) -> None:
        curves = draw_curves(draws(50)).numpy()
        replay = draws(50)
        points, falling = replay.uniform(2, 2).numpy(), replay.uniform().numpy() < 0.5
        t = np.linspace(0, 1, 20_000)
        for curve, (first, second), falls in zip(curves, points, falling, strict=True):
            control = np.array([(0, 0), first, second, (1, 1)])
            bernstein = np.array([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3])
            x, y = np.sort(control.T @ bernstein)
            y = y[::-1] if falls else y
            at = np.linspace(0, 1, len(curve))[100:-100]  # curves may be upright at the ends
            np.testing.assert_allclose(curve[100:-100], np.interp(at, x, y), atol=5e-3)

    def test_equal_intensities_stay_equal_and_their_order_is_kept_or_reversed(
        self, crops: Tensor
    ) -> None:
        bent = nonlinear_intensity(crops, draws(4, 4))
        for before, after in zip(crops.flatten(1), bent.flatten(1), strict=True):
            steps = after[before.argsort()].diff()
            assert (steps >= -1e-6).all() or (steps <= 1e-6).all()


class TestPainting:
    @staticmethod
    def noisy(change: Callable[[Tensor, Draws], Tensor], num: int, key: int) -> Tensor:
        """(num, Z, Y, X) where crops of value 2, which noise never has, were painted over."""
        return change(torch.full((num, 1, *SHAPE), 2.0), draws(num, key))[:, 0] != 2

    def test_inpainting_changes_as_many_voxels_as_the_loop(self) -> None:
        generator = np.random.default_rng(0)
        slow = [self.slow_inside(generator).mean() for _ in range(400)]
        fast = self.noisy(inpaint, 400, 1).double().mean((1, 2, 3)).numpy()
        assert fast.mean() == pytest.approx(np.mean(slow), rel=0.08)
        assert fast.std() == pytest.approx(np.std(slow), rel=0.15)

    def test_outpainting_changes_as_many_voxels_as_the_loop(self) -> None:
        generator = np.random.default_rng(0)
        slow = [self.slow_outside(generator).mean() for _ in range(400)]
        fast = self.noisy(outpaint, 400, 2).double().mean((1, 2, 3)).numpy()
        assert fast.mean() == pytest.approx(np.mean(slow), rel=0.03)
        assert fast.std() == pytest.approx(np.std(slow), rel=0.15)

    @staticmethod
    def slow_box(generator: np.random.Generator, low: list[int], high: list[int]) -> tuple:
        side = [int(generator.integers(a, b + 1)) for a, b in zip(low, high, strict=True)]
        first = [int(generator.integers(3, n - s - 2)) for n, s in zip(SHAPE, side, strict=True)]
        return tuple(slice(a, a + s) for a, s in zip(first, side, strict=True))

    def slow_inside(self, generator: np.random.Generator) -> np.ndarray:
        painted, left = np.zeros(SHAPE, bool), 5
        while left and generator.random() < 0.95:
            low, high = [n // 6 for n in SHAPE], [n // 3 for n in SHAPE]
            painted[self.slow_box(generator, low, high)] = True
            left -= 1
        return painted

    def slow_outside(self, generator: np.random.Generator) -> np.ndarray:
        painted, left = np.ones(SHAPE, bool), 5
        while left == 5 or (left and generator.random() < 0.95):
            low, high = [n - 4 * n // 7 for n in SHAPE], [n - 3 * n // 7 for n in SHAPE]
            painted[self.slow_box(generator, low, high)] = False
            left -= 1
        return painted

    def test_a_single_noise_box_has_sides_of_a_sixth_to_a_third(self) -> None:
        seen = 0
        for painted in self.noisy(inpaint, 600, 3):
            places = torch.nonzero(painted)
            if not len(places):
                continue
            sides = places.max(0).values - places.min(0).values + 1
            if sides.prod() == len(places):  # one box, not several
                seen += 1
                assert (sides >= torch.tensor([5, 10, 10])).all()
                assert (sides <= torch.tensor([10, 21, 21])).all()
        assert seen > 0

    def test_boxes_keep_three_voxels_from_the_border(self) -> None:
        painted = self.noisy(inpaint, 200, 4) | ~self.noisy(outpaint, 200, 5)
        inner = torch.zeros(SHAPE, dtype=torch.bool)
        inner[3:-3, 3:-3, 3:-3] = True
        assert not (painted & ~inner).any()

    def test_boxes_are_drawn_everywhere_inside_the_margin(self) -> None:
        painted = self.noisy(inpaint, 150, 6).any(0)
        assert painted[8:-8, 12:-12, 12:-12].all()

    def test_noise_is_uniform_and_drawn_for_every_voxel(self) -> None:
        whole = outpaint(torch.full((4, 1, *SHAPE), 2.0), draws(4, 7))
        noise = whole[whole != 2]
        assert noise.mean() == pytest.approx(0.5, abs=0.01)
        assert noise.std() == pytest.approx(12**-0.5, abs=0.01)
        assert len(noise.unique()) > 0.9 * len(noise)


class TestMix:
    def test_every_kind_is_drawn_a_quarter_of_the_time(self) -> None:
        share = torch.bincount(draw_kinds(draws(8000), 4), minlength=4) / 8000
        torch.testing.assert_close(share, torch.full((4,), 0.25), atol=0.02, rtol=0)

    def test_every_crop_is_deformed_and_changed_in_exactly_one_more_way(
        self, crops: Tensor
    ) -> None:
        many = crops.repeat(4, 1, 1, 1, 1)
        deformed = deform(many, draws(16))
        mixed = perturb_genesis(many, draws(16), num_blocks=NUM_BLOCKS)
        replay = draws(16)
        deform(many, replay)
        kinds = draw_kinds(replay, 4).tolist()
        assert set(kinds) == {0, 1, 2, 3}
        for kind, before, after in zip(kinds, deformed, mixed, strict=True):
            changed = (before != after).float().mean()
            if kind == 0:  # shuffling: values stay values of the deformed crop
                assert torch.isin(after, before).all()
                assert changed > 0.5
            elif kind == 1:  # a function of the intensity
                assert (after.flatten()[before.flatten().argsort()].diff().sign() >= 0).all() or (
                    after.flatten()[before.flatten().argsort()].diff().sign() <= 0
                ).all()
            elif kind == 2:  # most voxels untouched
                assert changed < 0.25
            else:  # the margin is all noise
                assert (before != after)[0, :3].float().mean() > 0.99
