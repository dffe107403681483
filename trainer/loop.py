"""The training loop, from top to bottom.

`pretrain` opens the store, sets up or resumes a run, and trains. On the CPU a run that was
killed at any moment and resumed gives the same metrics and weights, bit for bit, as one that
was not (with the same number of threads).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from store import PatchStore, read_annotation
from trainer.checkpoint import (
    BEST,
    LAST,
    Progress,
    load_checkpoint,
    refuse_other_run,
    save_checkpoint,
)
from trainer.config import TrainConfig, resolve_precision, resolve_selection, resolve_warmup
from trainer.device import check_precision, pick_device, set_precision
from trainer.errors import TrainError
from trainer.events import Ended, Event, Noticed, Saved, Started, Stepped, TrainSummary, Validated
from trainer.folder import hold_run, make_folder, write_config
from trainer.judge import Judge
from trainer.losses import Means
from trainer.models import build_unet, check_shape
from trainer.perturb import Draws
from trainer.plan import thin
from trainer.pretexts import Example, make_pretext
from trainer.ranks import Ranks, join_ranks, sync_batch_norm
from trainer.record import Recorder
from trainer.stream import Batch, open_stream
from trainer.weights import load_weights

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
    another process, or its loss is no longer a number; StoreError when the store cannot be
    read; CorruptStore naming split and rows when crops are broken.
    """
    store, run = PatchStore(store_path), Path(run_path)
    config = config or TrainConfig()
    with join_ranks(config.device) as ranks, contextlib.ExitStack() as stack:
        if ranks.is_main:
            make_folder(run)
            stack.enter_context(hold_run(run))
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


class Session:
    """One process's work on a run."""

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
        self.run, self.on_event, self.ranks = run, on_event, ranks
        self.fingerprint, self.num_classes = store.fingerprint or "", store.num_classes
        shape = store.train.patch.shape[1:]
        before = saved["config"] if saved else {}

        # Settings
        self.device = pick_device(config.device, ranks)
        config = resolve_precision(config, self.device)
        self.config = config = resolve_selection(
            config,
            read_annotation(store.path).excluded,
            self.num_classes,
            saved=before.get("excluded_classes"),
        )
        self.pretext = make_pretext(config.pretext, shape, num_blocks=config.shuffle_blocks)
        check_shape(shape, self.pretext.blocks)
        check_precision(config.precision, self.device, shape, self.pretext.blocks)
        set_precision(config.precision)

        # Data
        self.train_stream = open_stream(store, store.train, config, self.device, ranks)
        self.validation_stream = open_stream(store, store.validation, config, self.device, ranks)
        steps_per_epoch = len(self.train_stream.plan)
        if not steps_per_epoch:
            raise TrainError(
                f"{store.path.name}: no train crops left; choose more scales or classes"
            )
        self.config = config = resolve_warmup(
            config, steps_per_epoch, saved=before.get("warmup_epochs")
        )
        if saved:
            refuse_other_run(
                run / LAST,
                saved,
                fingerprint=self.fingerprint,
                config=config.to_dict(),
                num_processes=ranks.size,
            )
        self.warmup_epochs = config.warmup_epochs or 0
        self.total_steps = min(config.steps or 2**62, config.epochs * steps_per_epoch)

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
        self.net.to(self.device)
        if config.sync_batch_norm and ranks.size > 1:
            sync_batch_norm(self.net)
        if config.compile:
            self.net.compile()
        self.progress = Progress(**saved["progress"]) if saved else Progress()
        self.model = self._wrap()
        self.optimiser = self._make_optimiser()
        if saved:
            self.optimiser.load_state_dict(saved["optimiser"])
        self.judge = Judge(config, self.pretext, self.device, self.num_classes, ranks)
        now = self.progress
        mine = ranks.is_main  # sums of a checkpoint are over all processes
        self.window = Means(self.device, now.window if mine else {}, ranks)
        self.whole = Means(self.device, now.whole if mine else {}, ranks)
        self._num_cubes = 0  # trained on by this session, by all processes

        # Files
        self.pictured = self._read_pictured()
        self.recorder: Recorder | None = None
        if ranks.is_main:
            write_config(run, config, self.fingerprint)
            self.recorder = Recorder(run, size=now.metrics_bytes, step=now.step)

    def train(self) -> TrainSummary:
        """Train until a limit is reached or nothing improves."""
        now, config = self.progress, self.config
        began = time.perf_counter()
        self._announce()
        reason = self._reason_to_stop()
        already_complete = reason is not None
        while not reason:
            if not now.joint and now.epoch >= self.warmup_epochs:
                self._begin_joint_phase()
            if now.batch == 0:
                self.whole = Means(self.device, ranks=self.ranks)
            self._set_learning_rate()
            self.net.train()
            self._start_clock()
            for batch in self.train_stream.epoch(now.epoch, start=now.batch):
                now.batch = batch.index + 1
                if not len(batch) and self.ranks.size == 1:  # every one of its rows was corrupt
                    continue
                self._step(batch)
                now.step += 1
                if now.step % config.log_every == 0:
                    self._log()
                if now.step == self.total_steps:
                    break
                if now.step % config.checkpoint_every == 0:
                    self._save()
            if self.window.values():  # no line spans two epochs, let alone two phases
                self._log()
            if not self.whole.values():
                raise TrainError(
                    "no train crop of a whole epoch could be read; run `semgen verify`"
                )
            epoch_done = now.batch == len(self.train_stream.plan)
            if epoch_done:
                now.epoch, now.batch = now.epoch + 1, 0
            if (
                self._reason_to_stop()
                or now.epoch % config.validate_every == 0
                or now.epoch == self.warmup_epochs
            ):
                self._validate()
            reason = self._reason_to_stop()
            self._save()
        skipped = len(self.train_stream.skipped) + len(self.validation_stream.skipped)
        return TrainSummary(
            run=self.run,
            reason=reason,
            steps=now.step,
            epochs=now.epoch,
            best_step=now.best_step,
            best=now.best,
            last=now.last,
            num_skipped=int(self.ranks.sum(torch.tensor(skipped, device=self.device))),
            seconds=time.perf_counter() - began,
            already_complete=already_complete,
        )

    def close(self) -> None:
        self.model = self.net  # what exchanges gradients must go before the processes part
        if self.recorder:
            self.recorder.close()

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
        self._num_cubes += len(batch) * self.ranks.size

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

    def _begin_joint_phase(self) -> None:
        """Go on from the weights of the warm-up, whose losses compare with nothing to come."""
        now = self.progress
        now.joint, now.best, now.best_step, now.best_epoch = True, {}, now.step, now.epoch
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

    def _set_learning_rate(self) -> None:
        config, now = self.config, self.progress
        epoch_of_phase = now.epoch - (self.warmup_epochs if now.joint else 0)
        by_schedule = {"step": epoch_of_phase // config.lr_step_epochs, "plateau": now.lr_cuts}
        rate = config.learning_rate * config.lr_gamma ** by_schedule[config.lr_schedule]
        for group in self.optimiser.param_groups:
            group["lr"] = rate

    def _reason_to_stop(self) -> str | None:
        now, config = self.progress, self.config
        if now.epoch >= config.epochs:
            return "epochs"
        if now.step >= self.total_steps:
            return "steps"
        if now.joint and now.best and now.epoch - now.best_epoch >= config.patience:
            return "patience"
        return None

    # Validation

    def _validate(self) -> None:
        """Measure, and keep the weights when they are the best so far."""
        now = self.progress
        self.ranks.share_buffers(self.net)
        measured = self.judge.measure(self.net, self.validation_stream, joint=now.joint)
        metrics = measured or self.whole.values()  # without validation crops: of training
        self._refuse_nonsense(metrics["loss"])
        best = not now.best or metrics["loss"] < now.best["loss"]
        now.last = metrics
        if best:
            now.best, now.best_step, now.best_epoch = metrics, now.step, now.epoch
        since = now.epoch - max(now.best_epoch, now.lr_cut_epoch)
        if self.config.lr_schedule == "plateau" and since >= self.config.lr_step_epochs:
            now.lr_cuts, now.lr_cut_epoch = now.lr_cuts + 1, now.epoch
        if self.recorder:
            self.recorder.write("validation", now.step, now.epoch, metrics)
            self._picture(self.recorder)
        if best:
            self._save(BEST)
        self.on_event(Validated(step=now.step, epoch=now.epoch, metrics=metrics, best=best))

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

    def _start_clock(self) -> None:
        step, waited_s = self.progress.step, self.train_stream.waited_s
        self._clock = (time.perf_counter(), waited_s, step, self._num_cubes)

    def _log(self) -> None:
        """One line of metrics, the mean since the last one."""
        now = self.progress
        metrics = self.window.values()
        if not metrics:  # of corrupt batches alone
            return
        self._refuse_nonsense(metrics["loss"])
        self.window = Means(self.device, ranks=self.ranks)
        if not self.recorder:
            return
        rate = self.optimiser.param_groups[0]["lr"]
        self.recorder.write("train", now.step, now.epoch, {**metrics, "learning_rate": rate})
        began, waited_s, step, cubes = self._clock
        elapsed_s = time.perf_counter() - began
        steps_per_s = (now.step - step) / elapsed_s
        cubes_per_s = (self._num_cubes - cubes) / elapsed_s
        wait_share = (self.train_stream.waited_s - waited_s) / elapsed_s
        self.recorder.chart(now.step, {"rate/cubes_per_s": cubes_per_s, "rate/wait": wait_share})
        self._start_clock()
        self.on_event(
            Stepped(
                step=now.step,
                total_steps=self.total_steps,
                epoch=now.epoch,
                metrics=metrics,
                learning_rate=rate,
                cubes_per_s=cubes_per_s,
                wait_share=wait_share,
                remaining_s=(self.total_steps - now.step) / steps_per_s if steps_per_s else 0.0,
            )
        )

    def _refuse_nonsense(self, loss: float) -> None:
        if math.isfinite(loss):
            return
        raise TrainError(
            f"loss is {loss} at step {self.progress.step}: training diverged; {LAST} keeps the last"
            " good state; start another RUN with a lower learning_rate, or with precision fp32"
        )

    def _save(self, name: str = LAST) -> None:
        """Write a checkpoint, unless the weights are no longer numbers."""
        now = self.progress
        if not all(bool(value.isfinite().all()) for value in self.net.state_dict().values()):
            self._refuse_nonsense(math.nan)
        now.window, now.whole = self.window.sums(), self.whole.sums()
        if not self.recorder:
            return
        now.metrics_bytes = self.recorder.flush()
        save_checkpoint(
            self.run / name,
            {
                "fingerprint": self.fingerprint,
                "config": self.config.to_dict(),
                "num_processes": self.ranks.size,
                "num_classes": self.net.num_classes,
                "model": self.net.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "progress": dataclasses.asdict(now),
            },
        )
        self.on_event(Saved(step=now.step, path=self.run / name))

    # Setting up

    def _read_pictured(self) -> Tensor:
        """A few whole crops, spread over the validation rows (or the train rows)."""
        has_validation = len(self.validation_stream.plan) > 0
        stream = self.validation_stream if has_validation else self.train_stream
        return stream.load(stream.read(thin(stream.plan.rows, NUM_PICTURED)))[0]
