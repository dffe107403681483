"""The Models Genesis mix: elastic deformation, then one of four other perturbations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from trainer.device import upload
from trainer.transforms.draws import Draws
from trainer.transforms.elastic import deform
from trainer.transforms.intensity import nonlinear_intensity
from trainer.transforms.paint import inpaint, outpaint
from trainer.transforms.shuffle import shuffle_pixels

Perturbation = Callable[[Tensor, Draws], Tensor]


def draw_kinds(draws: Draws, num_kinds: int) -> Tensor:
    """(n,) number of the perturbation of each crop, all equally likely, on the CPU."""
    return draws.integers(0, num_kinds - 1)


def perturb_genesis(crops: Tensor, draws: Draws, *, num_blocks: int) -> Tensor:
    """Deform every crop elastically, then perturb it in exactly one of four other ways.

    num_blocks
        Blocks of local shuffling; 10,000 in Models Genesis.
    """
    shuffle = partial(shuffle_pixels, num_blocks=num_blocks)
    kinds: tuple[Perturbation, ...] = (shuffle, nonlinear_intensity, inpaint, outpaint)
    perturbed = deform(crops, draws)
    chosen = draw_kinds(draws, len(kinds))
    for kind, change in enumerate(kinds):
        members = torch.nonzero(chosen == kind).flatten()
        if len(members):
            there = upload(members, crops.device)
            perturbed[there] = change(perturbed[there], draws.of(members.tolist()))
    return perturbed
