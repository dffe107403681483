"""The model card of published weights: what they were trained on and how, without patient data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from trainer.config import MACHINE_SETTINGS
from trainer.nnunet.read import UNKNOWN, Origin

_SEMANTIC_GENESIS: Final = (
    "Haghighi, F., Hosseinzadeh Taher, M. R., Zhou, Z., Gotway, M. B., & Liang, J. (2020). Learning"
    " semantics-enriched representation via self-discovery, self-classification, and"
    " self-restoration. MICCAI 2020, LNCS 12261, 137-147."
)
_MODELS_GENESIS: Final = (
    "Zhou, Z., Sodha, V., Pang, J., Gotway, M. B., & Liang, J. (2021). Models Genesis. Medical"
    " Image Analysis, 67, 101840."
)
_MAE: Final = (
    "He, K., Chen, X., Xie, S., Li, Y., Dollár, P., & Girshick, R. (2022). Masked autoencoders are"
    " scalable vision learners. CVPR 2022, 16000-16009."
)
_MAE_3D: Final = (
    "Wald, T., Ulrich, C., Lukyanenko, S., Goncharov, A., Paderno, A., Miller, M., Maerkisch, L.,"
    " Jaeger, P., & Maier-Hein, K. (2025). Revisiting MAE pre-training for 3D medical image"
    " segmentation. CVPR 2025, 5186-5196."
)
_RESENC: Final = (
    "Isensee, F., Wald, T., Ulrich, C., Baumgartner, M., Roy, S., Maier-Hein, K., & Jaeger, P. F."
    " (2024). nnU-Net revisited: A call for rigorous validation in 3D medical image segmentation."
    " MICCAI 2024. arXiv 2404.09556."
)
_LEFT_OUT: Final = MACHINE_SETTINGS | {
    "init", "init_part", "classes", "excluded_classes", "excluded_members"
}  # fmt: skip
"""Settings that name files, classes and scans of the archive, or that do not shape the weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a model card says."""

    net: str
    pretext: str
    classified: bool
    num_scans: int
    num_classes: int | None
    crop_shape: tuple[int, int, int]
    """Voxels, z, y, x."""
    spacing_mm: tuple[float, float, float] | None
    """z, y, x; None for each scan's own."""
    normalise: str
    """How values were mapped before they entered the net."""
    step: int
    patch_size: tuple[int, ...]
    """Recommended for fine-tuning."""
    licence: str | None
    origins: tuple[Origin, ...]
    settings: Mapping[str, Any]
    version: str


def list_citations(
    *, pretext: str, classified: bool, origins: Iterable[Origin]
) -> list[dict[str, Any]]:
    """Papers behind the weights, in the form of nnssl's checkpoints."""
    entries: list[tuple[str, str, list[str]]] = [("Architecture", "ResEnc", [_RESENC])]
    if classified:
        entries.append(("Pretraining Method", "Semantic Genesis", [_SEMANTIC_GENESIS]))
    if pretext == "mae":
        entries.append(("Pretraining Method", "MAE", [_MAE, _MAE_3D]))
    elif pretext == "restoration":
        entries.append(("Pretraining Method", "Models Genesis", [_MODELS_GENESIS]))
    for origin in origins:
        if origin.citations:
            entries.append(("Initial weights", origin.file, list(origin.citations)))
    return [{"type": kind, "name": name, "apa_citations": papers} for kind, name, papers in entries]


def list_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run that shape its weights, without paths and without the machine's."""
    return {name: value for name, value in config.items() if name not in _LEFT_OUT}


def describe_normalisation(normalise: str | None, window_hu: Iterable[float] | None) -> str:
    """How a run's crops were mapped to the net's input, in words."""
    if normalise == "zscore":
        return "z-scores: minus the mean of the scan, divided by its standard deviation"
    low, high = window_hu or (-1000.0, 1000.0)
    return f"{low:g} to {high:g} HU mapped to 0..1, values beyond cut off"


def write_card(facts: Facts) -> str:
    """The card as Markdown, with the header that model hubs read."""
    licence = f"license: {facts.licence or UNKNOWN}"
    task = "pipeline_tag: image-feature-extraction"
    header = ["---", licence, task, "tags:", "- medical", "- ct", "- nnssl", "---"]
    learned = [f"pretext task {facts.pretext}"] if facts.pretext != "none" else []
    if facts.classified:
        learned.append("classification of discovered anatomy")
    classes = f"{facts.num_classes} classes" if facts.num_classes else "no classes"
    spacing = "their own" if facts.spacing_mm is None else _sides(facts.spacing_mm, " mm")
    lines = [
        *header,
        "",
        f"# {facts.net}, pretrained on unlabeled CT",
        "",
        f"Weights of a residual encoder U-Net, for fine-tuning with nnU-Net. Written by semgen"
        f" {facts.version}.",
        "",
        "## Data",
        "",
        f"- {facts.num_scans} CT scans, without labels",
        f"- crops of {_sides(facts.crop_shape)} voxels (z, y, x), spacing {spacing}; {classes}",
        f"- values: {facts.normalise}",
        "- axes as in patients: left, posterior, superior (LPS)",
        "",
        "## Training",
        "",
        f"- {' and '.join(learned)}; {facts.step} steps",
        *(f"- {name}: {_show(value)}" for name, value in facts.settings.items()),
        *(f"- started from {origin}" for origin in facts.origins),
        "",
        "## Use",
        "",
        "With nnU-Net from its repository (later than 2.8.1 on PyPI):",
        "",
        "    nnUNetv2_extract_fingerprint -d ID",
        "    nnUNetv2_plan_experiment -d ID",
        "    nnUNetv2_preprocess_like_nnssl -d ID -n NAME -pc checkpoint_final.pth"
        " -am like_pretrained",
        "    nnUNetv2_train_pretrained ID 3d_fullres 0 -p PLANS_NAME",
        "",
        f"Recommended patch size: {_sides(facts.patch_size)} voxels. That route normalises to"
        " z-scores, whatever the weights were trained on.",
        "",
        "## Licence",
        "",
        facts.licence or "Not stated. Ask whoever published these weights before you use them.",
        "",
        "## Cite",
        "",
    ]
    citations = list_citations(
        pretext=facts.pretext, classified=facts.classified, origins=facts.origins
    )
    lines += [f"- {paper}" for entry in citations for paper in entry["apa_citations"]]
    return "\n".join(lines) + "\n"


def _sides(values: Iterable[float], unit: str = "") -> str:
    return " x ".join(f"{value:g}" for value in values) + unit


def _show(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "default" if value is None else str(value)
