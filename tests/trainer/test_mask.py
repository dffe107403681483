"""Masked autoencoding: which blocks are hidden, what the loss counts, what pictures show."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.runs import read_metrics, tiny
from tests.support.synthetic_store import make_store
from trainer import TrainConfig, TrainError, pretrain
from trainer.losses import masked_loss
from trainer.nets.pretraining import Output, PretrainingNet
from trainer.pretexts import MaskedAutoencoding
from trainer.transforms.draws import Draws
from trainer.transforms.mask import BlockGrid, default_block, hide

SHAPE = (16, 32, 32)


def draws(num: int, *key: int) -> Draws:
    return Draws.keyed(0, "test", *key, rows=range(num))


class TestBlocks:
    @pytest.mark.parametrize(
        ("shape", "block"),
        [
            ((160, 160, 160), 16),
            ((96, 96, 96), 16),
            ((64, 64, 64), 8),
            ((32, 64, 64), 8),
            ((16, 32, 32), 4),
            ((8, 16, 16), 4),
        ],
    )
    def test_smaller_crops_have_smaller_blocks(self, shape: tuple[int, ...], block: int) -> None:
        assert default_block(shape) == BlockGrid(shape, ratio=0.75).block == block

    @pytest.mark.parametrize("ratio", [0.25, 0.6, 0.75])
    def test_exactly_that_share_of_the_blocks_is_hidden_in_every_crop(self, ratio: float) -> None:
        mask = BlockGrid(SHAPE, ratio=ratio, block=8).draw(draws(20))
        blocks = mask.unfold(2, 8, 8).unfold(3, 8, 8).unfold(4, 8, 8).flatten(5)
        assert torch.equal(blocks.all(-1), blocks.any(-1)), "a block is hidden whole or not at all"
        hidden = blocks.all(-1).flatten(1).sum(1)
        assert set(hidden.tolist()) == {round(ratio * 2 * 4 * 4)}

    def test_every_block_is_hidden_equally_often(self) -> None:
        mask = BlockGrid(SHAPE, ratio=0.75, block=8).draw(draws(1000))
        share = mask[:, 0, ::8, ::8, ::8].float().mean(0)
        torch.testing.assert_close(share, torch.full((2, 4, 4), 0.75), atol=0.06, rtol=0)

    def test_the_last_blocks_of_an_uneven_side_are_cut_off(self) -> None:
        grid = BlockGrid((8, 24, 40), ratio=0.5, block=16)
        mask = grid.draw(draws(5))
        assert grid.size == (1, 2, 3)
        assert mask.shape == (5, 1, 8, 24, 40)
        assert torch.equal(mask[..., 16:24, :1].all(-2), mask[..., 23, :1])

    def test_hidden_voxels_are_air_and_the_others_unchanged(self) -> None:
        crops = torch.rand(4, 1, *SHAPE) + 0.1
        mask = BlockGrid(SHAPE, ratio=0.75).draw(draws(4))
        hidden = hide(crops, mask)
        assert not hidden[mask].any()
        assert torch.equal(hidden[~mask], crops[~mask])

    @pytest.mark.parametrize("changes", [{"mask_block": 64}, {"mask_ratio": 0.001}])
    def test_masks_that_hide_nothing_or_everything_are_refused(
        self, changes: dict[str, float]
    ) -> None:
        with pytest.raises(TrainError, match=r"choose another mask_ratio or a smaller mask_block"):
            MaskedAutoencoding(SHAPE, TrainConfig(pretext="mae", **changes))  # type: ignore[arg-type]


class TestLoss:
    def test_is_the_mean_over_hidden_voxels_only(self) -> None:
        target = torch.rand(3, 1, *SHAPE)
        mask = BlockGrid(SHAPE, ratio=0.75).draw(draws(3))
        restored = torch.where(mask, target + 0.5, target + 100)
        assert masked_loss(restored, target, mask) == pytest.approx(0.25, rel=1e-5)

    def test_crops_weigh_the_same_however_much_they_hide(self) -> None:
        target = torch.zeros(2, 1, 1, 1, 4)
        restored = torch.tensor([1.0, 1, 1, 1, 3, 3, 3, 3]).reshape(target.shape)
        mask = torch.tensor([True, True, True, False, True, False, False, False])
        assert masked_loss(restored, target, mask.reshape(target.shape)) == 5.0

    def test_visible_mean_is_the_loss_of_each_crops_visible_mean(self) -> None:
        task = MaskedAutoencoding(SHAPE, TrainConfig(pretext="mae"))
        crops = torch.rand(3, 1, *SHAPE) * torch.tensor([1, 2, 3.0]).reshape(3, 1, 1, 1, 1)
        example = task.perturb(crops, draws(3))
        assert example.mask is not None
        expected = [
            (crop[hidden] - crop[~hidden].mean()).square().mean()
            for crop, hidden in zip(crops, example.mask, strict=True)
        ]
        found = task.baseline(example)["visible_mean"]
        torch.testing.assert_close(found, torch.stack(expected).mean())


def test_pictures_show_the_restored_blocks_pasted_between_the_visible_ones() -> None:
    task = MaskedAutoencoding(SHAPE, TrainConfig(pretext="mae"))
    crops = torch.rand(2, 1, *SHAPE)
    example = task.perturb(crops, draws(2))
    shown = task.show(torch.full_like(crops, 0.5), example)
    assert list(shown) == ["masked", "restored", "pasted", "original"]
    assert (shown["pasted"][example.mask] == 0.5).all()
    assert torch.equal(shown["pasted"][~example.mask], crops[~example.mask])  # type: ignore[operator]


def test_a_batch_is_split_with_its_mask() -> None:
    task = MaskedAutoencoding(SHAPE, TrainConfig(pretext="mae"))
    example = task.perturb(torch.rand(5, 1, *SHAPE), draws(5))
    parts = example.split(2)
    assert [len(part.inputs) for part in parts] == [3, 2]
    for name in ("inputs", "target", "mask"):
        joined = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(joined, getattr(example, name))
    losses = [task.loss(Output(restored=part.inputs), part) for part in parts]
    whole = task.loss(Output(restored=example.inputs), example)
    assert (3 * losses[0] + 2 * losses[1]) / 5 == pytest.approx(whole)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("pretext", "classify", "complete"),
    [("mae", True, True), ("mae", False, False), ("inpainting", True, False)],
)
def test_classes_are_learned_from_complete_crops_beside_masked_ones(
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pretext: Any,
    classify: bool,
    complete: bool,
) -> None:
    seen: list[tuple[Tensor, Tensor | None]] = []
    forward = PretrainingNet.forward

    def watched(
        net: PretrainingNet, x: Tensor, *, originals: Tensor | None = None, **parts: bool
    ) -> Output:
        if net.training:
            seen.append((x, originals))
        return forward(net, x, originals=originals, **parts)

    monkeypatch.setattr(PretrainingNet, "forward", watched)
    config = tiny(pretext=pretext, classify=classify, steps=1, warmup_epochs=0)
    pretrain(store, tmp_path / "run", config)
    [(inputs, originals)] = seen
    assert (originals is not None) == complete
    if originals is not None:
        hidden = inputs != originals
        assert not inputs[hidden].any()
        assert torch.equal(inputs[~hidden], originals[~hidden])


def test_restoring_hidden_blocks_beats_the_mean_of_the_visible_voxels(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", shape=(8, 16, 16), num_classes=3, num_train=16)
    config = tiny(pretext="mae", classify=False, width=4, epochs=9, learning_rate=1e-2, log_every=3)
    summary = pretrain(store, tmp_path / "run", config)
    train = [line["mae"] for line in read_metrics(tmp_path / "run") if line["kind"] == "train"]
    assert train[-1] < 0.8 * train[0]
    assert summary.best["mae"] < 0.9 * summary.best["visible_mean"]
