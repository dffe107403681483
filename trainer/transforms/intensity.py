"""Non-linear intensity: every crop's values pass through a random Bezier curve."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.device import upload
from trainer.transforms.draws import Draws

_CURVE_STEPS = 4096


def draw_curves(draws: Draws) -> Tensor:
    """Draw (n, 4096) output intensities for inputs from 0 to 1 in equal steps.

    Each is a cubic Bezier curve from (0, 0) to (1, 1) with two random control points in the unit
    square, so it rises; half of the curves are reversed and fall from 1 to 0.
    """
    points = draws.uniform(2, 2)  # (n, control point, coordinate)
    falling = draws.uniform() < 0.5
    t = torch.linspace(0, 1, _CURVE_STEPS, dtype=torch.float64)
    weights = torch.stack((3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2))  # (control point, t)
    x, y = torch.einsum("npc,pt->cnt", points, weights) + t**3  # (n, t) each
    y = torch.where(falling[:, None], y.flip(1), y)
    x = x.contiguous()
    high = torch.searchsorted(x, t.expand(len(x), -1).contiguous()).clamp(1, _CURVE_STEPS - 1)
    x_low, x_high = x.gather(1, high - 1), x.gather(1, high)
    y_low, y_high = y.gather(1, high - 1), y.gather(1, high)
    share = ((t - x_low) / (x_high - x_low).clamp_min(1e-12)).clamp(0, 1)
    return torch.lerp(y_low, y_high, share).float()


def nonlinear_intensity(crops: Tensor, draws: Draws) -> Tensor:
    """Map every intensity by the curve of its crop, in 4096 steps (half a HU)."""
    num = len(crops)
    curves = upload(draw_curves(draws), crops.device)  # (n, steps)
    start = torch.arange(num, device=crops.device)[:, None] * _CURVE_STEPS + 0.5
    index = torch.add(start, crops.reshape(num, -1).double(), alpha=_CURVE_STEPS - 1)
    return curves.take(index.long()).reshape(crops.shape)
