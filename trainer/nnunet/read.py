"""Read checkpoints of nnU-Net and nnssl, and what they say of their origin. No code is executed.

nnssl writes plain values; nnU-Net also pickles numpy scalars (losses of its log), whose classes
are therefore allowed on loading, and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from trainer.errors import TrainError
from trainer.nets.registry import STAGES, build_backbone, build_encoder, find_kind
from trainer.nnunet.architecture import (
    OUTPUT,
    compare_architectures,
    find_architecture,
    is_alias,
    is_residual_encoder,
)

CHECKPOINT, ADAPTATION, CARD = "checkpoint_final.pth", "adaptation_plan.json", "README.md"
WEIGHTS_KEY, PLAN_KEY, METADATA_KEY = "network_weights", "nnssl_adaptation_plan", "semgen"
UNKNOWN: Final = "unknown"
"""What a model card says instead of a licence that is not known."""
_SCALARS: Final = (np.float16, np.float32, np.float64, np.int32, np.int64, np.bool_)
_WRAPPERS: Final = ("module.", "_orig_mod.")
"""Prefixes of keys that several GPUs and torch.compile add."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Others' weights that a run started from: kept in its checkpoints and exports."""

    kind: str
    """"nnU-Net" or "nnssl"."""
    file: str
    """Name without its folder."""
    licence: str | None = None
    """As the model card beside the file names it."""
    citations: tuple[str, ...] = ()
    """Papers that the file asks to cite."""

    def __str__(self) -> str:
        """One line, for the person who starts from them."""
        licence = f"licence {self.licence}" if self.licence else "no licence stated beside the file"
        papers = f"; please cite: {' | '.join(self.citations)}" if self.citations else ""
        return f"weights of {self.kind} ({self.file}): {licence}{papers}"

    def to_json(self) -> dict[str, Any]:
        """As checkpoints and exports keep it."""
        return {**asdict(self), "citations": list(self.citations)}


def parse_origins(values: Any) -> tuple[Origin, ...]:
    """The origins in a checkpoint or an export; empty where it lists none."""
    return tuple(
        Origin(**{**value, "citations": tuple(value.get("citations", ()))})
        for value in values or ()
    )


def allow_numpy_scalars() -> AbstractContextManager[Any]:
    """Let `torch.load(weights_only=True)` make numpy scalars while this context is open."""
    scalar = np.float64().__reduce__()[0]
    allowed: list[Any] = [np.dtype, *(type(np.dtype(kind)) for kind in _SCALARS)]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # before numpy 2, and since
        allowed.append((scalar, f"{module}.scalar"))
    return torch.serialization.safe_globals(allowed)


def find_checkpoint(folder: Path) -> Path | None:
    """The checkpoint in a published folder, or in the folder of a fold; None in others."""
    file = folder / CHECKPOINT
    return file if file.is_file() else None


def is_checkpoint(content: Any) -> bool:
    """Whether a file's content is a checkpoint of nnU-Net or nnssl."""
    return isinstance(content, dict) and isinstance(content.get(WEIGHTS_KEY), dict)


def parse_checkpoint(
    file: Path, content: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any], Origin | None]:
    """Tensors of a checkpoint's encoder and decoder, metadata, and its origin.

    Output layers are left out, because they belong to a task; aliases, because they are the same
    tensors. The metadata are ours if semgen wrote the file; else only `normalise`, if nnssl trained
    on z-scores. The origin is None for a file that a run of semgen exported for nnU-Net.

    Raises TrainError for a net that is none of our residual encoder nets, naming what differs.
    """
    weights = content[WEIGHTS_KEY]
    tensors = {_unwrap(key): tensor for key, tensor in weights.items()}
    if not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise TrainError(f"{file}: expected tensors in {WEIGHTS_KEY}; give another file")
    if not is_residual_encoder(tensors):
        trainer = content.get("trainer_name")
        of_trainer = f" (trainer {trainer})" if isinstance(trainer, str) else ""
        raise TrainError(
            f"{file}: not a 3-D residual encoder U-Net{of_trainer}; of nnU-Net and nnssl, only"
            " ResEnc nets can be read"
        )
    kept = {k: t for k, t in tensors.items() if not is_alias(k) and OUTPUT not in k}
    _check_net(file, kept)
    metadata = content.get(METADATA_KEY)
    if not isinstance(metadata, dict):
        return kept, _find_normalise(content), _find_origin(file, content)
    return kept, dict(metadata), _find_origin(file, content) if PLAN_KEY in content else None


def _find_normalise(content: Mapping[str, Any]) -> dict[str, Any]:
    """`normalise` of nnssl's plan, if all its configurations see z-scores."""
    try:
        configurations = content[PLAN_KEY]["pretrain_plan"]["configurations"].values()
        schemes = {name for one in configurations for name in one["normalization_schemes"]}
    except (KeyError, TypeError, AttributeError):
        return {}  # nnU-Net's own, or another version's
    return {"normalise": "zscore"} if schemes == {"ZScoreNormalization"} else {}


def _check_net(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise TrainError, naming what differs, unless tensors are of one of our nets."""
    theirs = find_architecture(tensors)
    kind, width = find_kind(tensors), theirs.features[0]
    if kind is None:
        numbers = ", ".join(map(str, STAGES.values()))
        raise TrainError(
            f"{file}: the net has {len(theirs.features)} stages; only nets with {numbers} can be"
            " read"
        )
    build = build_encoder if theirs.decoder_convs is None else build_backbone
    with torch.device("meta"):
        ours = find_architecture(build(kind, width).state_dict())
    found = compare_architectures(theirs, ours, f"in {kind}")
    if found:
        raise TrainError(f"{file}: the net is none of ours ({'; '.join(found)})")


def _unwrap(key: str) -> str:
    while key.startswith(_WRAPPERS):
        key = key.partition(".")[2]
    return key


def _find_origin(file: Path, content: Mapping[str, Any]) -> Origin:
    kind = "nnssl" if PLAN_KEY in content else "nnU-Net"
    published = file.with_name(ADAPTATION).is_file()
    return Origin(
        kind=kind,
        file=file.name,
        licence=_read_licence(file.with_name(CARD)) if published else None,
        citations=_list_citations(content.get("citations")),
    )


def _read_licence(card: Path) -> str | None:
    """The licence in the header of a model card, `license: ...` between two lines of dashes."""
    if not card.is_file():
        return None
    header = re.match(r"---\r?\n(.*?)\r?\n---", card.read_text("utf-8", errors="replace"), re.S)
    found = re.search(r"^license:[ \t]*(\S.*?)[ \t\r]*$", header[1], re.M) if header else None
    licence = found[1].strip("\"'") if found else UNKNOWN
    return None if licence == UNKNOWN else licence


def _list_citations(citations: Any) -> tuple[str, ...]:
    """Papers of nnssl's `citations`: dicts with a list of texts under one of several keys."""
    found: list[str] = []
    for entry in citations if isinstance(citations, list | tuple) else ():
        if not isinstance(entry, dict):
            continue
        papers = entry.get("apa_citations") or entry.get("bibtex_citations") or ()
        found += [" ".join(paper.split()) for paper in papers if isinstance(paper, str)]
    return tuple(dict.fromkeys(found))
