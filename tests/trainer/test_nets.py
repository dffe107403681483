"""The network."""

import pytest
import torch

from trainer import TrainError
from trainer.losses import Means, classification_loss, restoration_loss, weigh
from trainer.nets.backbone import check_shape
from trainer.nets.pretraining import ClassificationHead, PretrainingNet
from trainer.nets.registry import build_net
from trainer.nets.unet import UNet3D

PAPERS = {"pretext_weight": 1.0, "classification_weight": 0.01}
PUBLISHED_KEYS = [
    "down_tr64.ops.0.conv1.weight",
    "down_tr64.ops.1.bn1.running_mean",
    "down_tr512.ops.1.conv1.bias",
    "up_tr256.up_conv.weight",
    "up_tr256.ops.0.conv1.weight",
    "up_tr64.ops.1.bn1.num_batches_tracked",
    "out_tr.final_conv.weight",
    "clc_out.conv1.weight",
    "clc_out.bn1.weight",
    "clc_out.fc1.weight",
]


@pytest.fixture(scope="module")
def paper_net() -> PretrainingNet:
    with torch.device("meta"):
        return PretrainingNet(UNet3D(width=32), num_classes=44)


def test_the_papers_net_has_33_28_million_parameters(paper_net: PretrainingNet) -> None:
    assert round(sum(p.numel() for p in paper_net.parameters()) / 1e6, 2) == 33.28


def test_keys_are_those_of_the_published_checkpoints(paper_net: PretrainingNet) -> None:
    assert set(PUBLISHED_KEYS) <= paper_net.state_dict().keys()


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("down_tr64.ops.0.conv1.weight", (32, 1, 3, 3, 3)),
        ("down_tr64.ops.1.conv1.weight", (64, 32, 3, 3, 3)),
        ("down_tr512.ops.1.conv1.weight", (512, 256, 3, 3, 3)),
        ("up_tr256.up_conv.weight", (512, 512, 2, 2, 2)),
        ("up_tr256.ops.0.conv1.weight", (256, 768, 3, 3, 3)),
        ("up_tr128.ops.0.conv1.weight", (128, 384, 3, 3, 3)),
        ("up_tr64.ops.0.conv1.weight", (64, 192, 3, 3, 3)),
        ("out_tr.final_conv.weight", (1, 64, 1, 1, 1)),
        ("clc_out.conv1.weight", (1024, 512, 3, 3, 3)),
        ("clc_out.fc1.weight", (44, 1024)),
    ],
)
def test_layers_have_the_published_shapes(
    paper_net: PretrainingNet, key: str, shape: tuple[int, ...]
) -> None:
    assert tuple(paper_net.state_dict()[key].shape) == shape


@pytest.mark.parametrize("width", [1, 3])
def test_any_width_restores_and_classifies(width: int) -> None:
    net = build_net(width=width, num_classes=5)
    restored, logits, _ = net(torch.rand(2, 1, 8, 16, 24))
    assert (restored.shape, logits.shape) == ((2, 1, 8, 16, 24), (2, 5))


def test_restored_crops_lie_between_zero_and_one() -> None:
    restored = build_net(width=2, num_classes=None)(50 * torch.randn(2, 1, 8, 8, 8),
                                                     classify=False).restored  # fmt: skip
    assert restored.min() >= 0
    assert restored.max() <= 1


def test_a_part_not_asked_for_is_not_computed() -> None:
    net = build_net(width=1, num_classes=3)
    assert net(torch.rand(2, 1, 8, 8, 8), pretext=False).restored is None
    assert net(torch.rand(2, 1, 8, 8, 8), classify=False).logits is None


def test_a_net_without_decoder_has_no_decoder_weights() -> None:
    keys = build_net(width=1, num_classes=3, decoder=False).state_dict()
    assert {key.split(".")[0] for key in keys} == {
        "down_tr64", "down_tr128", "down_tr256", "down_tr512", "clc_out"}  # fmt: skip


def test_initial_weights_follow_from_the_seed_alone() -> None:
    torch.manual_seed(1)
    one = build_net(width=2, num_classes=3, seed=7).state_dict()
    torch.manual_seed(2)
    other = build_net(width=2, num_classes=3, seed=7).state_dict()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_building_a_net_leaves_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    build_net(width=1, num_classes=2, seed=3)
    assert torch.equal(before, torch.get_rng_state())


def test_eval_outputs_do_not_depend_on_the_rest_of_the_batch() -> None:
    net = build_net(width=2, num_classes=3).eval()
    crops = torch.rand(3, 1, 8, 8, 8)
    torch.testing.assert_close(net(crops).logits[:1], net(crops[:1]).logits)


def test_the_head_pools_over_the_whole_bottleneck() -> None:
    head = ClassificationHead(4, 8, 3).eval()
    bottleneck = torch.rand(2, 4, 2, 3, 4)
    features = torch.relu(head.bn1(head.conv1(bottleneck))).mean(dim=(2, 3, 4))
    torch.testing.assert_close(head(bottleneck), head.fc1(features))


@pytest.mark.parametrize("shape", [(32, 64, 60), (4, 64, 64)])
def test_crops_that_do_not_suit_the_net_are_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(TrainError, match="multiples of 8"):
        check_shape(shape, UNet3D(width=1))


def test_a_width_below_one_is_refused() -> None:
    with pytest.raises(TrainError, match="width must be >= 1, got 0"):
        UNet3D(width=0)


def test_cross_entropy_stays_finite_for_extreme_logits() -> None:
    logits = torch.tensor([[1e4, -1e4], [0.0, 60000.0]], dtype=torch.float16)
    assert torch.isfinite(classification_loss(logits, torch.tensor([1, 0])))


def test_losses_are_weighed_1_and_0_01() -> None:
    total = weigh(torch.tensor(0.5), torch.tensor(3.0), **PAPERS)
    torch.testing.assert_close(total, torch.tensor(0.5 + 0.03))


def test_an_only_loss_is_taken_as_it_is() -> None:
    assert weigh(None, torch.tensor(3.0), **PAPERS) == 3
    assert weigh(torch.tensor(0.5), None, **PAPERS) == 0.5


def test_restoration_loss_is_the_mean_squared_error() -> None:
    one, other = torch.rand(2, 1, 4, 4, 4), torch.rand(2, 1, 4, 4, 4)
    torch.testing.assert_close(restoration_loss(one, other), ((one - other) ** 2).mean())


def test_means_weigh_batches_by_their_length_and_go_on_from_their_sums() -> None:
    means = Means(torch.device("cpu"))
    means.add({"loss": torch.tensor(1.0)}, 3)
    means = Means(torch.device("cpu"), means.sums())
    means.add({"loss": torch.tensor(5.0)}, 1)
    assert means.values() == {"loss": 2.0}
