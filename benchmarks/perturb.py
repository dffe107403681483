"""Cubes per second and core of each perturbation and of the mix.

Run `python -m benchmarks.perturb`, on a GPU with `--device cuda`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from trainer.transforms.draws import Draws
from trainer.transforms.elastic import deform
from trainer.transforms.genesis import perturb_genesis
from trainer.transforms.intensity import nonlinear_intensity
from trainer.transforms.paint import inpaint, outpaint
from trainer.transforms.rotate import rotate
from trainer.transforms.rubik import scramble_rubik
from trainer.transforms.shuffle import shuffle_pixels
from trainer.transforms.swap import swap_patches

PERTURBATIONS: dict[str, Callable[[Tensor, Draws], Tensor]] = {
    "elastic deformation": deform,
    "local shuffling": partial(shuffle_pixels, num_blocks=10_000),
    "non-linear intensity": nonlinear_intensity,
    "in-painting": inpaint,
    "out-painting": outpaint,
    "mix": partial(perturb_genesis, num_blocks=10_000),
    "patch swaps": swap_patches,
    "rotation": lambda cubes, draws: rotate(cubes, draws)[0],
    "Rubik's cube": lambda cubes, draws: scramble_rubik(cubes, draws, num_orders=100)[0],
}
OFFICIAL_CUBES_PER_S = 30.0


def measure(change: Callable[[Tensor, Draws], Tensor], cubes: Tensor, repeats: int) -> float:
    """The median of seconds a batch."""
    on_cpu = cubes.device.type == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter  # others' load does not count
    taken = []
    for repeat in range(repeats + 1):
        draws = Draws.keyed(0, "benchmark", repeat, rows=range(len(cubes)), device=cubes.device)
        began = clock()
        change(cubes, draws)
        if not on_cpu:
            torch.cuda.synchronize()
        taken.append(clock() - began)
    return sorted(taken[1:])[repeats // 2]  # the first one pays for tables and memory


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cubes = torch.rand(arguments.batch_size, 1, 32, 64, 64, device=arguments.device)
    print(f"batches of {arguments.batch_size} cubes of 32 x 64 x 64, one core, {arguments.device}")
    print(f"{'perturbation':<22}{'cubes/s':>10}{'ms/cube':>10}{'x official':>12}")
    for name, change in PERTURBATIONS.items():
        seconds = measure(change, cubes, arguments.repeats) / arguments.batch_size
        versus = f"{1 / seconds / OFFICIAL_CUBES_PER_S:.1f}" if name == "mix" else ""
        print(f"{name:<22}{1 / seconds:>10.0f}{seconds * 1e3:>10.2f}{versus:>12}")


if __name__ == "__main__":
    main()
