"""Training speed: precisions, share of peak, what data and perturbation cost, the published step.

    python -m benchmarks.pretrain_gpu STORE                  # on a GPU, about five minutes
    python -m benchmarks.pretrain_gpu STORE-96 --nets genesis resenc-s resenc-m resenc-l \
        --pretext mae --batch-size 8 --precisions bf16       # every net on crops of 96 x 96 x 96
    python -m benchmarks.pretrain_gpu STORE --device cpu --width 2 --batch-size 4 --steps 2

Prints tables, and appends each line to --out at once. What fails, such as a net that is too large
for the GPU, is told in its line; the rest goes on, and the exit status is 1. STORE is any prepared
store, best with at least 25 batches of crops.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import gc
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.plain_step import plain_batches
from store import PatchStore
from trainer import TrainConfig
from trainer.checkpoint import RunState
from trainer.data.dataset import Batch, PatchDataset
from trainer.nets.registry import KINDS
from trainer.pretexts import Example
from trainer.pretraining import Pretrainer
from trainer.setup import set_up

PEAK_TFLOPS = {"H200": (67, 494, 989), "H100": (67, 494, 989), "A100": (19.5, 156, 312)}
"""Of dense fp32, tf32, bf16, as the makers state them."""
ROWS = (
    ("fp32", "fp32", True),
    ("tf32", "tf32", True),
    ("bf16, channels first", "bf16", False),
    ("bf16 + channels_last_3d", "bf16", True),
)
"""Title, precision, channels last."""


class Bench:
    """One store, one width and batch size; every measurement has a net of its own."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments, self.folder = arguments, folder
        self.store = PatchStore(arguments.store)
        self.failed = False

    def tell(self, text: str) -> None:
        print(text, flush=True)
        if self.arguments.out:
            with self.arguments.out.open("a") as file:
                file.write(text + "\n")

    @contextlib.contextmanager
    def attempt(self, title: str) -> Iterator[None]:
        """Tell a failure in one line and go on with free memory: GPU time is dear."""
        try:
            yield
        except Exception as error:  # cuDNN reports too little memory as a plain RuntimeError
            self.failed = True
            reason = str(error).strip().splitlines() or [""]
            self.tell(f"| {title} | failed: {type(error).__name__}: {reason[0]} |")
            traceback.print_exc()
        gc.collect()
        torch.cuda.empty_cache()

    def set_up(self, *, channels_last: bool, **settings: object) -> tuple[Pretrainer, PatchDataset]:
        """A net in the joint phase, in a memory layout, and its train crops."""
        given = self.arguments
        config = TrainConfig(
            **{
                "width": given.width,
                "pretext": given.pretext,
                "batch_size": given.batch_size,
                "warmup_epochs": 0,
                "device": given.device,
                "threads": given.threads,
                "cache": "none",
                **settings,
            }  # type: ignore[arg-type]
        )
        setup = set_up(self.store, self.folder, config)
        pretrainer = Pretrainer(setup, RunState.resume(None))
        layout = torch.channels_last_3d if channels_last else torch.contiguous_format
        pretrainer.net.to(memory_format=layout)  # type: ignore[call-overload]
        pretrainer.net.train()
        train = PatchDataset(  # of complete batches only: kernels are tuned for each size of batch
            self.store,
            batch_size=given.batch_size,
            max_batches=max(1, setup.train.plan.rows.size // given.batch_size),
            threads=given.threads,
            cache=config.cache,
            device=setup.device,
        )
        return pretrainer, train

    def seconds(self, step: Callable[[], object]) -> float:
        """Median seconds of a step, after some to warm up."""
        for _ in range(self.arguments.warm_up):
            step()
        if self.arguments.device != "cpu":
            torch.cuda.reset_peak_memory_stats()  # tuning needs memory, too
        taken = []
        for _ in range(self.arguments.steps):
            self.wait()
            began = time.perf_counter()
            step()
            self.wait()
            taken.append(time.perf_counter() - began)
        return statistics.median(taken)

    def running(self, step: Callable[[], object]) -> float:
        """Mean seconds of a step when nobody waits between steps, as in training."""
        for _ in range(self.arguments.warm_up):
            step()
        self.wait()
        began = time.perf_counter()
        for _ in range(self.arguments.steps):
            step()
        self.wait()
        return (time.perf_counter() - began) / self.arguments.steps

    def wait(self) -> None:
        if self.arguments.device != "cpu":
            torch.cuda.synchronize()


def take(pretrainer: Pretrainer, dataset: PatchDataset) -> tuple[Example, Tensor]:
    """One perturbed batch and its labels, on the device."""
    batch = next(dataset.batches(0))
    return pretrainer.objective.pretext.make_example(batch, "fixed"), batch.labels


def fixed_step(pretrainer: Pretrainer, dataset: PatchDataset) -> Callable[[], object]:
    """The net's step on one batch that never changes."""
    example, labels = take(pretrainer, dataset)

    def step() -> None:
        pretrainer.optimiser.zero_grad(set_to_none=True)
        with pretrainer.objective.autocast():
            output = pretrainer.model(
                example.inputs, originals=pretrainer.objective.originals(example)
            )
        pretrainer.objective.losses(output, example, labels)["loss"].backward()  # type: ignore[no-untyped-call]
        pretrainer.optimiser.step()

    return step


class RealStep:
    """The complete step, from the store."""

    def __init__(self, pretrainer: Pretrainer, dataset: PatchDataset) -> None:
        self.pretrainer, self.dataset = pretrainer, dataset
        self.waited_s = 0.0
        self.batches = self._batches()

    def _batches(self) -> Iterator[Batch]:
        for epoch in range(10**6):
            yield from self.dataset.batches(epoch)

    def __call__(self) -> None:
        began = time.perf_counter()
        batch = next(self.batches)
        self.waited_s += time.perf_counter() - began
        self.pretrainer.step(batch)


def measure_net(bench: Bench, net: str) -> dict[str, Any]:
    """A net's step on one batch at each precision; returns the settings of the fastest."""
    given, on_gpu = bench.arguments, bench.arguments.device != "cpu"
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    pretrainer, dataset = bench.set_up(net=net, channels_last=True, precision="fp32")
    example, _ = take(pretrainer, dataset)
    originals = pretrainer.objective.originals(example)
    with FlopCounterMode(display=False) as counter:
        copy.deepcopy(pretrainer.net).to("meta")(
            example.inputs.to("meta"),
            originals=None if originals is None else originals.to("meta"),
        )
    flops, num = 3 * counter.get_total_flops(), len(example.inputs)  # backward: twice the forward
    sides = " x ".join(map(str, example.inputs.shape[2:]))
    bench.tell(
        f"\n{net}: {datetime.date.today()}, {name}, torch {torch.__version__}, cuDNN"
        f" {torch.backends.cudnn.version()}, {given.pretext}, width {given.width}, batches of {num}"
        f" cubes of {sides}, {flops / 3e9 / num:.0f} GFLOP forward a cube\n"
    )
    bench.tell("| net's step on one fixed batch | cubes/s | ms | share of peak | GiB |")
    bench.tell("|---|---|---|---|---|")
    fastest, best = float("inf"), dict[str, Any]()
    for title, precision, channels_last in ROWS:
        if precision not in given.precisions:
            continue
        settings = {"net": net, "precision": precision, "channels_last": channels_last}
        with bench.attempt(title):
            seconds = measure_precision(bench, title, flops, num, settings)
            if seconds < fastest:
                fastest, best = seconds, settings
    if best and not given.no_compile:
        with bench.attempt("compiled"):
            torch._dynamo.reset()  # it compiles a function eight times at most
            title = f"the fastest, compiled ({best['precision']})"
            measure_precision(bench, title, flops, num, {**best, "compile": True})
    return best


def measure_precision(
    bench: Bench, title: str, flops: int, num: int, settings: dict[str, Any]
) -> float:
    """Tell a net's step on one batch of `num` cubes; returns its seconds."""
    on_gpu = bench.arguments.device != "cpu"
    seconds = bench.seconds(fixed_step(*bench.set_up(**settings)))
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    peaks = next((p for part, p in PEAK_TFLOPS.items() if part in name), (None, None, None))
    peak = dict(zip(("fp32", "tf32", "bf16"), peaks, strict=True))[settings["precision"]]
    share = f"{flops / seconds / peak / 1e12:.1%}" if peak else "-"
    memory = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if on_gpu else "-"
    bench.tell(f"| {title} | {num / seconds:.0f} | {seconds * 1e3:.1f} | {share} | {memory} |")
    return seconds


def measure_whole(bench: Bench, settings: dict[str, Any]) -> float:
    """The complete step with every cache against the fixed batch; returns the best's seconds."""
    words = " + channels last" if settings["channels_last"] else ""
    bench.tell(f"\n| {settings['precision']}{words} | cubes/s | ms | over fixed batch | waiting |")
    bench.tell("|---|---|---|---|---|")
    pretrainer, dataset = bench.set_up(**settings)
    num = len(next(dataset.batches(0)))
    plain = bench.running(fixed_step(pretrainer, dataset))
    bench.tell(f"| one fixed batch | {num / plain:.0f} | {plain * 1e3:.1f} | 1 | - |")
    step_s = []
    for cache in ("none", "memory", "device"):
        with bench.attempt(f"cache {cache}"):
            step = RealStep(*bench.set_up(**settings, cache=cache))
            for _ in range(len(step.dataset) if cache != "none" else 0):
                step()  # an epoch fills the cache
            waited, began = step.waited_s, time.perf_counter()
            step_s.append(bench.running(step))
            share = (step.waited_s - waited) / (time.perf_counter() - began)
            bench.tell(
                f"| store (cache {cache}) and perturbation | {num / step_s[-1]:.0f}"
                f" | {step_s[-1] * 1e3:.1f} | {step_s[-1] / plain:.3f} | {share:.0%} |"
            )
    batch = next(dataset.batches(0))
    alone = bench.running(lambda: pretrainer.objective.pretext.make_example(batch))
    share_alone = alone / min(step_s)
    bench.tell(f"\nPerturbation alone: {alone * 1e3:.1f} ms a batch, {share_alone:.1%} of a step.")
    if bench.arguments.device != "cpu":
        tell_waits(bench, RealStep(pretrainer, dataset))
    return min(step_s)


def tell_waits(bench: Bench, step: RealStep) -> None:
    """Tell the first place of a step, if any, where the CPU waits for the GPU."""
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        bench.tell("The CPU never waits for the GPU within a step.")
    except RuntimeError:
        frame = traceback.extract_tb(sys.exc_info()[2])[-1]
        bench.tell(f"The CPU waits for the GPU in {Path(frame.filename).name}:{frame.lineno}.")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def measure_published(bench: Bench, ours: float) -> None:
    """The published step, against the seconds of ours."""
    given = bench.arguments
    pretrainer, dataset = bench.set_up(channels_last=False, precision="tf32")
    num = len(next(dataset.batches(0)))
    rows = np.arange(min(len(bench.store.train), 8 * num))
    hu = bench.store.train.read(rows).astype(np.float32)
    loader = plain_batches(
        np.clip((hu + 1000) / 2000, 0, 1),
        bench.store.train.label[rows],
        num,
        workers=given.plain_workers,
    )

    def forever() -> Iterator[list[Tensor]]:
        while True:
            yield from loader

    stream = forever()

    def published() -> None:
        inputs, target, labels = (part.to(pretrainer.device) for part in next(stream))
        pretrainer.optimiser.zero_grad()
        example = Example(inputs, target)
        losses = pretrainer.objective.losses(pretrainer.model(inputs), example, labels)
        losses["loss"].backward()  # type: ignore[no-untyped-call]
        pretrainer.optimiser.step()

    seconds = bench.running(published)
    bench.tell(
        f"\nThe published step (float32 with PyTorch's TF32 convolutions, channels first, CPU"
        f" perturbation by {given.plain_workers} workers): {num / seconds:.1f} cubes/s; ours is"
        f" {seconds / ours:.1f} times as fast."
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path, metavar="STORE")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--nets", nargs="+", choices=KINDS, default=["genesis"])
    parser.add_argument("--pretext", choices=("restoration", "mae"), default="restoration")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=64)
    kinds = ["fp32", "tf32", "bf16"]
    parser.add_argument("--precisions", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--plain-workers", type=int, default=4)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--out", type=Path)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(parser.parse_args(), Path(folder))
        for net in bench.arguments.nets:
            with bench.attempt(net):
                seconds = measure_whole(bench, measure_net(bench, net))
                if (net, bench.arguments.pretext) == ("genesis", "restoration"):
                    measure_published(bench, seconds)
    sys.exit(bench.failed)


if __name__ == "__main__":
    main()
