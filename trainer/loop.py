"""The loop of every training: epochs, learning rate, patience, metrics, checkpoints.

`Loop` decides when to do something; a `Learner` does it: it knows data, net and losses. On the CPU,
a run that was killed at any moment and resumed gives the same metrics and weights, bit for bit, as
an uninterrupted one (with the same number of threads). Ctrl-C and SIGTERM end training between two
steps, after a checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic

import torch

from store.settings import to_json
from trainer.checkpoint import BEST, LAST, RunState, save_checkpoint
from trainer.config import LoopConfig
from trainer.errors import Diverged, TrainError
from trainer.events import Event, Noticed, Saved, Started, Stepped, TrainSummary, Validated
from trainer.interrupt import Interrupted, Interruption, watch_signals
from trainer.learner import BatchT, Learner
from trainer.losses import Means
from trainer.ranks import Ranks
from trainer.recipe import Average, learning_rate_at
from trainer.record import Recorder


class Loop(Generic[BatchT]):
    """Trains a learner until a limit is reached or nothing improves; one object per process."""

    def __init__(
        self,
        learner: Learner[BatchT],
        batches: Callable[[int, int], Iterator[BatchT]],
        *,
        steps_per_epoch: int,
        run: Path,
        config: LoopConfig,
        state: RunState,
        device: torch.device,
        facts: dict[str, Any],
        on_event: Callable[[Event], None],
        warmup_epochs: int = 0,
        ranks: Ranks | None = None,
        average: Average | None = None,
    ) -> None:
        """Start a run, or resume one at `state`.

        batches
            Gives an epoch's batches from the given one on: always the same for the same epoch.
        facts
            Further content of checkpoints, `fingerprint` of the data among it.
        average
            Average of the learner's weights, to update, and to validate and save instead of them.
        """
        self.average = average
        self.learner, self.batches, self.steps_per_epoch = learner, batches, steps_per_epoch
        self.run, self.config, self.state, self.facts = run, config, state, facts
        self.device, self.on_event, self.warmup_epochs = device, on_event, warmup_epochs
        self.ranks = ranks = ranks or Ranks()
        self.total_steps = min(config.steps or 2**62, config.epochs * steps_per_epoch)
        is_main = ranks.is_main  # the sums of a checkpoint are over all processes
        self._line = Means(device, state.window if is_main else {}, ranks)
        self._epoch = Means(device, state.whole if is_main else {}, ranks)
        self._recorder: Recorder | None = None
        self._interruption = Interruption()
        self._saved_at = time.monotonic()

    def announce(self, *, num_train: int, num_validation: int, num_classes: int) -> None:
        """Report what is about to be trained; the numbers are of examples and of their classes."""
        self.on_event(
            Started(
                run=self.run,
                fingerprint=self.facts["fingerprint"],
                num_train=num_train,
                num_validation=num_validation,
                num_classes=num_classes,
                num_parameters=sum(p.numel() for p in self.learner.net.parameters()),
                device=str(self.device),
                steps_per_epoch=self.steps_per_epoch,
                total_steps=self.total_steps,
                warmup_epochs=self.warmup_epochs,
                resumed_at=self.state.step,
            )
        )
        if not num_validation:
            text = "no validation examples: the best weights are chosen by training loss"
            self.on_event(Noticed(text=text))

    def train(self) -> TrainSummary:
        """Train until a limit is reached or nothing improves.

        Raises Interrupted, after a checkpoint, on Ctrl-C or SIGTERM; Diverged when the loss is not
        finite.
        """
        state = self.state
        with contextlib.ExitStack() as stack:
            self._interruption = stack.enter_context(
                watch_signals(ignore_second=self.ranks.size > 1)
            )
            if self.ranks.is_main:
                recorder = Recorder(self.run, size=state.metrics_bytes, step=state.step)
                self._recorder = stack.enter_context(contextlib.closing(recorder))
            return self._train()

    def _train(self) -> TrainSummary:
        state, began = self.state, time.perf_counter()
        reason = None if state.unvalidated else self._reason_to_stop()
        already_complete = reason is not None
        self._saved_at = time.monotonic()
        while not reason:
            state.unvalidated = False
            if not state.joint and state.epoch >= self.warmup_epochs:
                self._begin_joint_phase()
            self._train_epoch()
            self._end_epoch()
            reason = self._reason_to_stop()
            self._save()
        return TrainSummary(
            run=self.run,
            reason=reason,
            steps=state.step,
            epochs=state.epoch,
            best_step=state.best_step,
            best=state.best,
            last=state.last,
            seconds=time.perf_counter() - began,
            already_complete=already_complete,
        )

    def _begin_joint_phase(self) -> None:
        """Go on with the weights of the warm-up, but with a new learning-rate schedule.

        Losses of the warm-up cannot be compared with those of the joint phase.
        """
        state = self.state
        state.joint, state.best = True, {}
        state.best_step, state.best_epoch = state.step, state.epoch
        state.lr_cuts, state.lr_cut_epoch = 0, state.epoch
        self.learner.begin_joint_phase()

    def _train_epoch(self) -> None:
        """The steps of an epoch, or what is left of it."""
        state, config = self.state, self.config
        if state.batch == 0:
            self._epoch = Means(self.device, ranks=self.ranks)
        self.learner.net.train()
        self._start_clock()
        for batch in self._count_waiting(self.batches(state.epoch, state.batch)):
            if state.step == self.total_steps:
                break
            state.batch = batch.index + 1
            if not len(batch) and self.ranks.size == 1:  # all of its rows were corrupt
                continue
            self._set_learning_rate()
            for losses, num in self.learner.step(batch):
                self._line.add(losses, num)
                self._epoch.add(losses, num)
            state.step += 1
            if self.average:
                self.average.update(state.step)
            self._num_steps += 1
            self._num_examples += len(batch) * self.ranks.size
            if state.step % config.log_every == 0:
                self._log()
            if state.step < self.total_steps:
                self._save_between_steps()
        if self._line.values():  # a line of metrics never spans two epochs
            self._log()
        if not self._epoch.values():
            raise TrainError("no crop of a complete epoch could be read; run `semgen verify`")

    def _end_epoch(self) -> None:
        """Validate where it is due."""
        state = self.state
        epoch, batch = state.epoch, state.batch
        if state.batch == self.steps_per_epoch:
            state.epoch, state.batch = state.epoch + 1, 0
        is_due = state.epoch % self.config.validate_every == 0 or state.epoch == self.warmup_epochs
        if not is_due and not self._reason_to_stop():
            return
        try:
            self._validate()
        except Interrupted:  # validate when resumed
            state.epoch, state.batch, state.unvalidated = epoch, batch, True
            self._save()
            raise

    def _validate(self) -> None:
        """Measure, and keep the weights when they are the best so far."""
        state = self.state
        with self.average.swapped() if self.average else contextlib.nullcontext():
            self.ranks.share_buffers(self.learner.net)
            result = self.learner.validate(self._raise_if_interrupted)
        metrics = result.metrics or self._epoch.values()  # without validation data: of training
        self._check_finite(metrics["loss"])
        best = not state.best or metrics["loss"] < state.best["loss"]
        state.last = metrics
        if best:
            state.best, state.best_step, state.best_epoch = metrics, state.step, state.epoch
        since = state.epoch - max(state.best_epoch, state.lr_cut_epoch)
        if self.config.lr_schedule == "plateau" and since >= self.config.lr_step_epochs:
            state.lr_cuts, state.lr_cut_epoch = state.lr_cuts + 1, state.epoch
        if self._recorder:
            self._recorder.write("validation", state.step, state.epoch, metrics)
            if result.pictured is not None:
                number = state.epoch // self.config.validate_every
                self._recorder.picture(state.step, number, result.pictured)
            if result.confusion is not None:
                self._recorder.confusion(state.step, result.confusion.cpu().numpy())
        if best:
            self._save(BEST)
        self.on_event(Validated(step=state.step, epoch=state.epoch, metrics=metrics, best=best))

    def _set_learning_rate(self) -> None:
        """Set the rate of the next step. Warm-up and joint phase have a schedule each."""
        config, state = self.config, self.state
        phase_began = self.warmup_epochs if state.joint else 0
        first = phase_began * self.steps_per_epoch
        last = self.total_steps if state.joint else self.warmup_epochs * self.steps_per_epoch
        cuts = state.lr_cuts
        if config.lr_schedule == "step":
            cuts = (state.epoch - phase_began) // config.lr_step_epochs
        rate = learning_rate_at(
            config, max(0, state.step - first), num_steps=last - first, num_cuts=cuts
        )
        for group in self.learner.optimiser.param_groups:
            group["lr"] = rate

    def _reason_to_stop(self) -> str | None:
        state, config = self.state, self.config
        if state.epoch >= config.epochs:
            return "epochs"
        if state.step >= self.total_steps:
            return "steps"
        if state.joint and state.best and state.epoch - state.best_epoch >= config.patience:
            return "patience"
        return None

    # Metrics

    def _start_clock(self) -> None:
        """Start to count what the rates in the next line of metrics are computed from."""
        self._began, self._waited_s = time.perf_counter(), 0.0
        self._num_steps = self._num_examples = 0

    def _count_waiting(self, batches: Iterator[BatchT]) -> Iterator[BatchT]:
        """The batches, counting the seconds that training waits for them."""
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self._waited_s += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    def _log(self) -> None:
        """Write one line of metrics: means since the line before."""
        state = self.state
        metrics = self._line.values()
        if not metrics:  # all crops since the line before were corrupt
            return
        self._check_finite(metrics["loss"])
        self._line = Means(self.device, ranks=self.ranks)
        if not self._recorder:
            return
        rate = self.learner.optimiser.param_groups[0]["lr"]
        self._recorder.write("train", state.step, state.epoch, {**metrics, "learning_rate": rate})
        elapsed_s = time.perf_counter() - self._began
        steps_per_s, examples_per_s = self._num_steps / elapsed_s, self._num_examples / elapsed_s
        wait_share = self._waited_s / elapsed_s
        self._recorder.chart(
            state.step, {"rate/examples_per_s": examples_per_s, "rate/wait": wait_share}
        )
        self._start_clock()
        self.on_event(
            Stepped(
                step=state.step,
                total_steps=self.total_steps,
                epoch=state.epoch,
                metrics=metrics,
                learning_rate=rate,
                examples_per_s=examples_per_s,
                wait_share=wait_share,
                remaining_s=(self.total_steps - state.step) / steps_per_s if steps_per_s else 0.0,
            )
        )

    # Checkpoints and signals

    def _save_between_steps(self) -> None:
        """Write a checkpoint where one is due; raise Interrupted after a signal to stop.

        Several processes agree on clocks and signals only where they exchange losses anyway: doing
        it at each step would make a GPU wait for the CPU.
        """
        state, config = self.state, self.config
        due, stop = state.step % config.checkpoint_every == 0, False
        if self.ranks.size == 1 or state.step % config.log_every == 0:
            late = time.monotonic() - self._saved_at >= 60 * config.checkpoint_minutes
            stop = self.ranks.any(self._interruption.requested, self.device)
            due = self.ranks.any(due or late, self.device) or stop
        if due:
            self._save()
        if stop:
            raise Interrupted

    def _raise_if_interrupted(self) -> None:
        """Called within a validation: raise Interrupted after a signal to stop.

        Several processes exchange numbers during a validation, so they always finish it.
        """
        if self._interruption.requested and self.ranks.size == 1:
            raise Interrupted

    def _check_finite(self, loss: float) -> None:
        """Raise Diverged unless the loss is finite."""
        if not math.isfinite(loss):
            kept = f"{LAST} keeps the last good state; " if (self.run / LAST).exists() else ""
            raise Diverged(
                f"loss is {loss} at step {self.state.step}: training diverged; {kept}start another"
                " RUN with a lower learning_rate, or with precision fp32"
            )

    def _save(self, name: str = LAST) -> None:
        """Write a checkpoint; raise Diverged instead where weights are not finite."""
        state, net = self.state, self.learner.net
        if not all(bool(value.isfinite().all()) for value in net.state_dict().values()):
            self._check_finite(math.nan)
        state.window, state.whole = self._line.sums(), self._epoch.sums()
        self._saved_at = time.monotonic()
        if not self._recorder:
            return
        state.metrics_bytes = self._recorder.flush()
        save_checkpoint(
            self.run / name,
            {
                **self.facts,
                "config": to_json(self.config),
                "num_processes": self.ranks.size,
                **self._weights(),
                "optimiser": self.learner.optimiser.state_dict(),
                "progress": dataclasses.asdict(state),
            },
        )
        self.on_event(Saved(step=state.step, path=self.run / name))

    def _weights(self) -> dict[str, Any]:
        """The net's weights as checkpoints keep them: with an average, as "trained" beside it."""
        weights = self.learner.net.state_dict()
        if not self.average:
            return {"model": weights}
        return {"model": self.average.state_dict(), "trained": weights}
