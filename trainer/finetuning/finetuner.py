"""One step and one validation of fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.device import autocast, check_precision, set_precision, upload
from trainer.finetuning.cases import Prepared
from trainer.finetuning.config import FinetuneConfig
from trainer.finetuning.inference import to_probability
from trainer.finetuning.losses import make_loss
from trainer.finetuning.patches import Examples, Patches
from trainer.finetuning.scores import classification_scores, mean, overlap_scores
from trainer.finetuning.starts import Start
from trainer.finetuning.task import SPLITS, Task
from trainer.learner import Losses, Validation
from trainer.losses import Means
from trainer.recipe import clip_gradient, make_optimiser, resume_optimiser, trained_weights


class Finetuner:
    """The net, its optimiser and its patches: one step, one validation."""

    def __init__(
        self,
        task: Task,
        cases: Sequence[Prepared],
        start: Start,
        config: FinetuneConfig,
        device: torch.device,
        *,
        saved: dict[str, Any] | None = None,
    ) -> None:
        """Start with the weights in `start`, or with a checkpoint's content `saved`."""
        self.task, self.config, self.device = task, config, device
        self.cases = {
            split: [case for case in cases if case.case.split == split] for split in SPLITS
        }
        self.train_patches, self.validation_patches = (
            Patches(self.cases[split], config, segments=task.segments, role=split)
            for split in ("train", "validation")
        )
        factor: int = getattr(start.net.get_submodule("body"), "factor", 8)
        check_precision(config.precision, device, config.shape, factor=factor)
        set_precision(config.precision)
        self.loss = make_loss(config.loss, segments=task.segments, ignored=task.ignored)
        self.net = start.net
        if saved:
            self.net.load_state_dict(trained_weights(saved))
        self.net.to(device)
        self.optimiser = make_optimiser(self.net, config, device)
        if saved:
            resume_optimiser(self.optimiser, saved["optimiser"])

    def step(self, batch: Examples) -> list[Losses]:
        """Do one optimiser step; return the loss of the batch."""
        self.optimiser.zero_grad(set_to_none=True)
        loss = self.loss(self._predict(batch), upload(batch.truths, self.device))
        loss.backward()
        clip_gradient(self.net, self.config)
        self.optimiser.step()
        return [({"loss": loss.detach()}, len(batch))]

    @torch.no_grad()
    def validate(self, raise_if_interrupted: Callable[[], None]) -> Validation:
        """Loss and scores of patches, not of complete images."""
        self.net.eval()
        means = Means(self.device)
        predicted, truth = [], []
        for batch in self.validation_patches.epoch(0):
            raise_if_interrupted()
            logits = self._predict(batch)
            means.add({"loss": self.loss(logits, upload(batch.truths, self.device))}, len(batch))
            probability = to_probability(logits)
            if self.task.segments:
                predicted.append(probability.argmax(1).to(torch.uint8).cpu())
            else:
                predicted.append(probability.cpu())
            truth.append(batch.truths)
        if not predicted:
            return Validation(metrics={})
        pair = (torch.cat(predicted).numpy(), torch.cat(truth).numpy())
        if self.task.segments:
            found = overlap_scores(*pair, len(self.task.classes), ignored=self.task.ignored)
            scores = {k: mean(v) for k, v in found.items()}
        else:
            scores = classification_scores(*pair)
        known = {k: v for k, v in scores.items() if not math.isnan(v)}
        return Validation(metrics=means.values() | known)

    def begin_joint_phase(self) -> None:
        """Never called: fine-tuning has no warm-up."""

    def autocast(self) -> torch.autocast:
        """A context in which the net runs at the run's precision."""
        return autocast(self.config.precision, self.device)

    def _predict(self, batch: Examples) -> Tensor:
        """Logits (n, outputs, ...) of a batch."""
        images = upload(batch.images, self.device).float()  # (n, 1, Z, Y, X)
        with self.autocast():
            logits: Tensor = self.net(images)
        return logits
