"""What a run writes for people: metrics.jsonl, TensorBoard events, pictures."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
from tensorboard.summary.writer.event_file_writer import EventFileWriter  # type: ignore[import-untyped]
from torch import Tensor

from trainer.errors import TrainError

METRICS, SAMPLES, TENSORBOARD = "metrics.jsonl", "samples.png", "tensorboard"
_TILE_PIXELS, _GAP_PIXELS, _CAPTION_PIXELS, _CONFUSION_PIXELS = 128, 2, 20, 400


class Recorder:
    """Metrics as lines of JSON, the same and more in TensorBoard.

    metrics.jsonl holds only what follows from seed and data, no clock and no rate: a resumed
    run continues it byte for byte.
    """

    def __init__(self, run: Path, *, size: int, step: int) -> None:
        """Continue after the first `size` bytes, which a checkpoint of `step` knew of."""
        path = run / METRICS
        path.touch()
        if path.stat().st_size < size:
            raise TrainError(
                f"{path}: shorter than the checkpoint remembers; put it back or give another RUN"
            )
        self._samples = run / SAMPLES
        self._file = path.open("r+b")
        self._file.truncate(size)
        self._file.seek(size)
        self._board = EventFileWriter(str(run / TENSORBOARD))
        # Later events of an interrupted session are dropped by TensorBoard from here on.
        self._board.add_event(Event(step=step, file_version="brain.Event:2"))
        self._board.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))

    def write(self, kind: str, step: int, epoch: int, values: dict[str, float]) -> None:
        """One line of metrics, and one TensorBoard curve for each value."""
        line = {"kind": kind, "step": step, "epoch": epoch, **values}
        self._file.write(json.dumps(line).encode() + b"\n")
        self.chart(step, {f"{kind}/{name}": value for name, value in values.items()})

    def chart(self, step: int, values: dict[str, float]) -> None:
        """TensorBoard curves only: for rates, which differ from session to session."""
        summary = Summary(
            value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        )
        self._board.add_event(Event(step=step, summary=summary))

    def picture(self, step: int, columns: dict[str, Tensor]) -> None:
        """Middle slices side by side, a row for each cube, to samples.png and TensorBoard.

        columns
            By caption, each (n, 1, Z, Y, X) in [0, 1].
        """
        content = self._show(step, " | ".join(columns), draw_slices(columns))
        partial = self._samples.with_name(SAMPLES + ".partial")
        partial.write_bytes(content)
        partial.replace(self._samples)

    def confusion(self, step: int, counts: NDArray[np.integer[Any]]) -> None:
        """Which classes are taken for which, to TensorBoard: a row for each true class.

        counts
            (classes, classes) by true and named class.
        """
        share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        zoom = max(1, _CONFUSION_PIXELS // len(share))
        cells = (255 * (1 - share)).astype(np.uint8).repeat(zoom, 0).repeat(zoom, 1)
        self._show(
            step, "validation/confusion: true class down, named across", Image.fromarray(cells)
        )

    def _show(self, step: int, tag: str, picture: Image.Image) -> bytes:
        """Put a picture on TensorBoard; returns it as PNG."""
        content = io.BytesIO()
        picture.save(content, "PNG")
        image = Summary.Image(
            height=picture.height,
            width=picture.width,
            colorspace=1,
            encoded_image_string=content.getvalue(),
        )
        summary = Summary(value=[Summary.Value(tag=tag, image=image)])
        self._board.add_event(Event(step=step, summary=summary))
        return content.getvalue()

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
    """The middle z slices of (n, 1, Z, Y, X) cubes in [0, 1], a captioned column for each entry."""
    height, width = next(iter(columns.values())).shape[-2:]
    zoom = -(-_TILE_PIXELS // min(height, width))
    size = (width * zoom, height * zoom)
    count = max(len(cubes) for cubes in columns.values())
    canvas = Image.new(
        "L",
        (len(columns) * (size[0] + _GAP_PIXELS), _CAPTION_PIXELS + count * (size[1] + _GAP_PIXELS)),
        color=255,
    )
    pen = ImageDraw.Draw(canvas)
    for number, (caption, cubes) in enumerate(columns.items()):
        left = number * (size[0] + _GAP_PIXELS)
        pen.text((left + 4, 4), caption, fill=0)
        middle = cubes[:, 0, cubes.shape[2] // 2].float().clamp(0, 1).cpu()  # (n, Y, X)
        for row, values in enumerate((middle * 255).round().to(torch.uint8).numpy()):
            tile = Image.fromarray(values).resize(size, Image.Resampling.NEAREST)
            canvas.paste(tile, (left, _CAPTION_PIXELS + row * (size[1] + _GAP_PIXELS)))
    return canvas
