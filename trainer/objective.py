"""Training losses and deterministic validation of pretraining."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from trainer.config import TrainConfig
from trainer.data.dataset import Batch, PatchDataset
from trainer.device import autocast
from trainer.learner import Validation
from trainer.losses import Means, classification_loss, weigh
from trainer.nets.pretraining import Output, PretrainingNet
from trainer.pretexts import Example, Pretext
from trainer.ranks import Ranks

_ZSCORE_LOSS = 20
"""Mean squared error in z-scores over that in the HU window mapped to [0, 1], about: the window is
2000 HU, the standard deviation of a scan 380 to 530 HU."""


class Objective:
    """What a run's net is trained for: the pretext task, the classification, and their weights."""

    def __init__(
        self,
        config: TrainConfig,
        pretext: Pretext,
        *,
        num_classes: int,
        device: torch.device,
        ranks: Ranks | None = None,
    ) -> None:
        self.config, self.pretext, self.num_classes = config, pretext, num_classes
        self.device, self.ranks = device, ranks or Ranks()
        weight = config.classification_weight
        if weight is None:
            scaled = pretext.decodes and config.normalise == "zscore"
            weight = pretext.classification_weight * (_ZSCORE_LOSS if scaled else 1)
        self.classification_weight = weight

    def autocast(self) -> torch.autocast:
        """A context in which the net runs at the run's precision."""
        return autocast(self.config.precision, self.device)

    def originals(self, example: Example) -> Tensor | None:
        """What the classification head learns from, unless it is the perturbed crops."""
        return (
            example.target if self.config.classify and self.pretext.classifies_originals else None
        )

    def losses(self, output: Output, example: Example | None, labels: Tensor) -> dict[str, Tensor]:
        """The weighted sum as `loss`, and its unweighted parts.

        example
            None while the pretext task is not trained yet.
        """
        parts: dict[str, Tensor] = {}
        classification = None
        pretext = self.pretext.loss(output, example) if example else None
        if pretext is not None:
            assert self.pretext.metric is not None
            assert example is not None
            parts[self.pretext.metric] = pretext
            parts |= self.pretext.measure(output, example)
        if output.logits is not None:
            classification = classification_loss(output.logits, labels)
            parts["classification"] = classification
            parts["accuracy"] = (output.logits.argmax(1) == labels).float().mean()
        loss = weigh(
            pretext,
            classification,
            pretext_weight=self.config.pretext_weight,
            classification_weight=self.classification_weight,
        )
        return {"loss": loss, **parts}

    @torch.no_grad()
    def measure(
        self,
        net: PretrainingNet,
        dataset: PatchDataset,
        *,
        joint: bool,
        raise_if_interrupted: Callable[[], None] = lambda: None,
    ) -> Validation:
        """Classify unperturbed crops, and do the pretext task on the same perturbations each time.

        The metrics contain the trivial baseline of the task, too; they are empty without crops.
        Leaves the net in eval mode.

        joint
            Whether the pretext task is trained already.
        raise_if_interrupted
            Called before each batch; may raise to end the validation.
        """
        net.eval()
        means = Means(self.device, ranks=self.ranks)
        counts = torch.zeros(self.num_classes**2, dtype=torch.long, device=self.device)
        for batch in dataset.batches(0):
            raise_if_interrupted()
            if not len(batch):
                continue
            labels = batch.labels  # (n,)
            output, example = Output(), None
            if joint and self.pretext.metric is not None:  # in full precision, as in training
                example = self.pretext.make_example(batch, "validation")
            crops = batch.images()  # (n, 1, Z, Y, X)
            if batch.zscores is not None:
                crops = batch.zscores.apply(crops)
            with self.autocast():
                if self.config.classify:
                    output = net(crops, pretext=False)
                if example:
                    output = net(example.inputs, classify=False)._replace(logits=output.logits)
            losses = self.losses(output, example, labels)
            means.add(losses | (self.pretext.baseline(example) if example else {}), len(batch))
            if output.logits is not None:
                cells = labels * self.num_classes + output.logits.argmax(1)
                counts += torch.bincount(cells, minlength=len(counts))
        confusion = None
        if self.config.classify:
            confusion = self.ranks.sum(counts).reshape(self.num_classes, self.num_classes)
        return Validation(metrics=means.values(), confusion=confusion)

    @torch.no_grad()
    def restore(self, net: PretrainingNet, batch: Batch) -> dict[str, Tensor]:
        """Perturbed (always the same way), restored and original crops, each (n, 1, Z, Y, X).

        All are in [0, 1], the HU window; restored z-scores may leave it.
        """
        net.eval()
        zscores = batch.zscores
        numbered = dataclasses.replace(batch, rows=np.arange(len(batch)))
        example = self.pretext.make_example(numbered, "picture")
        with self.autocast():
            restored = net(example.inputs, classify=False).restored
        assert restored is not None
        shown = self.pretext.show(restored, example)
        if zscores is None:
            return shown
        return {caption: zscores.undo(crops) for caption, crops in shown.items()}
