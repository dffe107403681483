"""Pretraining, from top to bottom: `pretrain` opens the store, sets up or resumes a run, trains."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from store import PatchStore, read_annotation
from store.geometry import scan_name
from trainer.checkpoint import LAST, load_checkpoint, refuse_other_run
from trainer.config import TrainConfig
from trainer.data.plan import thin
from trainer.data.stream import Batch, open_stream
from trainer.device import check_precision, pick_device, set_precision
from trainer.errors import TrainError
from trainer.events import Ended, Event, Noticed, Started, TrainSummary
from trainer.folder import open_run, write_config
from trainer.loop import Loop
from trainer.nets.unet import UNet3D, build_unet, check_shape
from trainer.objective import Judge
from trainer.pretexts import Example, make_pretext
from trainer.ranks import Ranks, join_ranks, sync_batch_norm
from trainer.record import Recorder
from trainer.resolve import resolve_init, resolve_precision, resolve_selection, resolve_warmup
from trainer.transforms.perturb import Draws
from trainer.weights import load_weights, read_weights

NUM_PICTURED = 8


def pretrain(
    store_path: str | Path,
    run_path: str | Path,
    config: TrainConfig | None = None,
    *,
    on_event: Callable[[Event], None] = lambda event: None,
) -> TrainSummary:
    """Pretrain on a patch store; called again on the same run, go on where it stopped.

    run_path
        Folder of the run: config.json, metrics.jsonl, last.pt, best.pt, samples.png,
        tensorboard/. Made when missing.
    on_event
        Called with each event of `trainer.events` as it happens, in this thread.

    Raises TrainError when the run is of another store or other settings, is being written by
    another process, or its loss is no longer a number; Interrupted (a KeyboardInterrupt), after
    writing a checkpoint, on Ctrl-C or SIGTERM; StoreError when the store cannot be
    read; CorruptStore naming split and rows when crops are broken.
    """
    store, run = PatchStore(store_path), Path(run_path)
    config = config or TrainConfig()
    with join_ranks(config.device) as ranks, contextlib.ExitStack() as stack:
        if ranks.is_main:
            stack.enter_context(open_run(run))
        ranks.wait()
        saved = load_checkpoint(run / LAST) if (run / LAST).exists() else None
        on_event = on_event if ranks.is_main else lambda event: None
        session = Session(store, run, config, saved, on_event, ranks)
        try:
            summary = session.train()
        finally:
            session.close()
        on_event(Ended(summary=summary))
    return summary


class Session(Loop[Batch]):
    """One process's work on a run."""

    config: TrainConfig
    net: UNet3D

    def __init__(
        self,
        store: PatchStore,
        run: Path,
        config: TrainConfig,
        saved: dict[str, Any] | None,
        on_event: Callable[[Event], None],
        ranks: Ranks,
    ) -> None:
        """Set up data, net and optimiser, from a checkpoint where there is one."""
        fingerprint, self.num_classes = store.fingerprint or "", store.num_classes
        shape = store.train.patch.shape[1:]
        before = saved["config"] if saved else {}

        # Settings
        device = pick_device(config.device, ranks)
        config = resolve_precision(config, device)
        if saved:
            config = resolve_init(config, saved=before)
        config = resolve_selection(
            config,
            read_annotation(store.path).excluded,
            self.num_classes,
            saved=before.get("excluded_classes"),
        )
        self.pretext = make_pretext(config.pretext, shape, num_blocks=config.shuffle_blocks)
        check_shape(shape, self.pretext.blocks)
        check_precision(config.precision, device, shape, self.pretext.blocks)
        set_precision(config.precision)

        # Data
        self.train_stream = open_stream(store, store.train, config, device, ranks)
        self.validation_stream = open_stream(store, store.validation, config, device, ranks)
        steps_per_epoch = len(self.train_stream.plan)
        if not steps_per_epoch:
            raise TrainError(
                f"{store.path.name}: no train crops left; choose more scales or classes"
            )
        config = resolve_warmup(config, steps_per_epoch, saved=before.get("warmup_epochs"))
        if saved:
            refuse_other_run(
                run / LAST,
                saved,
                fingerprint=fingerprint,
                config=config,
                num_processes=ranks.size,
            )
        self.warmup_epochs = config.warmup_epochs or 0

        # Net and optimiser
        self.net = build_unet(
            seed=config.seed,
            width=config.width,
            num_classes=self.num_classes if config.classify else None,
            decoder=self.pretext.decodes,
            head=self.pretext.make_head,
            blocks=self.pretext.blocks,
        )
        if saved:
            self.net.load_state_dict(saved["model"])
        elif config.init:
            load_weights(self.net, config.init, part=config.init_part)
        self.net.to(device)
        if config.sync_batch_norm and ranks.size > 1:
            sync_batch_norm(self.net)
        if config.compile:
            self.net.compile()
        super().__init__(
            run,
            config,
            fingerprint=fingerprint,
            steps_per_epoch=steps_per_epoch,
            device=device,
            ranks=ranks,
            saved=saved,
            on_event=on_event,
        )
        self.model = self._wrap()
        self.optimiser = self._make_optimiser()
        if saved:
            self.optimiser.load_state_dict(saved["optimiser"])
        self.judge = Judge(config, self.pretext, device, self.num_classes, ranks)
        self.pictured = self._read_pictured()
        before_us: list[str] = []
        if saved:
            before_us = saved["scans"]
        elif config.init:
            before_us = read_weights(config.init, part=config.init_part).metadata.get("scans", [])
        self.scans = sorted({*before_us, *self._name_scans(store)})
        if ranks.is_main:
            write_config(run, config, store_fingerprint=fingerprint)

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        return self.train_stream.epoch(epoch, start=start)

    @property
    def _waited_s(self) -> float:
        return self.train_stream.waited_s

    @property
    def _num_skipped(self) -> int:
        return len(self.train_stream.skipped) + len(self.validation_stream.skipped)

    def _facts(self) -> dict[str, Any]:
        return {
            "num_classes": self.net.num_classes,
            "scans": self.scans,
            "window_hu": list(self.train_stream.window_hu),
        }

    # One step

    def _step(self, batch: Batch) -> None:
        now = self.progress
        self.optimiser.zero_grad(set_to_none=True)
        parts = self._parts(batch)
        # Gradients are averaged over processes, whose shares of the batch may differ in size.
        weight = self.ranks.size * self.train_stream.plan.share(batch.index) / max(1, len(batch))
        for place, (example, labels, num) in enumerate(parts, 1):
            with self._gradients_shared(last=place == len(parts)):
                with self.judge.autocast():
                    output = self.model(example.inputs, pretext=now.joint)
                losses = self.judge.losses(output, example if now.joint else None, labels)
                (losses["loss"] * (weight * num)).backward()
            if num:
                self.window.add(losses, num)
                self.whole.add(losses, num)
        self.optimiser.step()

    def _parts(self, batch: Batch) -> list[tuple[Example, Tensor, int]]:
        """What one pass each takes: perturbed cubes, their labels, how many count.

        Processes exchange numbers in every pass, so all make as many: one that has fewer crops
        fills up with a cube of nothing that does not count.
        """
        num_parts, parts = self.config.accumulate, []
        if len(batch):
            cubes, labels = self.train_stream.load(batch)  # (n, 1, Z, Y, X), (n,)
            example = self._perturb(cubes, batch.rows)
            split = (values.tensor_split(num_parts) for values in (*example, labels))
            parts = [
                (Example(inputs, target), named, len(named))
                for inputs, target, named in zip(*split, strict=True)
                if len(named)
            ]
        if self.ranks.size > 1 and len(parts) < num_parts:
            nothing = torch.zeros_like(self.pictured[:1])
            label = torch.zeros(1, dtype=torch.long, device=self.device)
            filler = (self._perturb(nothing, np.zeros(1, np.int64)), label, 0)
            parts += [filler] * (num_parts - len(parts))
        return parts

    def _perturb(self, cubes: Tensor, rows: NDArray[np.int64]) -> Example:
        seed, epoch = self.config.seed, self.progress.epoch
        draws = Draws.keyed(seed, "train", epoch, rows=rows, device=self.device)
        return self.pretext.perturb(cubes, draws)

    def _gradients_shared(self, *, last: bool) -> AbstractContextManager[None]:
        """Processes exchange gradients with the last part of a step only."""
        if last or not isinstance(self.model, DistributedDataParallel):
            return contextlib.nullcontext()
        no_sync: AbstractContextManager[None] = self.model.no_sync()
        return no_sync

    # Phases

    @property
    def _restores(self) -> bool:
        return self.progress.joint and self.pretext.decodes

    @property
    def _phase_began(self) -> int:
        return self.warmup_epochs if self.progress.joint else 0

    @property
    def _may_lose_patience(self) -> bool:
        return self.progress.joint

    def _begin_epoch(self) -> None:
        if not self.progress.joint and self.progress.epoch >= self.warmup_epochs:
            self._begin_joint_phase()

    def _begin_joint_phase(self) -> None:
        """Start the joint phase from the weights of the warm-up, with a schedule of its own.

        Losses of the warm-up are not comparable with what follows.
        """
        now = self.progress
        now.joint, now.best, now.best_step, now.best_epoch = True, {}, now.step, now.epoch
        now.lr_cuts, now.lr_cut_epoch = 0, now.epoch
        self.model = self._wrap()
        self.optimiser = self._make_optimiser()

    def _wrap(self) -> nn.Module:
        """The net as the step calls it: gradients are averaged over processes."""
        if self.ranks.size == 1:
            return self.net
        # of a 1 x 1 x 1 kernel, whose layout is the same either way
        warnings.filterwarnings("ignore", message="Grad strides do not match")
        return DistributedDataParallel(self.net, find_unused_parameters=not self.progress.joint)

    def _make_optimiser(self) -> torch.optim.Adam:
        fused = self.device.type == "cuda"
        return torch.optim.Adam(self.net.parameters(), lr=self.config.learning_rate, fused=fused)

    # Validation

    def _is_time_to_validate(self) -> bool:
        return super()._is_time_to_validate() or self.progress.epoch == self.warmup_epochs

    def _measure(self) -> dict[str, float]:
        return self.judge.measure(
            self.net,
            self.validation_stream,
            joint=self.progress.joint,
            heed=self._heed_signals,
        )

    def _picture(self, recorder: Recorder) -> None:
        """Show some perturbed, restored and original cubes, and which classes are confused."""
        if self._restores:  # else there is no decoder yet
            recorder.picture(self.progress.step, self.judge.restore(self.net, self.pictured))
        if self.judge.confusion is not None:
            recorder.confusion(self.progress.step, self.judge.confusion.cpu().numpy())

    # Telling

    def _announce(self) -> None:
        plan = self.train_stream.plan
        self.on_event(
            Started(
                run=self.run,
                fingerprint=self.fingerprint,
                num_train=len(plan.rows),
                num_validation=len(self.validation_stream.plan.rows),
                num_classes=self.num_classes,
                num_parameters=sum(p.numel() for p in self.net.parameters()),
                device=str(self.device),
                steps_per_epoch=len(plan),
                total_steps=self.total_steps,
                warmup_epochs=self.warmup_epochs,
                resumed_at=self.progress.step,
            )
        )
        if not len(self.validation_stream.plan):
            text = "no validation crops: the best weights are chosen by training loss"
            self.on_event(Noticed(text=text))

    # Setting up

    def _name_scans(self, store: PatchStore) -> list[str]:
        """Pseudonyms of all scans that shape the weights, so that no one tests on them."""
        used = [
            split.scan[stream.plan.rows]
            for split, stream in (
                (store.train, self.train_stream),
                (store.validation, self.validation_stream),
            )
        ]
        return [scan_name(store.scans.id[row]) for row in np.unique(np.concatenate(used))]

    def _read_pictured(self) -> Tensor:
        """A few whole crops, spread over the validation rows (or the train rows)."""
        has_validation = len(self.validation_stream.plan) > 0
        stream = self.validation_stream if has_validation else self.train_stream
        return stream.load(stream.read(thin(stream.plan.rows, NUM_PICTURED)))[0]
