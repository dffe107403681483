"""Activation checkpointing: a net's stages keep their inputs only, and are run again backward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute_stages(stages: Iterable[nn.Module]) -> None:
    """Change modules so that their activations are recomputed in the backward pass.

    Numbers, keys and weights stay the same. Call it before the net is compiled or wrapped for
    several processes. Stages must not contain each other.
    """
    for stage in stages:
        stage.forward = _recomputed(stage)


def _recomputed(stage: nn.Module) -> Callable[..., Any]:
    forward = stage.forward

    def run(*inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs)
        if torch.compiler.is_compiling():  # a compiled net writes its statistics once by itself
            return checkpoint(forward, *inputs, use_reentrant=False)

        def contexts() -> tuple[Any, Any]:
            return contextlib.nullcontext(), _buffers_unchanged(stage)

        return checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts)

    return run


@contextlib.contextmanager
def _buffers_unchanged(stage: nn.Module) -> Iterator[None]:
    """Within it, buffers are copies, so that batch norm does not count a batch a second time."""
    own = [
        (module, name, buffer)
        for module in stage.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    for module, name, buffer in own:
        setattr(module, name, buffer.clone())
    try:
        yield
    finally:
        for module, name, buffer in own:
            setattr(module, name, buffer)
