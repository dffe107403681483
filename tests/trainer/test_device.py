"""What must hold on a GPU, checked where there is none."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from trainer.device import autocast, set_precision
from trainer.finetuning.grid import Grid
from trainer.finetuning.inference import Predictor


def test_windows_are_weighted_where_the_net_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """MONAI multiplies the net's output by weights on `sw_device`, by default the image's."""
    found: dict[str, Any] = {}

    def spy(image: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        found.update(options)
        return torch.zeros(1, 2, *image.shape[2:])

    monkeypatch.setattr("monai.inferers.utils.sliding_window_inference", spy)
    gpu = torch.device("cuda")
    image = np.zeros((20, 20, 20), np.float16)
    off = autocast("fp32", torch.device("cpu"))
    grid = Grid(spacing_mm=None, shape=(16, 16, 16), intensity="ct", window_hu=(-150, 250))
    net = nn.Identity()
    Predictor(net=net, grid=grid, overlap=0.5, device=gpu, autocast=off).slide_window(image)
    assert (found["sw_device"], found["device"]) == (gpu, "cpu")


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_flags_of_precision_can_be_read_by_other_code(precision: str) -> None:
    """PyTorch's compiler reads them, and some ways to set them make it fail."""
    set_precision(precision)
    allowed = precision != "fp32"
    try:
        assert torch.backends.cuda.matmul.allow_tf32 == allowed
        assert torch.backends.cudnn.allow_tf32 == allowed
        assert torch.get_float32_matmul_precision() == ("high" if allowed else "highest")
    finally:
        set_precision("fp32")
