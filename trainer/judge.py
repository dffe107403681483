"""What is asked of the net: the losses of a batch, and validation, which never varies."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.config import TrainConfig
from trainer.losses import Means, classification_loss, weigh
from trainer.models import Output, UNet3D
from trainer.perturb import Draws
from trainer.pretexts import Example, Pretext
from trainer.stream import Stream


class Judge:
    """Losses of one run's tasks."""

    def __init__(self, config: TrainConfig, pretext: Pretext, device: torch.device) -> None:
        self.config, self.pretext, self.device = config, pretext, device

    def autocast(self) -> torch.autocast:
        """The context in which the net runs at the run's precision."""
        enabled = self.config.precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

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
            parts[self.pretext.metric] = pretext
        if output.logits is not None:
            classification = classification_loss(output.logits, labels)
            parts["classification"] = classification
            parts["accuracy"] = (output.logits.argmax(1) == labels).float().mean()
        loss = weigh(
            pretext,
            classification,
            pretext_weight=self.config.restoration_weight,
            classification_weight=self.config.classification_weight,
        )
        return {"loss": loss, **parts}

    @torch.no_grad()
    def measure(self, net: UNet3D, stream: Stream, *, restores: bool) -> dict[str, float]:
        """Classification of crops as they are, restoration of always the same perturbations.

        Beside the restoration loss stands `identity`, that of handing back the perturbed
        cube. Empty when there are no crops. Leaves the net in eval mode.
        """
        net.eval()
        means = Means(self.device)
        for batch in stream.epoch(0):
            if not len(batch):
                continue
            cubes, labels = batch.to(self.device)  # (n, 1, Z, Y, X), (n,)
            draws = Draws.keyed(self.config.seed, "validation", batch.index, device=self.device)
            restored = logits = example = None
            with self.autocast():
                if self.config.classify:
                    logits = net(cubes, restore=False).logits  # (n, classes)
                if restores:
                    example = self.pretext.perturb(cubes, draws)
                    restored = net(example.inputs, classify=False).restored  # (n, 1, Z, Y, X)
            losses = self.losses(Output(restored, logits), example, labels)
            means.add(losses | (self.pretext.baseline(example) if example else {}), len(batch))
        return means.values()

    @torch.no_grad()
    def restore(self, net: UNet3D, cubes: Tensor) -> dict[str, Tensor]:
        """Perturbed (always alike), restored and original cubes, each (n, 1, Z, Y, X)."""
        net.eval()
        draws = Draws.keyed(self.config.seed, "picture", device=self.device)
        inputs = self.pretext.perturb(cubes, draws).inputs
        with self.autocast():
            restored = net(inputs, classify=False).restored
        return {"perturbed": inputs, "restored": restored, "original": cubes}
