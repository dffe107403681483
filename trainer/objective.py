"""Training losses and deterministic validation."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from trainer.config import TrainConfig
from trainer.data.stream import Stream
from trainer.device import autocast
from trainer.losses import Means, classification_loss, weigh
from trainer.nets.unet import Output, UNet3D
from trainer.pretexts import Example, Pretext
from trainer.ranks import Ranks
from trainer.transforms.perturb import Draws


class Judge:
    """Losses of one run's tasks."""

    def __init__(
        self,
        config: TrainConfig,
        pretext: Pretext,
        device: torch.device,
        num_classes: int,
        ranks: Ranks,
    ) -> None:
        self.config, self.pretext, self.device, self.ranks = config, pretext, device, ranks
        self.num_classes = num_classes
        weight = config.classification_weight
        self.classification_weight = pretext.classification_weight if weight is None else weight
        self.confusion: Tensor | None = None
        """(classes, classes) validation crops by true and named class, of the last measurement."""

    def autocast(self) -> torch.autocast:
        """The context in which the net runs at the run's precision."""
        return autocast(self.config.precision, self.device)

    def losses(self, output: Output, example: Example | None, labels: Tensor) -> dict[str, Tensor]:
        """The weighted sum as `loss`, and its parts as they are.

        example
            None while the pretext task is not learned yet.
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
        net: UNet3D,
        stream: Stream,
        *,
        joint: bool,
        heed: Callable[[], None] = lambda: None,
    ) -> dict[str, float]:
        """Classification of crops as they are, the pretext task on always the same perturbations.

        Beside the task's loss stands what a net that learned nothing would get. Empty when
        there are no crops. Leaves the net in eval mode.

        heed
            Called before each batch; may raise to end the validation.
        """
        net.eval()
        means = Means(self.device, ranks=self.ranks)
        cells = torch.zeros(self.num_classes**2, dtype=torch.long, device=self.device)
        learns = joint and self.pretext.metric is not None
        for batch in stream.epoch(0):
            heed()
            if not len(batch):
                continue
            cubes, labels = stream.load(batch)  # (n, 1, Z, Y, X), (n,)
            output, example = Output(), None
            if learns:  # in full precision, as in training
                example = self.pretext.perturb(cubes, self._draws("validation", batch.rows))
            with self.autocast():
                if self.config.classify:
                    output = net(cubes, pretext=False)
                if example:
                    output = net(example.inputs, classify=False)._replace(logits=output.logits)
            losses = self.losses(output, example, labels)
            means.add(losses | (self.pretext.baseline(example) if example else {}), len(batch))
            if output.logits is not None:
                named = labels * self.num_classes + output.logits.argmax(1)
                cells += torch.bincount(named, minlength=len(cells))
        if self.config.classify:
            cells = self.ranks.sum(cells)
            self.confusion = cells.reshape(self.num_classes, self.num_classes)
        return means.values()

    @torch.no_grad()
    def restore(self, net: UNet3D, cubes: Tensor) -> dict[str, Tensor]:
        """Perturbed (always alike), restored and original cubes, each (n, 1, Z, Y, X)."""
        net.eval()
        inputs = self.pretext.perturb(cubes, self._draws("picture", range(len(cubes)))).inputs
        with self.autocast():
            restored = net(inputs, classify=False).restored
        return {"perturbed": inputs, "restored": restored, "original": cubes}

    def _draws(self, role: str, rows: Iterable[int]) -> Draws:
        return Draws.keyed(self.config.seed, role, rows=rows, device=self.device)
