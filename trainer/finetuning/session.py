"""Fine-tuning, from top to bottom: prepare the cases, train, test on the held-out ones."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from store.errors import check_local
from store.progress import SILENT, Progress
from trainer.checkpoint import BEST, LAST, RunState, load_checkpoint, refuse_other_run
from trainer.device import describe_machine, memory_explained, pick_device, resolve_precision
from trainer.errors import TrainError
from trainer.events import Ended, Event, Noticed, TrainSummary, format_metrics, ignore
from trainer.finetuning.cases import Prepared, fingerprint, prepare_cases
from trainer.finetuning.config import FinetuneConfig
from trainer.finetuning.evaluation import read_scores, score_cases, write_result
from trainer.finetuning.finetuner import Finetuner
from trainer.finetuning.grid import Grid, choose_grid
from trainer.finetuning.inference import Predictor
from trainer.finetuning.loading import fit_task, load_task
from trainer.finetuning.patches import Examples
from trainer.finetuning.starts import Start, make_start
from trainer.finetuning.task import Task
from trainer.folder import CONFIG, open_run, write_config
from trainer.loop import Loop
from trainer.ranks import Ranks
from trainer.recipe import Average


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneSummary:
    """Result of a fine-tuning."""

    training: TrainSummary
    scores: dict[str, float]
    """Means over the test cases: dice and iou, or auc and accuracy; NaN without test cases."""
    num_test: int
    segments: bool
    """Whether the task is segmentation; else it is classification."""
    places: bool
    """Whether crops around given centres are classified, not complete images (see
    `Task.has_centres`). The name is a key of the JSON output."""
    leaked: tuple[str, ...]
    """Test cases that the weights were pretrained on."""

    def __str__(self) -> str:
        """Lines of text, for a terminal."""
        test = f"{self.num_test} cases: {format_metrics(self.scores)}" if self.num_test else "none"
        lines = [str(self.training), f"test     {test}"]
        if self.leaked:
            lines.append(
                f"WARNING: {len(self.leaked)} of them were used for pretraining; see result.json"
            )
        return "\n".join(lines)


def finetune(
    task: str | Path,
    run: str | Path,
    config: FinetuneConfig | None = None,
    *,
    cases_path: str | Path | None = None,
    force: bool = False,
    on_event: Callable[[Event], None] | None = None,
    progress: Progress = SILENT,
) -> FinetuneSummary:
    """Fine-tune on a task and test; when called again on the same run, resume it.

    task
        A folder or a manifest (see `trainer.finetuning.loading`).
    run
        Run directory: config.json, metrics.jsonl, last.pt, best.pt, tensorboard/, cases.csv
        (scores of each test case), result.json (their means), test/ (masks of test cases).
    cases_path
        Folder for the cases resampled to the grid, which several runs may share; by default
        `cases` in the run directory.
    force
        Test even on scans that the weights were pretrained on; the result names them.
    progress
        Shows the stages "cases" (resampling cases to the grid) and "test".

    Raises TrainError when the task, the weights or the run do not fit; Interrupted (a
    KeyboardInterrupt), after writing a checkpoint, on Ctrl-C or SIGTERM while training.
    """
    check_local(run)
    run, config, on_event = Path(run), config or FinetuneConfig(), on_event or ignore
    folder = Path(cases_path or run / "cases")
    if any((folder / name).exists() for name in (CONFIG, "zarr.json")):
        raise TrainError(f"{folder}: holds a run or a store; give another folder for the cases")
    loaded = fit_task(load_task(Path(task)), config)
    device = pick_device(config.device, Ranks())
    config = resolve_precision(config, device)
    start = make_start(config, outputs=loaded.num_outputs, segments=loaded.segments)
    with open_run(run, finetuning=True):
        if not (run / CONFIG).exists():  # marks the folder as a run from now on
            write_config(run, config, task=loaded.name)
        grid = choose_grid(loaded, config, start.window_hu, start.normalise)
        if config.window_hu is not None and not grid.is_hu:
            on_event(Noticed(text=f"window_hu has no effect with intensity {grid.intensity!r}"))
        for origin in start.origins if not (run / LAST).exists() else ():
            on_event(Noticed(text=f"init: {origin}"))
        cases = prepare_cases(loaded, grid, folder, threads=config.threads, progress=progress)
        leaked = find_leaks(cases, start.scans)
        if leaked and not force:
            raise TrainError(
                f"{loaded.name}: the weights were pretrained on {len(leaked)} of the test cases"
                f" ({', '.join(leaked[:3])}); use other weights or other splits, or --force to test"
                " on them anyway"
            )
        finetuner, loop = _set_up(loaded, cases, grid, start, config, device, run, on_event)
        with memory_explained(config.batch_size, "lower batch_size or shape in a new RUN"):
            training = loop.train()
        scores = read_scores(run, training.best_step) if training.already_complete else None
        if scores is None:
            scores = _test(finetuner, loop, grid, leaked, progress)
        on_event(Ended(summary=training))
    return FinetuneSummary(
        training=training,
        scores=scores,
        num_test=len(finetuner.cases["test"]),
        segments=loaded.segments,
        places=loaded.has_centres,
        leaked=leaked,
    )


def _set_up(
    task: Task,
    cases: Sequence[Prepared],
    grid: Grid,
    start: Start,
    config: FinetuneConfig,
    device: torch.device,
    run: Path,
    on_event: Callable[[Event], None],
) -> tuple[Finetuner, Loop[Examples]]:
    """A new training, or the one to resume; TrainError where that has other data or settings."""
    saved = load_checkpoint(run / LAST) if (run / LAST).exists() else None
    facts = _list_facts(task, cases, grid, start)
    if saved:
        refuse_other_run(
            run / LAST, saved, fingerprint=facts["fingerprint"], config=config, num_processes=1
        )
    finetuner = Finetuner(task, cases, start, config, device, saved=saved)
    write_config(
        run,
        config,
        task_fingerprint=facts["fingerprint"],
        task=task.name,
        **describe_machine(finetuner.net, device),
    )
    loop = Loop(
        finetuner,
        finetuner.train_patches.epoch,
        steps_per_epoch=len(finetuner.train_patches),
        run=run,
        config=config,
        state=RunState.resume(saved),
        device=device,
        facts=facts,
        on_event=on_event,
        average=Average.resume(finetuner.net, config, saved),
    )
    loop.announce(
        num_train=finetuner.train_patches.num_examples,
        num_validation=finetuner.validation_patches.num_examples,
        num_classes=len(task.classes),
    )
    return finetuner, loop


def find_leaks(cases: Sequence[Prepared], scans: Sequence[str]) -> tuple[str, ...]:
    """Names of the test cases whose images are among these scan ids."""
    known = set(scans)
    return tuple(p.case.name for p in cases if p.case.split == "test" and p.scan in known)


def _list_facts(task: Task, cases: Sequence[Prepared], grid: Grid, start: Start) -> dict[str, Any]:
    """What checkpoints record of the task, the grid, and the scans that the weights depend on."""
    learned = [p.scan for p in cases if p.case.split in ("train", "validation")]
    return {
        "fingerprint": fingerprint(task, cases),
        "task": {
            "name": task.name,
            "classes": list(task.classes),
            "segments": task.segments,
            "grid": json.loads(json.dumps(dataclasses.asdict(grid))),
            "kind": start.kind,
            "places": task.has_centres,
            "channel": task.channel,
        },
        "scans": sorted({*start.scans, *learned}),
        "origins": [origin.to_json() for origin in start.origins],
        "window_hu": list(grid.window_hu),
        "normalise": "zscore" if grid.is_zscore else "window",
    }


def _test(
    finetuner: Finetuner,
    loop: Loop[Examples],
    grid: Grid,
    leaked: tuple[str, ...],
    progress: Progress,
) -> dict[str, float]:
    """Score the best weights on every test case, and write the scores to the run."""
    task, config, run = finetuner.task, finetuner.config, loop.run
    finetuner.net.load_state_dict(load_checkpoint(run / BEST)["model"])
    finetuner.net.eval()
    cases = finetuner.cases["test"]
    predictor = Predictor(
        net=finetuner.net,
        grid=grid,
        overlap=config.overlap,
        device=finetuner.device,
        autocast=finetuner.autocast(),
    )
    scores = score_cases(predictor, cases, task, run, progress)
    write_result(
        run,
        {
            "task": task.name,
            "init": config.init,
            "seed": config.seed,
            "fingerprint": loop.facts["fingerprint"],
            "steps": loop.state.step,
            "best_step": loop.state.best_step,
            "num_test": len(cases),
            "leaked": list(leaked),
            "scores": {k: None if math.isnan(v) else v for k, v in scores.items()},
        },
    )
    return scores
