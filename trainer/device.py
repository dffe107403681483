"""Where a run computes, and how exactly."""

from __future__ import annotations

import torch

from trainer.errors import TrainError
from trainer.ranks import Ranks


def pick_device(name: str, ranks: Ranks) -> torch.device:
    """The device of that name for this process; TrainError when it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and ranks.size > 1:
        name = f"cuda:{ranks.local}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" has no values
    except (RuntimeError, AssertionError, ImportError) as error:
        num_gpus = torch.cuda.device_count()
        found = f"; PyTorch finds {num_gpus or 'no'} GPU" + "s" * (num_gpus > 1)
        raise TrainError(
            f"device {name!r} cannot be used here{found if name.startswith('cuda') else ''};"
            f" give {'auto, cpu or cuda' if num_gpus else 'auto or cpu'}"
        ) from error
    return device


def set_precision(precision: str) -> None:
    """Float32 is what it says unless tf32 is asked for; and the fastest kernels are looked for."""
    kind = "ieee" if precision == "fp32" else "tf32"
    torch.backends.cuda.matmul.fp32_precision = kind
    torch.backends.cudnn.conv.fp32_precision = kind  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = True


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context in which a net runs at that precision."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def check_precision(
    precision: str, device: torch.device, shape: tuple[int, ...], blocks: int = 1
) -> None:
    """Raise TrainError where the weights' gradients would be wrong.

    On the CPU, oneDNN's bf16 gradient of a 3x3x3 kernel reads memory that was never written
    when the input has exactly two slices (torch 2.13; numbers that are silently wrong, or NaN).
    The net halves crops of 8 and 16 slices down to two.
    """
    if precision == "bf16" and device.type == "cpu" and shape[0] // blocks in (8, 16):
        raise TrainError(
            f"precision bf16 gives wrong gradients on the CPU for crops of {shape[0]} slices; "
            "use --precision fp32, or a GPU"
        )
