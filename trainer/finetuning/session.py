"""Fine-tuning, from top to bottom: prepare the cases, train, test on the held-out ones."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from store.progress import SILENT, Progress
from trainer.checkpoint import BEST, LAST, load_checkpoint, refuse_other_run
from trainer.device import autocast, check_precision, pick_device, set_precision
from trainer.errors import TrainError
from trainer.events import Ended, Event, Noticed, Started, TrainSummary
from trainer.finetuning.cases import Prepared, fingerprint, prepare_cases
from trainer.finetuning.config import FinetuneConfig
from trainer.finetuning.evaluation import read_scores, score_cases, write_result
from trainer.finetuning.grid import Grid, choose_grid
from trainer.finetuning.inference import to_probability
from trainer.finetuning.loading import fit_task, load_task
from trainer.finetuning.losses import make_loss
from trainer.finetuning.patches import Examples, Patches
from trainer.finetuning.scores import classification_scores, mean, overlap
from trainer.finetuning.starts import Start, make_start
from trainer.finetuning.task import SPLITS, Task
from trainer.folder import CONFIG, open_run, write_config
from trainer.loop import Loop
from trainer.losses import Means
from trainer.ranks import Ranks
from trainer.resolve import resolve_precision


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneSummary:
    """How a fine-tuning ended."""

    training: TrainSummary
    scores: dict[str, float]
    """Means over the test cases: dice and iou, or auc and accuracy; NaN without test cases."""
    num_test: int
    segments: bool
    """Whether voxels are named, or images."""
    places: bool
    """Whether places in images are classified, not whole images."""
    leaked: tuple[str, ...]
    """Test cases that the weights were pretrained on."""


def finetune(
    task_path: str | Path,
    run_path: str | Path,
    config: FinetuneConfig | None = None,
    *,
    cases_path: str | Path | None = None,
    force: bool = False,
    on_event: Callable[[Event], None] = lambda event: None,
    progress: Progress = SILENT,
) -> FinetuneSummary:
    """Fine-tune on a task and test; called again on the same run, go on where it stopped.

    task_path
        A folder or a manifest (see `trainer.finetuning.loading`).
    run_path
        Folder of the run: config.json, metrics.jsonl, last.pt, best.pt, tensorboard/, cases.csv
        (scores of each test case), result.json (their means), test/ (masks of test cases).
    cases_path
        Folder for the cases brought to the grid, which several runs may share; by default in the
        run's.
    force
        Test also on scans that the weights were pretrained on; the result names them.
    progress
        Shows the stages "cases" (bringing cases to the grid) and "test".

    Raises TrainError when the task, the weights or the run do not fit; Interrupted (a
    KeyboardInterrupt), after writing a checkpoint, on Ctrl-C or SIGTERM while training.
    """
    config = config or FinetuneConfig()
    run = Path(run_path)
    task = fit_task(load_task(Path(task_path)), config)
    device = pick_device(config.device, Ranks())
    config = resolve_precision(config, device)
    start = make_start(config, outputs=task.num_outputs, segments=task.segments)
    with open_run(run):
        if not (run / CONFIG).exists():  # so that this is known to be a run from now on
            write_config(run, config, task=task.name)
        grid = choose_grid(task, config, start.window_hu)
        cases = prepare_cases(
            task, grid, Path(cases_path or run / "cases"), threads=config.threads, progress=progress
        )
        leaked = find_leaks(cases, start.scans)
        if leaked and not force:
            raise TrainError(
                f"{task.name}: {len(leaked)} test cases were pretrained on"
                f" ({', '.join(leaked[:3])}); take other weights or other splits, or --force to"
                " test on them and say so"
            )
        saved = load_checkpoint(run / LAST) if (run / LAST).exists() else None
        session = Session(task, cases, grid, start, run, config, saved, device, on_event)
        try:
            training = session.train()
        finally:
            session.close()
        scores = read_scores(run, training.best_step) if training.already_complete else None
        if scores is None:
            scores = session.test(leaked, progress)
        on_event(Ended(summary=training))
    num_test = sum(case.split == "test" for case in task.cases)
    return FinetuneSummary(
        training=training,
        scores=scores,
        num_test=num_test,
        segments=task.segments,
        places=task.has_centres,
        leaked=leaked,
    )


def find_leaks(cases: Sequence[Prepared], scans: Sequence[str]) -> tuple[str, ...]:
    """Names of the test cases whose images are among those scans."""
    known = set(scans)
    return tuple(p.case.name for p in cases if p.case.split == "test" and p.scan in known)


class Session(Loop[Examples]):
    """One fine-tuning."""

    config: FinetuneConfig

    def __init__(
        self,
        task: Task,
        cases: Sequence[Prepared],
        grid: Grid,
        start: Start,
        run: Path,
        config: FinetuneConfig,
        saved: dict[str, Any] | None,
        device: torch.device,
        on_event: Callable[[Event], None],
    ) -> None:
        self.task, self.grid, self.start = task, grid, start
        self.cases = {
            split: [case for case in cases if case.case.split == split] for split in SPLITS
        }
        self.shown = [*self.cases["train"], *self.cases["validation"]]
        self.train_patches, self.validation_patches = (
            Patches(self.cases[split], config, segments=task.segments, role=split)
            for split in ("train", "validation")
        )
        check_precision(config.precision, device, config.shape)
        set_precision(config.precision)
        identity = fingerprint(task, cases)
        if saved:
            refuse_other_run(
                run / LAST,
                saved,
                fingerprint=identity,
                config=config,
                num_processes=1,
            )
        super().__init__(
            run,
            config,
            fingerprint=identity,
            steps_per_epoch=len(self.train_patches),
            device=device,
            ranks=Ranks(),
            saved=saved,
            on_event=on_event,
        )
        self.loss = make_loss(config.loss, segments=task.segments, ignored=task.ignored)
        self.net = self.model = start.net
        if saved:
            self.net.load_state_dict(saved["model"])
        self.net.to(device)
        self.optimiser = torch.optim.Adam(self.net.parameters(), lr=config.learning_rate)
        if saved:
            self.optimiser.load_state_dict(saved["optimiser"])
        write_config(run, config, task_fingerprint=identity, task=task.name)

    def _announce(self) -> None:
        self.on_event(
            Started(
                run=self.run,
                fingerprint=self.fingerprint,
                num_train=self.train_patches.num_examples,
                num_validation=self.validation_patches.num_examples,
                num_classes=len(self.task.classes),
                num_parameters=sum(p.numel() for p in self.net.parameters()),
                device=str(self.device),
                steps_per_epoch=self.steps_per_epoch,
                total_steps=self.total_steps,
                warmup_epochs=0,
                resumed_at=self.progress.step,
            )
        )
        if not self.cases["validation"]:
            text = "no validation cases: the best weights are chosen by training loss"
            self.on_event(Noticed(text=text))

    def _batches(self, epoch: int, start: int) -> Iterator[Examples]:
        return self.train_patches.epoch(epoch, start=start)

    def _step(self, batch: Examples) -> None:
        self.optimiser.zero_grad(set_to_none=True)
        images, truths = self._load(batch)
        with self._autocast():
            logits = self.model(images)
        loss = self.loss(logits, truths)
        loss.backward()
        self.optimiser.step()
        self.window.add({"loss": loss}, len(batch))
        self.whole.add({"loss": loss}, len(batch))

    @torch.no_grad()
    def _measure(self) -> dict[str, float]:
        """Loss, and the scores of what is shown: of patches, not of whole images."""
        self.net.eval()
        means = Means(self.device)
        named, truth = [], []
        for batch in self.validation_patches.epoch(0):
            self._heed_signals()
            images, truths = self._load(batch)
            with self._autocast():
                logits = self.net(images)
            means.add({"loss": self.loss(logits, truths)}, len(batch))
            probability = to_probability(logits)
            answer = probability.argmax(1).to(torch.uint8) if self.task.segments else probability
            named.append(answer.cpu())
            truth.append(batch.truths)
        if not named:
            return {}
        found = (torch.cat(named).numpy(), torch.cat(truth).numpy())
        if self.task.segments:
            overlaps = overlap(*found, len(self.task.classes), ignored=self.task.ignored)
            scores = {k: mean(v) for k, v in overlaps.items()}
        else:
            scores = classification_scores(*found)
        return means.values() | {k: v for k, v in scores.items() if not math.isnan(v)}

    def _facts(self) -> dict[str, Any]:
        return {
            "task": {
                "name": self.task.name,
                "classes": list(self.task.classes),
                "segments": self.task.segments,
                "grid": json.loads(json.dumps(dataclasses.asdict(self.grid))),
                "kind": self.start.kind,
                "places": self.task.has_centres,
                "channel": self.task.channel,
            },
            "scans": sorted({*self.start.scans, *(p.scan for p in self.shown)}),
            "window_hu": list(self.grid.window_hu),
        }

    def test(self, leaked: tuple[str, ...], progress: Progress) -> dict[str, float]:
        """Score the best weights on every test case; write them down."""
        self.net.load_state_dict(load_checkpoint(self.run / BEST)["model"])
        self.net.eval()
        cases = self.cases["test"]
        scores = score_cases(
            self.net,
            cases,
            self.task,
            self.grid,
            self.run,
            overlap=self.config.overlap,
            device=self.device,
            autocast=self._autocast(),
            progress=progress,
        )
        write_result(
            self.run,
            {
                "task": self.task.name,
                "init": self.config.init,
                "seed": self.config.seed,
                "fingerprint": self.fingerprint,
                "steps": self.progress.step,
                "best_step": self.progress.best_step,
                "num_test": len(cases),
                "leaked": list(leaked),
                "scores": {k: None if math.isnan(v) else v for k, v in scores.items()},
            },
        )
        return scores

    def _load(self, batch: Examples) -> tuple[Tensor, Tensor]:
        """Images (n, 1, Z, Y, X) float32 and truths, on the device."""
        return batch.images.to(self.device).float(), batch.truths.to(self.device)

    def _autocast(self) -> torch.autocast:
        return autocast(self.config.precision, self.device)
