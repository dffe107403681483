"""Device and numerical precision of a run."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from trainer.config import LoopConfig
from trainer.errors import TrainError
from trainer.ranks import Ranks

Config = TypeVar("Config", bound=LoopConfig)


_NO_KERNEL = "unable to find an engine"
"""What cuDNN says where memory is too small for any of its kernels."""


def pick_device(name: str, ranks: Ranks) -> torch.device:
    """The device that `LoopConfig.device` names, for this process; TrainError if not usable."""
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


def upload(values: Tensor, device: torch.device) -> Tensor:
    """Copy values from the CPU to a device without waiting for a GPU, which may be busy."""
    if device.type == "cuda":  # a copy from memory that is not pinned waits for it
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def describe_machine(net: nn.Module, device: torch.device) -> dict[str, Any]:
    """What config.json records of a net and of what trains it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"num_parameters": sum(p.numel() for p in net.parameters()), "device": name}


def resolve_precision(config: Config, device: torch.device) -> Config:
    """The config with "auto" precision replaced by the one that suits the device."""
    if config.precision != "auto":
        return config
    return dataclasses.replace(config, precision="bf16" if device.type == "cuda" else "fp32")


def set_precision(precision: str) -> None:
    """Set global options of PyTorch: full float32 unless tf32 is allowed, and fastest kernels."""
    allowed = precision != "fp32"
    # Not the newer `fp32_precision`: after it, PyTorch's getters of these flags raise an error.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cudnn.benchmark = True


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """A context in which a net runs at that precision."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def check_precision(
    precision: str,
    device: torch.device,
    shape: tuple[int, ...],
    parts_per_axis: int = 1,
    *,
    factor: int = 8,
) -> None:
    """Raise TrainError where gradients of the weights would be wrong.

    On the CPU, oneDNN's bf16 gradient of a 3x3x3 kernel reads uninitialised memory when the input
    has exactly two slices (torch 2.13: wrong numbers without a warning, or NaN). A net of factor 8
    reduces crops of 8 and 16 slices to two.

    shape
        (Z, Y, X) of a crop in voxels.
    parts_per_axis
        Sub-cubes along each axis of a crop; each is encoded alone.
    factor
        How many times coarser the net's deepest features are.
    """
    slices = shape[0] // parts_per_axis
    if precision == "bf16" and device.type == "cpu" and slices in (factor, 2 * factor):
        raise TrainError(
            f"precision bf16 gives wrong gradients on the CPU for crops of {shape[0]} slices; "
            "use --precision fp32, or a GPU"
        )


@contextlib.contextmanager
def memory_explained(batch_size: int, remedy: str) -> Iterator[None]:
    """Raise TrainError, which says what to change, where a GPU's memory is too small."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and _NO_KERNEL not in str(error):
            raise
        raise TrainError(
            f"the GPU's memory is too small for batches of {batch_size}; {remedy}"
        ) from error
