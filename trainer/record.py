"""What a run writes for people: metrics.jsonl, TensorBoard events, pictures."""

from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
from tensorboard.summary.writer.event_file_writer import EventFileWriter  # type: ignore[import-untyped]
from torch import Tensor

from trainer.errors import TrainError

METRICS, SAMPLES, TENSORBOARD = "metrics.jsonl", "samples.png", "tensorboard"
_GAP_PIXELS = 2


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

    def picture(self, step: int, columns: list[Tensor]) -> None:
        """Middle slices side by side, a row for each cube, to samples.png and TensorBoard.

        columns
            Each (n, 1, Z, Y, X) in [0, 1]: perturbed, restored, original.
        """
        grid = arrange_slices(columns)
        png = encode_png(grid)
        partial = self._samples.with_name(SAMPLES + ".partial")
        partial.write_bytes(png)
        partial.replace(self._samples)
        height, width = grid.shape
        image = Summary.Image(height=height, width=width, colorspace=1, encoded_image_string=png)
        value = Summary.Value(tag="perturbed | restored | original", image=image)
        self._board.add_event(Event(step=step, summary=Summary(value=[value])))

    def flush(self) -> int:
        """Force the metrics to the disk; returns their size in bytes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._board.flush()
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        self._board.close()


def arrange_slices(columns: list[Tensor]) -> NDArray[np.uint8]:
    """The middle z slices of (n, 1, Z, Y, X) cubes, a column for each list entry."""
    parts = []
    for cubes in columns:
        middle = cubes[:, 0, cubes.shape[2] // 2].float().clamp(0, 1).cpu()  # (n, Y, X)
        framed = torch.nn.functional.pad(middle, (0, _GAP_PIXELS, 0, _GAP_PIXELS), value=1.0)
        parts.append(framed.flatten(0, 1))  # (n * Y, X)
    grid: NDArray[np.uint8] = (torch.cat(parts, dim=1) * 255).round().to(torch.uint8).numpy()
    return grid


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """An 8-bit grey (height, width) image as PNG."""
    height, width = image.shape

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    rows = np.concatenate([np.zeros((height, 1), np.uint8), image], axis=1)  # filter 0 each
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(rows.tobytes()))
        + chunk(b"IEND", b"")
    )
