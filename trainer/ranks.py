"""Training with several processes, as torchrun starts them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


@dataclass(frozen=True, slots=True)
class Ranks:
    """The number of this process among all processes of the training."""

    rank: int = 0
    size: int = 1
    local: int = 0
    """Number among the processes of this machine, and number of its GPU."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and reports events."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, holds: bool, device: torch.device) -> bool:
        """Whether something is true in any process; all processes must call this together."""
        if self.size == 1:
            return holds
        return bool(self.sum(torch.tensor(int(holds), device=device)))

    def union(self, names: list[str]) -> list[str]:
        """The union of all processes' names, in the same order everywhere."""
        if self.size == 1:
            return names
        found: list[list[str]] = [[] for _ in range(self.size)]
        dist.all_gather_object(found, names)
        return list(dict.fromkeys(name for names in found for name in names))

    def share_buffers(self, net: nn.Module) -> None:
        """Copy the batch-norm statistics of the first process to all others."""
        if self.size > 1:
            for buffer in net.buffers():
                dist.broadcast(buffer, 0)

    def wait(self) -> None:
        """Wait until all processes call this."""
        if self.size > 1:
            dist.barrier()


@contextlib.contextmanager
def join_ranks(device: str) -> Iterator[Ranks]:
    """Connect to the other processes if torchrun started several; disconnect at the end."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size(), _find_local(dist.get_rank()))
        return
    if size == 1:
        yield Ranks()
        return
    rank = int(os.environ["RANK"])
    ranks = Ranks(rank, size, _find_local(rank))
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(ranks.local)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield ranks
    finally:
        dist.destroy_process_group()


def _find_local(rank: int) -> int:
    """The number among the processes of this machine; by default, one process for each GPU."""
    default = rank % max(1, torch.cuda.device_count())
    return int(os.environ.get("LOCAL_RANK", default))


class SyncedBatchNorm3d(nn.BatchNorm3d):
    """Batch norm over the batches of all processes, on any device; torch's own needs a GPU."""

    def forward(self, x: Tensor) -> Tensor:  # (n, c, Z, Y, X), as the result
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        values = x.float()
        axes, wide = (0, 2, 3, 4), (None, slice(None), None, None, None)
        count = torch.tensor([values.numel() / values.shape[1]], device=x.device)
        sums = all_reduce(torch.cat((values.sum(axes), count)))
        mean, count = sums[:-1] / sums[-1], sums[-1].detach()
        centred = values - mean[wide]
        var = all_reduce(centred.square().sum(axes)) / count
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        scale = self.weight / (var + self.eps).sqrt()
        normed: Tensor = (centred * scale[wide] + self.bias[wide]).to(x.dtype)
        return normed


def sync_batch_norm(net: nn.Module) -> None:
    """Make every batch norm of a net synchronised; weights and keys stay the same."""
    for module in net.modules():
        if type(module) is nn.BatchNorm3d:
            module.__class__ = SyncedBatchNorm3d
