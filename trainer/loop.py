"""The training loop, from top to bottom.

`pretrain` opens the store, sets up or resumes a run, and trains. On the CPU a run that was
killed at any moment and resumed gives the same metrics and weights, bit for bit, as one that
was not (with the same number of threads).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from store import PatchStore, Split
from trainer.checkpoint import (
    BEST,
    LAST,
    Progress,
    load_checkpoint,
    refuse_other_run,
    save_checkpoint,
)
from trainer.config import TrainConfig, resolve_warmup
from trainer.errors import TrainError
from trainer.events import Ended, Event, Noticed, Saved, Started, Stepped, TrainSummary, Validated
from trainer.folder import hold_run, make_folder, write_config
from trainer.judge import Judge
from trainer.losses import Means
from trainer.models import build_unet, check_precision, check_shape
from trainer.perturb import Draws
from trainer.plan import EpochPlan, select_rows, thin
from trainer.pretexts import make_pretext
from trainer.record import Recorder
from trainer.stream import Batch, Stream
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
    check_shape(store.train.patch.shape[1:])
    make_folder(run)
    with hold_run(run):
        saved = load_checkpoint(run / LAST) if (run / LAST).exists() else None
        session = Session(store, run, config, saved, on_event)
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
    ) -> None:
        """Set up data, net and optimiser, from a checkpoint where there is one."""
        self.run, self.on_event, self.config = run, on_event, config
        self.pretext = make_pretext(config.pretext, num_blocks=config.shuffle_blocks)
        self.device = _pick_device(config.device)
        check_precision(config.precision, self.device, store.train.patch.shape[1:])
        self.fingerprint, self.num_classes = store.fingerprint or "", store.num_classes

        # Data
        self.train_stream = self._stream(store, store.train, validation=False)
        self.validation_stream = self._stream(store, store.validation, validation=True)
        steps_per_epoch = len(self.train_stream.plan)
        if not steps_per_epoch:
            raise TrainError(
                f"{store.path.name}: no train crops left; widen scales or excluded_classes"
            )
        saved_warmup = saved["config"]["warmup_epochs"] if saved else None
        self.config = config = resolve_warmup(config, steps_per_epoch, saved=saved_warmup)
        if saved:
            refuse_other_run(
                run / LAST, saved, fingerprint=self.fingerprint, config=config.to_dict()
            )
        self.warmup_epochs = config.warmup_epochs or 0
        self.total_steps = min(config.steps or 2**62, config.epochs * steps_per_epoch)

        # Net and optimiser
        self.net = build_unet(
            width=config.width,
            num_classes=self.num_classes if config.classify else None,
            decoder=self.pretext.decodes,
            seed=config.seed,
        )
        if saved:
            self.net.load_state_dict(saved["model"])
        elif config.init:
            load_weights(self.net, config.init, part=config.init_part)
        self.net.to(self.device)
        self.optimiser = self._make_optimiser()
        self.progress = Progress()
        if saved:
            self.optimiser.load_state_dict(saved["optimiser"])
            self.progress = Progress(**saved["progress"])
        self.judge = Judge(config, self.pretext, self.device)
        self.window = Means(self.device, self.progress.window)
        self.whole = Means(self.device, self.progress.whole)
        self._num_cubes = 0  # trained on by this session

        # Files
        now = self.progress
        self.pictured = self._read_pictured()
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
                self.whole = Means(self.device)
            self._set_learning_rate()
            self.net.train()
            self._start_clock()
            for batch in self.train_stream.epoch(now.epoch, start=now.batch):
                now.batch = batch.index + 1
                if not len(batch):  # every one of its rows was corrupt
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
        return TrainSummary(
            run=self.run,
            reason=reason,
            steps=now.step,
            epochs=now.epoch,
            best_step=now.best_step,
            best=now.best,
            last=now.last,
            num_skipped=len(self.train_stream.skipped) + len(self.validation_stream.skipped),
            seconds=time.perf_counter() - began,
            already_complete=already_complete,
        )

    def close(self) -> None:
        self.recorder.close()

    # One step

    def _step(self, batch: Batch) -> None:
        now, config = self.progress, self.config
        draws = Draws.keyed(config.seed, "train", now.epoch, batch.index, device=self.device)
        cubes, labels = batch.to(self.device)  # (n, 1, Z, Y, X), (n,)
        example = self.pretext.perturb(cubes, draws)
        with self.judge.autocast():
            output = self.net(example.inputs, restore=self._restores, classify=config.classify)
        losses = self.judge.losses(output, example if now.joint else None, labels)
        self.optimiser.zero_grad(set_to_none=True)
        losses["loss"].backward()
        self.optimiser.step()
        self._num_cubes += len(batch)
        self.window.add(losses, len(batch))
        self.whole.add(losses, len(batch))

    # Phases

    @property
    def _restores(self) -> bool:
        return self.progress.joint and self.pretext.decodes

    def _begin_joint_phase(self) -> None:
        """Go on from the weights of the warm-up, whose losses compare with nothing to come."""
        now = self.progress
        self.optimiser = self._make_optimiser()
        now.joint, now.best, now.best_step, now.best_epoch = True, {}, now.step, now.epoch

    def _make_optimiser(self) -> torch.optim.Adam:
        return torch.optim.Adam(self.net.parameters(), lr=self.config.learning_rate)

    def _set_learning_rate(self) -> None:
        config, now = self.config, self.progress
        epoch_of_phase = now.epoch - (self.warmup_epochs if now.joint else 0)
        rate = config.learning_rate * config.lr_gamma ** (epoch_of_phase // config.lr_step_epochs)
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
        restores = self._restores
        measured = self.judge.measure(self.net, self.validation_stream, restores=restores)
        metrics = measured or self.whole.values()  # without validation crops: of training
        self._refuse_nonsense(metrics["loss"])
        best = not now.best or metrics["loss"] < now.best["loss"]
        now.last = metrics
        if best:
            now.best, now.best_step, now.best_epoch = metrics, now.step, now.epoch
        self.recorder.write("validation", now.step, now.epoch, metrics)
        self._picture()
        if best:
            self._save(BEST)
        self.on_event(Validated(step=now.step, epoch=now.epoch, metrics=metrics, best=best))

    def _picture(self) -> None:
        """Show some perturbed, restored and original cubes; nothing before there is a decoder."""
        if self._restores:
            columns = self.judge.restore(self.net, self.pictured)
            self.recorder.picture(self.progress.step, columns)

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
        self._refuse_nonsense(metrics["loss"])
        self.window = Means(self.device)
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
        now.metrics_bytes = self.recorder.flush()
        save_checkpoint(
            self.run / name,
            {
                "fingerprint": self.fingerprint,
                "config": self.config.to_dict(),
                "num_classes": self.net.num_classes,
                "model": self.net.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "progress": dataclasses.asdict(now),
            },
        )
        self.on_event(Saved(step=now.step, path=self.run / name))

    # Setting up

    def _stream(self, store: PatchStore, split: Split, *, validation: bool) -> Stream:
        config = self.config
        rows = select_rows(
            split.label,
            split.scale,
            scales=None if validation else config.scales,
            excluded=config.excluded_classes,
        )
        if validation and config.validation_batches is not None:
            rows = thin(rows, config.validation_batches * config.batch_size)
        low, high = store.config.get("window_hu", (-1000, 1000))
        return Stream(
            split,
            EpochPlan(
                rows=rows, batch_size=config.batch_size, seed=config.seed, shuffle=not validation
            ),
            window_hu=(float(low), float(high)),
            threads=config.threads,
            skip_corrupt=config.skip_corrupt,
        )

    def _read_pictured(self) -> Tensor:
        """A few whole crops, spread over the validation rows (or the train rows)."""
        has_validation = len(self.validation_stream.plan) > 0
        stream = self.validation_stream if has_validation else self.train_stream
        cubes = stream.read(thin(stream.plan.rows, NUM_PICTURED)).cubes
        return cubes.to(self.device)


def _pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise TrainError(f"device {name!r} cannot be used here; give auto, cpu or cuda") from error
    return device
