"""Memory of batches is used again, and only when nothing refers to it."""

import pickle

import torch

from trainer.data.buffers import Buffers


def test_memory_that_nothing_refers_to_is_used_again() -> None:
    buffers = Buffers(2)
    address = buffers.take((3, 4)).ctypes.data
    assert buffers.take((2, 4)).ctypes.data == address


def test_memory_of_a_tensor_or_of_a_view_of_it_is_not_used_again() -> None:
    buffers = Buffers(2)
    kept = torch.from_numpy(buffers.take((3, 4)))[1:, 2].numpy()
    kept[:] = 7
    for _ in range(5):
        buffers.take((3, 4))[:] = 0
    assert (kept == 7).all()


def test_a_larger_batch_or_one_of_another_shape_gets_other_memory() -> None:
    buffers = Buffers(4)
    buffers.take((3, 4))
    assert buffers.take((5, 4)).shape == (5, 4)
    assert buffers.take((3, 2)).shape == (3, 2)


def test_more_batches_than_are_kept_can_be_in_use() -> None:
    buffers = Buffers(1)
    addresses = {array.ctypes.data for array in [buffers.take((3, 4)) for _ in range(4)]}
    assert len(addresses) == 4


def test_a_copy_for_another_process_begins_without_memory() -> None:
    buffers = Buffers(2)
    held = buffers.take((3, 4))
    copy = pickle.loads(pickle.dumps(buffers))
    assert copy.take((3, 4)).ctypes.data != held.ctypes.data
