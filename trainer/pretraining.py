"""Pretraining: `pretrain` sets up or resumes a run and trains; `Pretrainer` does one step."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from store import PatchStore
from store.errors import check_local
from trainer.checkpoint import LAST, RunState, load_checkpoint
from trainer.config import TrainConfig, suggest_batch_size
from trainer.data.dataset import Batch
from trainer.data.plan import thin
from trainer.device import describe_machine, memory_explained
from trainer.events import Ended, Event, Noticed, TrainSummary, ignore
from trainer.folder import open_run, write_config
from trainer.learner import Losses, Validation
from trainer.loop import Loop
from trainer.nnunet.read import parse_origins
from trainer.objective import Objective
from trainer.pretexts import Example, Pretext
from trainer.ranks import join_ranks
from trainer.recipe import Average, clip_gradient, make_optimiser, resume_optimiser
from trainer.setup import Setup, set_up

NUM_PICTURED = 8
_OWN = ("own_net", "own_pretext")
"""Facts of a run that its config.json contains, too."""
_LARGE_BATCH = 2
"""Times the default batch, in voxels, beyond which a run says how to need less memory."""


def pretrain(
    store: str | Path | PatchStore,
    run: str | Path,
    config: TrainConfig | None = None,
    *,
    net: nn.Module | None = None,
    pretext: type[Pretext] | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> TrainSummary:
    """Pretrain on a patch store; when called again on the same run, resume it.

    store
        An opened store, or its path.
    run
        Run directory: config.json, metrics.jsonl, last.pt, best.pt, samples.png (the latest
        restored crops), samples/ (earlier ones), tensorboard/. Created when missing.
    net
        A net of your own to train instead of the one that `config` names: any module that meets the
        protocol `trainer.nets.backbone.Backbone`, or `Encoder` for tasks that do not restore crops.
        Training starts from its weights and leaves the module itself unchanged; `load_weights`
        copies the trained weights into it. To resume, pass the same net again.
    pretext
        A pretext task of your own instead of the one that `config` names: a subclass of `Pretext`,
        called with the crops' (Z, Y, X) shape and `config`. To resume, pass it again.
    on_event
        Called with each event of `trainer.events` as it happens, in this thread.

    Raises TrainError when the run belongs to another store, settings or net, when another process
    is training in it, or when the loss is not finite; Interrupted (a KeyboardInterrupt), after a
    checkpoint, on Ctrl-C or SIGTERM; StoreError when the store cannot be read; CorruptStore naming
    split and rows when crops are corrupt.
    """
    check_local(run)
    store = store if isinstance(store, PatchStore) else PatchStore(store)
    run = Path(run)
    config = config or TrainConfig()
    with join_ranks(config.device) as ranks, contextlib.ExitStack() as stack:
        if ranks.is_main:
            stack.enter_context(open_run(run))
        ranks.wait()
        on_event = on_event if on_event and ranks.is_main else ignore
        saved = load_checkpoint(run / LAST) if (run / LAST).exists() else None
        setup = set_up(
            store, run, config, own_net=net, own_pretext=pretext, saved=saved, ranks=ranks
        )
        state = RunState.resume(saved, warmup_epochs=setup.warmup_epochs)
        pretrainer = Pretrainer(setup, state, saved=saved)
        loop = Loop(
            pretrainer,
            setup.train.batches,
            steps_per_epoch=len(setup.train),
            warmup_epochs=setup.warmup_epochs,
            run=run,
            config=setup.config,
            state=state,
            device=setup.device,
            ranks=ranks,
            facts=setup.facts,
            on_event=on_event,
            average=Average.resume(setup.net, setup.config, saved),
        )
        if ranks.is_main:
            own = {name: setup.facts[name] for name in _OWN if name in setup.facts}
            write_config(
                run,
                setup.config,
                store_fingerprint=setup.facts["fingerprint"],
                **describe_machine(setup.net, setup.device),
                **own,
            )
        for origin in parse_origins(setup.facts["origins"]) if not saved else ():
            on_event(Noticed(text=f"init: {origin}"))
        loop.announce(
            num_train=len(setup.train.plan.rows),
            num_validation=len(setup.validation.plan.rows),
            num_classes=setup.num_classes,
        )
        fitting = suggest_batch_size(store.crop_shape) * ranks.size
        at_once = setup.config.batch_size / setup.config.accumulate
        if at_once > _LARGE_BATCH * fitting:
            on_event(Noticed(text=_describe_batch(setup.config, store.crop_shape, fitting)))
        remedy = (
            "lower batch_size or raise accumulate in a new RUN, or resume with recompute, or with"
            " cache memory"
        )
        try:
            with memory_explained(setup.config.batch_size, remedy):
                summary = loop.train()
        finally:
            pretrainer.close()
        num_skipped = torch.tensor(
            len(setup.train.skipped) + len(setup.validation.skipped), device=setup.device
        )
        summary = dataclasses.replace(summary, num_skipped=int(ranks.sum(num_skipped)))
        on_event(Ended(summary=summary))
    return summary


def _describe_batch(config: TrainConfig, shape: tuple[int, ...], fitting: int) -> str:
    """What to do about a batch that is too large."""
    times = config.batch_size / config.accumulate / fitting
    return (
        f"batches of {config.batch_size} crops of {' x '.join(map(str, shape))} voxels need about"
        f" {times:.0f} times the memory of the default; to need less, use batch_size {fitting}, or"
        f" accumulate {math.ceil(config.batch_size / fitting)}"
    )


def _make_filler(batch: Batch) -> Batch:
    """A batch of one crop of air, made from another batch."""
    return dataclasses.replace(
        batch,
        rows=np.zeros(1, np.int64),
        labels=torch.zeros_like(batch.labels[:1]),
        crops=torch.full_like(batch.crops[:1], round(batch.window_hu[0])),
        zscores=None,
    )


class Pretrainer:
    """The net, its optimiser and its objective: one step, one validation."""

    def __init__(
        self, setup: Setup, state: RunState, *, saved: dict[str, Any] | None = None
    ) -> None:
        """Start with the weights in `setup`, and the optimiser of a checkpoint's content `saved`.

        state
            How far the run is; the loop updates it.
        """
        self.config, self.device, self.ranks = setup.config, setup.device, setup.ranks
        self.plan, self.validation, self.net, self.state = (
            setup.train.plan,
            setup.validation,
            setup.net,
            state,
        )
        self.objective = Objective(
            setup.config,
            setup.pretext,
            num_classes=setup.num_classes,
            device=setup.device,
            ranks=setup.ranks,
        )
        self.model = self._wrap()
        self.optimiser = make_optimiser(self.net, self.config, self.device)
        if saved:
            resume_optimiser(self.optimiser, saved["optimiser"])
        shown = setup.validation if len(setup.validation) else setup.train
        self.pictured = shown.read(thin(shown.plan.rows, NUM_PICTURED))
        self.filler = _make_filler(self.pictured)

    def step(self, batch: Batch) -> list[Losses]:
        """Do one optimiser step; return the losses of each part of the batch."""
        joint, parts, found = self.state.joint, self._split(batch), []
        # gradients are averaged over processes, whose parts of the batch may differ in size
        weight = self.ranks.size * self.plan.share(batch.index) / max(1, len(batch))
        self.optimiser.zero_grad(set_to_none=True)
        for number, (example, labels, num) in enumerate(parts, 1):
            with self._exchange_gradients(last=number == len(parts)):
                originals = self.objective.originals(example)
                with self.objective.autocast():
                    output = self.model(example.inputs, pretext=joint, originals=originals)
                losses = self.objective.losses(output, example if joint else None, labels)
                (losses["loss"] * (weight * num)).backward()
            if num:
                found.append(({name: value.detach() for name, value in losses.items()}, num))
        clip_gradient(self.net, self.config)
        self.optimiser.step()
        return found

    def validate(self, raise_if_interrupted: Callable[[], None]) -> Validation:
        """Measure the net; restore some crops to show, where there is a trained decoder."""
        result = self.objective.measure(
            self.net,
            self.validation,
            joint=self.state.joint,
            raise_if_interrupted=raise_if_interrupted,
        )
        if not (self.state.joint and self.net.decodes and self.ranks.is_main):
            return result
        pictured = self.objective.restore(self.net, self.pictured)
        return dataclasses.replace(result, pictured=pictured)

    def begin_joint_phase(self) -> None:
        """Train all weights with a new optimiser."""
        self.model = self._wrap()
        self.optimiser = make_optimiser(self.net, self.config, self.device)

    def close(self) -> None:
        """Stop exchanging gradients; must come before the processes disconnect."""
        self.model = self.net

    def _split(self, batch: Batch) -> list[tuple[Example, Tensor, int]]:
        """Perturb a batch, and split it into gradient-accumulation steps.

        Each part has perturbed crops, their labels, and the number of crops that count. Processes
        exchange numbers for every part, so all must have the same number of parts: a process with
        fewer crops fills up with an empty crop that does not count.
        """
        num_parts = self.config.accumulate
        parts: list[tuple[Example, Tensor, int]] = []
        if len(batch):
            example = self.objective.pretext.make_example(batch)
            split = zip(example.split(num_parts), batch.labels.tensor_split(num_parts), strict=True)
            parts = [(part, labels, len(labels)) for part, labels in split if len(labels)]
        if self.ranks.size > 1 and len(parts) < num_parts:
            example = self.objective.pretext.make_example(self.filler)
            parts += [(example, self.filler.labels, 0)] * (num_parts - len(parts))
        return parts

    def _exchange_gradients(self, *, last: bool) -> AbstractContextManager[None]:
        """Processes exchange gradients only in the last part of a step."""
        if last or not isinstance(self.model, DistributedDataParallel):
            return contextlib.nullcontext()
        no_sync: AbstractContextManager[None] = self.model.no_sync()
        return no_sync

    def _wrap(self) -> nn.Module:
        """The net as a step calls it: with several processes, gradients are averaged."""
        if self.ranks.size == 1:
            return self.net
        # DDP warns about 1x1x1 kernels, whose two layouts are the same bytes
        warnings.filterwarnings("ignore", message="Grad strides do not match")
        return DistributedDataParallel(self.net, find_unused_parameters=not self.state.joint)
