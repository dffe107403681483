"""The training recipe: optimiser, learning rate at each step, gradient clipping, weight average."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from trainer.config import LoopConfig, OptimiserName

POLY_EXPONENT = 0.9
"""The exponent of schedule "poly", nnU-Net's."""
WEIGHT_DECAY: Final[dict[OptimiserName, float]] = {"adam": 0.0, "adamw": 0.05, "sgd": 3e-5}
"""Default weight decay of each optimiser."""


def make_optimiser(
    net: nn.Module, config: LoopConfig, device: torch.device
) -> torch.optim.Optimizer:
    """An optimiser of all parameters of a net, fused on a GPU.

    Adam and SGD add the decay of all parameters to the gradient, as nnU-Net does. AdamW decays
    kernels only: it spares parameters of one axis or none, that is biases, scales and shifts of
    norms.
    """
    fused, rate, decay = device.type == "cuda", config.learning_rate, config.weight_decay
    decay = WEIGHT_DECAY[config.optimiser] if decay is None else decay
    parameters = list(net.parameters())
    if config.optimiser == "adam":
        return torch.optim.Adam(parameters, lr=rate, weight_decay=decay, fused=fused)
    if config.optimiser == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=rate,
            momentum=config.momentum,
            nesterov=True,
            weight_decay=decay,
            fused=fused,
        )
    kernels = [parameter for parameter in parameters if parameter.ndim > 1]
    others = [parameter for parameter in parameters if parameter.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": kernels}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, weight_decay=decay, fused=fused)


def resume_optimiser(optimiser: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Continue from the state in a checkpoint, which another kind of device may have written."""
    fused = optimiser.param_groups[0]["fused"]
    groups = [{**group, "fused": fused} for group in state["param_groups"]]
    optimiser.load_state_dict({**state, "param_groups": groups})


def learning_rate_at(config: LoopConfig, step: int, *, num_steps: int, num_cuts: int) -> float:
    """The learning rate of a step, counted from 0 in its phase.

    num_steps
        Steps of the phase.
    num_cuts
        Cuts so far, with schedules "step" and "plateau".
    """
    rise = config.lr_warmup_steps
    past = max(0, step - rise) / max(1, num_steps - rise)  # from 0 to 1
    left = 1 - min(past, 1.0)
    if config.lr_schedule == "poly":
        rate = config.learning_rate * math.pow(left, POLY_EXPONENT)
    elif config.lr_schedule == "cosine":
        span = config.learning_rate - config.lr_minimum
        rate = config.lr_minimum + span * 0.5 * (1 - math.cos(math.pi * left))
    else:
        rate = config.learning_rate * math.pow(config.lr_gamma, num_cuts)
    rate = max(rate, config.lr_minimum)
    return rate * (step + 1) / (rise + 1) if step < rise else rate


def clip_gradient(net: nn.Module, config: LoopConfig) -> None:
    """Shorten the gradient of a net, taken as one vector, to `clip_norm`, if that is set."""
    if config.clip_norm is not None:
        nn.utils.clip_grad_norm_(net.parameters(), config.clip_norm)


class Average:
    """The exponential moving average of a net's weights and batch-norm statistics.

    At step t, from 1, the decay is the smaller of `decay` and (1 + t) / (10 + t), so that the
    random weights of the start are soon forgotten.
    """

    def __init__(
        self, net: nn.Module, decay: float, *, saved: dict[str, Tensor] | None = None
    ) -> None:
        """Start with the net's weights, or with the average that a checkpoint keeps.

        saved
            What `state_dict` returned.
        """
        self._net, self._decay = net, decay
        ours = net.state_dict(keep_vars=True)  # names of one tensor may be several
        self._tensors = list({id(tensor): tensor for tensor in ours.values()}.values())
        self._averages = [tensor.detach().clone() for tensor in self._tensors]
        if saved is not None:
            with torch.no_grad():
                for key, average in self.state_dict().items():
                    average.copy_(saved[key])

    @classmethod
    def resume(
        cls, net: nn.Module, config: LoopConfig, saved: dict[str, Any] | None
    ) -> Average | None:
        """The average of a new run, or that of a checkpoint's content; None where none is set."""
        if config.ema_decay is None:
            return None
        return cls(net, config.ema_decay, saved=saved["model"] if saved else None)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the net's weights after a step, counted from 1. Counters are not averaged."""
        decay = min(self._decay, (1 + step) / (10 + step))
        pairs = list(zip(self._averages, self._tensors, strict=True))
        real = [(average, tensor) for average, tensor in pairs if average.is_floating_point()]
        get_ema_multi_avg_fn(decay)([a for a, _ in real], [t.detach() for _, t in real], step)
        for average, tensor in pairs:
            if not average.is_floating_point():
                average.copy_(tensor)

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """Within it, the net's weights are the average; after it, they are as before."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by the net's own keys."""
        own = {id(t): average for t, average in zip(self._tensors, self._averages, strict=True)}
        return {
            key: own[id(tensor)] for key, tensor in self._net.state_dict(keep_vars=True).items()
        }

    @torch.no_grad()
    def _swap(self) -> None:
        for average, tensor in zip(self._averages, self._tensors, strict=True):
            held = tensor.clone()
            tensor.copy_(average)
            average.copy_(held)


def trained_weights(saved: dict[str, Any]) -> dict[str, Tensor]:
    """The weights to train on from a checkpoint's content, which may keep their average, too."""
    weights: dict[str, Tensor] = saved.get("trained", saved["model"])
    return weights
