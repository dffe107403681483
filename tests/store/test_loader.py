"""A split in a loader of torch."""

from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from store import PatchStore


def test_a_loader_of_torch_reads_a_split_in_spawned_workers(patches: PatchStore) -> None:
    loader: DataLoader[Any] = DataLoader(
        range(4),  # type: ignore[arg-type]
        batch_size=2,
        num_workers=1,
        multiprocessing_context="spawn",
        collate_fn=patches.train.read,
    )
    found = np.concatenate([batch.numpy() for batch in map(torch.as_tensor, loader)])
    np.testing.assert_array_equal(found, patches.train.read(range(4)))
