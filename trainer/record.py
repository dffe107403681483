"""What a run writes for people: metrics.jsonl, TensorBoard events, samples.png, samples/."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from store.atomic import replace_file
from trainer.errors import TrainError
from trainer.samples import add_sample, drop_samples_after

METRICS, SAMPLES, TENSORBOARD = "metrics.jsonl", "samples.png", "tensorboard"
_TILE_PIXELS, _GAP_PIXELS, _CAPTION_PIXELS, _CONFUSION_PIXELS = 128, 2, 20, 400


class Recorder:
    """Writes metrics as lines of JSON, and the same and more to TensorBoard.

    metrics.jsonl holds only what depends on seed and data, no times and no rates: a resumed run
    continues it byte for byte.
    """

    def __init__(self, run: Path, *, size: int, step: int) -> None:
        """Continue a run after `step`, when metrics.jsonl had `size` bytes; both 0 for a new run.

        Whatever an interrupted run wrote after that is removed or hidden.
        """
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - slow to import

        path = run / METRICS
        path.touch()
        if path.stat().st_size < size:
            raise TrainError(
                f"{path}: shorter than when the checkpoint was saved; restore the file or give"
                " another RUN"
            )
        self._run = run
        drop_samples_after(run, step)
        self._file = path.open("r+b")
        self._file.truncate(size)
        self._file.seek(size)
        purge_step = step + 1 if step else 0  # the point of the checkpoint itself stays
        self._board = SummaryWriter(str(run / TENSORBOARD), purge_step=purge_step)

    def write(self, kind: str, step: int, epoch: int, values: dict[str, float]) -> None:
        """Write one line of metrics, and one TensorBoard curve for each value."""
        line = {"kind": kind, "step": step, "epoch": epoch, **values}
        self._file.write(json.dumps(line).encode() + b"\n")
        self.chart(step, {f"{kind}/{name}": value for name, value in values.items()})

    def chart(self, step: int, values: dict[str, float]) -> None:
        """Write to TensorBoard only: for rates, which differ each time."""
        for tag, value in values.items():
            self._board.add_scalar(tag, value, step)

    def picture(self, step: int, number: int, columns: dict[str, Tensor]) -> None:
        """Show middle slices side by side, a row for each crop, in samples.png and TensorBoard.

        Some of them also go to samples/, to see how they change.

        number
            Of the validation; see `trainer.samples.add_sample`.
        columns
            Crops (n, 1, Z, Y, X) in [0, 1] by caption. None are left where all were corrupt; then
            there is no picture.
        """
        if not len(next(iter(columns.values()))):
            return
        picture = draw_slices(columns)
        self._board.add_image(" | ".join(columns), np.asarray(picture), step, dataformats="HW")
        with replace_file(self._run / SAMPLES) as partial:
            picture.save(partial)
        add_sample(self._run, number, step, columns)

    def confusion(self, step: int, counts: NDArray[np.integer[Any]]) -> None:
        """Show a confusion matrix in TensorBoard: a row for each true class, dark for many.

        counts
            (classes, classes) crops by true and predicted class.
        """
        share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        zoom = max(1, _CONFUSION_PIXELS // len(share))
        cells = (255 * (1 - share)).astype(np.uint8).repeat(zoom, 0).repeat(zoom, 1)
        tag = "validation/confusion: rows true class, columns predicted"
        self._board.add_image(tag, cells, step, dataformats="HW")

    def flush(self) -> int:
        """Force the metrics to the disk; returns their size in bytes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._board.flush()
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        self._board.close()


def draw_slices(columns: dict[str, Tensor]) -> Image.Image:
    """The middle z slices of (n, 1, Z, Y, X) crops in [0, 1], a captioned column for each entry."""
    height, width = next(iter(columns.values())).shape[-2:]
    zoom = -(-_TILE_PIXELS // min(height, width))
    size = (width * zoom, height * zoom)
    count = max(len(crops) for crops in columns.values())
    canvas = Image.new(
        "L",
        (len(columns) * (size[0] + _GAP_PIXELS), _CAPTION_PIXELS + count * (size[1] + _GAP_PIXELS)),
        color=255,
    )
    pen = ImageDraw.Draw(canvas)
    for number, (caption, crops) in enumerate(columns.items()):
        left = number * (size[0] + _GAP_PIXELS)
        pen.text((left + 4, 4), caption, fill=0)
        middle = crops[:, 0, crops.shape[2] // 2].float().clamp(0, 1).cpu()  # (n, Y, X)
        for row, values in enumerate((middle * 255).round().to(torch.uint8).numpy()):
            tile = Image.fromarray(values).resize(size, Image.Resampling.NEAREST)
            canvas.paste(tile, (left, _CAPTION_PIXELS + row * (size[1] + _GAP_PIXELS)))
    return canvas
