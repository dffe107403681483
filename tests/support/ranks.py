"""Training by two processes without torchrun, whose start takes longer than the training."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import torch

from tests.support.command import start_server
from trainer import TrainConfig, pretrain


def train_by_two(store: Path, run: Path, config: TrainConfig) -> None:
    """Pretrain in two forked processes. Raises ProcessRaisedException with the first error."""
    start_server()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(
        _train, (port, store, run, config), nprocs=2, start_method="forkserver"
    )


def _train(rank: int, port: int, store: Path, run: Path, config: TrainConfig) -> None:
    """What each process does, with the variables that every launcher sets."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    pretrain(store, run, config)
