"""The loop that every training shares: epochs, learning rate, patience, metrics, checkpoints.

A subclass says what a step learns from a batch and how it is measured. On the CPU a run that was
killed at any moment and resumed gives the same metrics and weights, bit for bit, as one that was
not (with the same number of threads). Ctrl-C and SIGTERM end training between two steps, after a
checkpoint.
"""

from __future__ import annotations

import dataclasses
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import nn

from store.settings import to_json
from trainer.checkpoint import BEST, LAST, Progress, save_checkpoint
from trainer.config import LoopConfig
from trainer.errors import Diverged, TrainError
from trainer.events import Event, Saved, Stepped, TrainSummary, Validated
from trainer.interrupt import Interrupted, Interruption, watch_signals
from trainer.losses import Means
from trainer.ranks import Ranks
from trainer.record import Recorder


class Indexed(Protocol):
    """A batch: its place in the epoch, from 0, and how many examples it has."""

    @property
    def index(self) -> int: ...

    def __len__(self) -> int: ...


Batch = TypeVar("Batch", bound=Indexed)


class Loop(ABC, Generic[Batch]):
    """One process's work on a run.

    A subclass sets `net`, `model` (the net as a step calls it) and `optimiser` before it trains.
    """

    config: LoopConfig
    net: nn.Module
    model: nn.Module
    optimiser: torch.optim.Optimizer

    def __init__(
        self,
        run: Path,
        config: LoopConfig,
        *,
        fingerprint: str,
        steps_per_epoch: int,
        device: torch.device,
        ranks: Ranks,
        saved: dict[str, Any] | None,
        on_event: Callable[[Event], None],
    ) -> None:
        """Start, or go on from what a checkpoint saved.

        fingerprint
            Identifies what is trained on.
        """
        self.run, self.fingerprint, self.device, self.ranks = run, fingerprint, device, ranks
        self.config, self.on_event = config, on_event
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = min(config.steps or 2**62, config.epochs * steps_per_epoch)
        self.progress = now = Progress(**saved["progress"]) if saved else Progress()
        mine = ranks.is_main  # sums of a checkpoint are over all processes
        self.window = Means(device, now.window if mine else {}, ranks)
        self.whole = Means(device, now.whole if mine else {}, ranks)
        self._num_examples = 0  # trained on by this session, by all processes
        self.recorder: Recorder | None = None
        self._interruption = Interruption()
        self._saved_at = time.monotonic()

    # What a subclass says

    @abstractmethod
    def _announce(self) -> None:
        """Tell of the run with a `Started` event."""

    @abstractmethod
    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        """The batches of an epoch from the `start`-th on, always the same ones."""

    @abstractmethod
    def _step(self, batch: Batch) -> None:
        """One step of the optimiser; add its losses, "loss" among them, to both means."""

    @abstractmethod
    def _measure(self) -> dict[str, float]:
        """Metrics of a validation, "loss" among them; empty when there is nothing to measure."""

    @abstractmethod
    def _facts(self) -> dict[str, Any]:
        """What a checkpoint holds besides settings, weights and progress."""

    def _begin_epoch(self) -> None:
        """Called before each epoch, or what is left of it."""

    def _picture(self, recorder: Recorder) -> None:
        """Show something after a validation."""

    @property
    def _phase_began(self) -> int:
        """Epoch from which the learning rate's schedule counts."""
        return 0

    @property
    def _may_lose_patience(self) -> bool:
        return True

    @property
    def _waited_s(self) -> float:
        """Seconds that training has waited for data."""
        return 0.0

    @property
    def _num_skipped(self) -> int:
        """Examples that could not be read."""
        return 0

    # The loop

    def train(self) -> TrainSummary:
        """Train until a limit is reached or nothing improves.

        Raises Interrupted, after a checkpoint, when Ctrl-C or SIGTERM asked to stop.
        """
        with watch_signals(forgive_second=self.ranks.size > 1) as self._interruption:
            return self._train()

    def _train(self) -> TrainSummary:
        now = self.progress
        began = time.perf_counter()
        if self.ranks.is_main:
            self.recorder = Recorder(self.run, size=now.metrics_bytes, step=now.step)
        self._announce()
        reason = None if now.unvalidated else self._reason_to_stop()
        already_complete = reason is not None
        self._saved_at = time.monotonic()
        while not reason:
            now.unvalidated = False
            self._begin_epoch()
            self._train_epoch()
            place = now.epoch, now.batch
            if now.batch == self.steps_per_epoch:
                now.epoch, now.batch = now.epoch + 1, 0
            if self._is_time_to_validate():
                try:
                    self._validate()
                except Interrupted:  # validate when resumed
                    (now.epoch, now.batch), now.unvalidated = place, True
                    self._save()
                    raise
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
            num_skipped=int(self.ranks.sum(torch.tensor(self._num_skipped, device=self.device))),
            seconds=time.perf_counter() - began,
            already_complete=already_complete,
        )

    def _train_epoch(self) -> None:
        """The steps of an epoch, or what is left of it."""
        now, config = self.progress, self.config
        if now.batch == 0:
            self.whole = Means(self.device, ranks=self.ranks)
        self._set_learning_rate()
        self.net.train()
        self._start_clock()
        for batch in self._batches(now.epoch, now.batch):
            if now.step == self.total_steps:
                break
            now.batch = batch.index + 1
            if not len(batch) and self.ranks.size == 1:  # every one of its rows was corrupt
                continue
            self._step(batch)
            self._num_examples += len(batch) * self.ranks.size
            now.step += 1
            if now.step % config.log_every == 0:
                self._log()
            if now.step < self.total_steps:
                self._save_between_steps()
        if self.window.values():  # no line spans two epochs, let alone two phases
            self._log()
        if not self.whole.values():
            raise TrainError("no train crop of a whole epoch could be read; run `semgen verify`")

    def _save_between_steps(self) -> None:
        """Write a checkpoint where one is due; raise Interrupted where a signal asks to stop.

        Several processes agree on clocks and signals where they exchange losses anyway: doing it
        at each step would make a GPU wait for the CPU.
        """
        now, config = self.progress, self.config
        due, stop = now.step % config.checkpoint_every == 0, False
        if self.ranks.size == 1 or now.step % config.log_every == 0:
            late = time.monotonic() - self._saved_at >= 60 * config.checkpoint_minutes
            stop = self.ranks.any(self._interruption.requested, self.device)
            due = self.ranks.any(due or late, self.device) or stop
        if due:
            self._save()
        if stop:
            raise Interrupted

    def _heed_signals(self) -> None:
        """Called within a validation: raise Interrupted where a signal asks to stop.

        Several processes validate to the end, for they exchange numbers in the meantime.
        """
        if self._interruption.requested and self.ranks.size == 1:
            raise Interrupted

    def close(self) -> None:
        self.model = self.net  # what exchanges gradients must go before the processes part
        if self.recorder:
            self.recorder.close()

    def _set_learning_rate(self) -> None:
        config, now = self.config, self.progress
        by_schedule = {
            "step": (now.epoch - self._phase_began) // config.lr_step_epochs,
            "plateau": now.lr_cuts,
        }
        rate = config.learning_rate * config.lr_gamma ** by_schedule[config.lr_schedule]
        for group in self.optimiser.param_groups:
            group["lr"] = max(rate, config.lr_minimum)

    def _reason_to_stop(self) -> str | None:
        now, config = self.progress, self.config
        if now.epoch >= config.epochs:
            return "epochs"
        if now.step >= self.total_steps:
            return "steps"
        if self._may_lose_patience and now.best and now.epoch - now.best_epoch >= config.patience:
            return "patience"
        return None

    def _is_time_to_validate(self) -> bool:
        return bool(self._reason_to_stop()) or self.progress.epoch % self.config.validate_every == 0

    def _validate(self) -> None:
        """Measure, and keep the weights when they are the best so far."""
        now = self.progress
        self.ranks.share_buffers(self.net)
        metrics = self._measure() or self.whole.values()  # without validation: of training
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

    # Telling

    def _start_clock(self) -> None:
        self._clock = (
            time.perf_counter(),
            self._waited_s,
            self.progress.step,
            self._num_examples,
        )

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
        began, waited_s, step, examples = self._clock
        elapsed_s = time.perf_counter() - began
        steps_per_s = (now.step - step) / elapsed_s
        cubes_per_s = (self._num_examples - examples) / elapsed_s
        wait_share = (self._waited_s - waited_s) / elapsed_s
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
        raise Diverged(
            f"loss is {loss} at step {self.progress.step}: training diverged; {LAST} keeps the last"
            " good state; start another RUN with a lower learning_rate, or with precision fp32"
        )

    def _save(self, name: str = LAST) -> None:
        """Write a checkpoint, unless the weights are no longer numbers."""
        now = self.progress
        if not all(bool(value.isfinite().all()) for value in self.net.state_dict().values()):
            self._refuse_nonsense(math.nan)
        now.window, now.whole = self.window.sums(), self.whole.sums()
        self._saved_at = time.monotonic()
        if not self.recorder:
            return
        now.metrics_bytes = self.recorder.flush()
        save_checkpoint(
            self.run / name,
            {
                "fingerprint": self.fingerprint,
                "config": to_json(self.config),
                "num_processes": self.ranks.size,
                "model": self.net.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "progress": dataclasses.asdict(now),
                **self._facts(),
            },
        )
        self.on_event(Saved(step=now.step, path=self.run / name))
