"""Nearest scans by embedding, with FAISS."""

from __future__ import annotations

import faiss
import numpy as np
from numpy.typing import NDArray

from pipeline.errors import PrepareError
from store.errors import ConfigError

_PROBED = 8
"""Of an inverted file index, one in 8 lists is searched."""


def check_index(index: str, length: int) -> None:
    """Raise ConfigError when FAISS has no such index of vectors of `length` numbers."""
    try:
        faiss.index_factory(length, index, faiss.METRIC_L2)
    except RuntimeError as error:
        raise ConfigError(
            f"index must be an index_factory string of FAISS for vectors of {length} numbers, got"
            f" {index!r}; use --index Flat"
        ) from error


class Neighbours:
    """An index over some scans' embeddings."""

    def __init__(self, embedding: NDArray[np.float32], rows: NDArray[np.intp], index: str) -> None:
        """Index `embedding[rows]`; `embedding` is (N, D), `index` an index_factory string.

        Raises PrepareError when FAISS cannot build it, for instance with too few scans to train it.
        """
        self.rows = rows
        self._embedding = embedding
        vectors = np.ascontiguousarray(embedding[rows], np.float32)
        try:
            self._index = faiss.index_factory(embedding.shape[1], index, faiss.METRIC_L2)
            if len(rows):
                self._index.train(vectors)
                if (lists := faiss.try_extract_index_ivf(self._index)) is not None:
                    lists.nprobe = -(-lists.nlist // _PROBED)  # FAISS would search one list only
                self._index.add(vectors)
        except RuntimeError as error:
            reason = str(error).split(": ")[-1].strip()
            raise PrepareError(
                f"index {index!r} cannot be built on {len(rows)} scans: {reason}; use --index Flat"
            ) from error

    def nearest(
        self, scan: int, num: int, eligible: NDArray[np.bool_]
    ) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
        """The nearest eligible scans to a scan, which is included where it is indexed and eligible.

        eligible
            (N,) over all scans.

        Returns up to `num` scan rows and their L2 distances, nearest first, ties by row. The
        index proposes candidates; distances are computed again in float64.
        """
        if num == 0 or not eligible[self.rows].any():
            return np.empty(0, np.intp), np.empty(0, np.float32)
        query = self._embedding[scan]
        wanted = min(2 * num, len(self.rows))
        while True:
            hits = self._index.search(query[None], wanted)[1][0]
            candidates = self.rows[hits[hits >= 0]]
            candidates = candidates[eligible[candidates]]
            if len(candidates) >= num or wanted == len(self.rows) or hits[-1] < 0:
                break  # -1: the index finds no more
            wanted = min(4 * wanted, len(self.rows))
        offset = self._embedding[candidates].astype(np.float64) - query
        distance = np.sqrt((offset * offset).sum(axis=1))
        order = np.lexsort((candidates, distance))[:num]
        return candidates[order], distance[order].astype(np.float32)
