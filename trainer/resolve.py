"""Settings that depend on the store, the device or the run to resume."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import torch

from store.format import format_rows
from trainer.config import LoopConfig, TrainConfig
from trainer.errors import TrainError
from trainer.pretexts import PRETEXTS

Config = TypeVar("Config", bound=LoopConfig)


def resolve_selection(
    config: TrainConfig, excluded: tuple[int, ...], num_classes: int, *, saved: Any = None
) -> TrainConfig:
    """The config with its excluded classes named; `saved` are those of the run to resume.

    excluded
        What the store's annotation says.

    Raises TrainError for a class that the store does not have.
    """
    for name in ("classes", "excluded_classes"):
        strange = [c for c in getattr(config, name) or () if not 0 <= c < num_classes]
        if strange:
            raise TrainError(
                f"{name}: the store has classes 0 to {num_classes - 1}, not {format_rows(strange)}"
            )
    if config.excluded_classes is not None:
        return config
    return dataclasses.replace(config, excluded_classes=excluded if saved is None else tuple(saved))


def resolve_init(config: TrainConfig, *, saved: dict[str, Any]) -> TrainConfig:
    """The config with the starting weights of the run to resume, unless it names some itself."""
    if config.init is not None:
        return config
    return dataclasses.replace(config, init=saved["init"], init_part=saved["init_part"])


def resolve_precision(config: Config, device: torch.device) -> Config:
    """The config with its precision as a word."""
    if config.precision != "auto":
        return config
    return dataclasses.replace(config, precision="bf16" if device.type == "cuda" else "fp32")


def resolve_warmup(
    config: TrainConfig, steps_per_epoch: int, *, saved: int | None = None
) -> TrainConfig:
    """The config with its warm-up as a number; `saved` is that of the run to resume.

    Raises TrainError when the warm-up would take the whole run.
    """
    epochs = min(config.epochs, -(-(config.steps or 2**62) // steps_per_epoch))
    if not (config.classify and PRETEXTS[config.pretext].metric):
        warmup = 0
    elif config.warmup_epochs is None:
        warmup = epochs // 10 if saved is None else saved
    else:
        warmup = config.warmup_epochs
    if warmup and warmup >= epochs:
        raise TrainError(
            f"warmup_epochs must leave epochs for both losses: got {warmup} of {epochs}"
            f" ({steps_per_epoch} steps each); lower it or train longer"
        )
    return dataclasses.replace(config, warmup_epochs=warmup)
