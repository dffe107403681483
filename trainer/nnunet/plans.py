"""Plans of nnU-Net: read a configuration, compare its net with our weights, adapt a copy."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from store.atomic import replace_file
from trainer.errors import TrainError
from trainer.nnunet.architecture import (
    CLASS_NAME,
    IMPORTED,
    Architecture,
    compare_architectures,
    compare_layers,
    parse_architecture,
)


@dataclass(frozen=True, slots=True)
class Plans:
    """One configuration of a plans file."""

    file: Path
    content: dict[str, Any]
    """The whole file."""
    configuration: str
    settings: dict[str, Any]
    """Of the configuration, inherited ones included."""

    @property
    def patch_size(self) -> tuple[int, ...]:
        """Voxels, z, y, x."""
        return tuple(int(side) for side in self.settings["patch_size"])


def read_plans(file: str | Path, configuration: str) -> Plans:
    """Read a plans file of nnU-Net 2; TrainError if it is none, or lacks the configuration."""
    file = Path(file)
    if not file.is_file():
        raise TrainError(
            f"{file}: no such file; give the plans of your data set, such as"
            " nnUNet_preprocessed/Dataset001_NAME/nnUNetResEncUNetLPlans.json"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainError(f"{file}: expected JSON, but it cannot be read ({error})") from error
    configurations = content.get("configurations") if isinstance(content, dict) else None
    if not isinstance(configurations, dict) or "plans_name" not in content:
        raise TrainError(f"{file}: not plans of nnU-Net 2; expected plans_name and configurations")
    return Plans(file, content, configuration, _resolve(file, configurations, configuration))


def compare_with_plans(plans: Plans, ours: Architecture) -> list[str]:
    """What keeps our weights from loading into the net of plans; empty if they fit."""
    architecture = plans.settings.get("architecture")
    if not isinstance(architecture, dict):
        return ["architecture: missing in the plans, which are from before nnU-Net 2.4; plan again"]
    name = str(architecture.get("network_class_name"))
    if name.rpartition(".")[2] != CLASS_NAME.rpartition(".")[2]:
        return [f"net: ResidualEncoderUNet in the weights, {name.rpartition('.')[2]} in the plans"]
    description = architecture.get("arch_kwargs") or {}
    channels = len(plans.settings.get("normalization_schemes") or [None])
    try:
        theirs = parse_architecture(description, input_channels=channels)
    except TrainError as error:
        raise TrainError(f"{plans.file}: configuration {plans.configuration}: {error}") from error
    found = compare_architectures(ours, theirs, "in the plans") + compare_layers(description)
    if plans.settings.get("previous_stage"):
        found.append("input channels: 1 in the weights; a cascade has more, for its labels")
    return found


def check_fit(plans: Plans, ours: Architecture) -> None:
    """Raise TrainError that names all differences, unless our weights fit the plans."""
    found = compare_with_plans(plans, ours)
    if found:
        raise TrainError(
            f"{plans.file}: the weights do not fit configuration {plans.configuration}"
            f" ({'; '.join(found)}); give --adapt NAME to write plans with the net of the weights"
        )


def adapt_plans(plans: Plans, ours: Architecture, name: str) -> None:
    """Write a copy of plans with our net, as NAME.json beside them.

    The copy has the one configuration. Spacing and normalisation stay, so data that were
    preprocessed with the plans serve for the copy, too. Patch sides are rounded up to what our
    strides divide. Memory and batch size are not planned again.

    Raises TrainError if the data have several channels, or NAME.json exists with other content.
    """
    if not name or Path(name).name != name or name in (".", ".."):
        raise TrainError(f"adapt must be a name without folders, such as SemgenPlans; got {name!r}")
    if name == plans.content["plans_name"]:
        raise TrainError(f"adapt must differ from the name of the plans themselves; got {name!r}")
    settings = copy.deepcopy(plans.settings)
    channels = len(settings.get("normalization_schemes") or [None])
    if channels != ours.input_channels or settings.get("previous_stage"):
        raise TrainError(
            f"{plans.file}: the weights have {ours.input_channels} input channel, the data of"
            f" configuration {plans.configuration} more; export with --format nnssl, whose"
            " trainer in nnU-Net repeats the first convolution"
        )
    settings["architecture"] = {
        "network_class_name": CLASS_NAME,
        "arch_kwargs": ours.describe(),
        "_kw_requires_import": list(IMPORTED),
    }
    settings["patch_size"] = list(round_up(plans.patch_size, ours))
    settings.pop("inherits_from", None)
    content = {
        **plans.content,
        "plans_name": name,
        "configurations": {plans.configuration: settings},
    }
    file = plans.file.with_name(f"{name}.json")
    text = json.dumps(content, indent=4) + "\n"
    if file.exists() and file.read_text(encoding="utf-8") != text:
        raise TrainError(f"{file}: exists with other content; give another name to --adapt")
    with replace_file(file) as partial:
        partial.write_text(text, encoding="utf-8")


def round_up(patch_size: tuple[int, ...], ours: Architecture) -> tuple[int, ...]:
    """The patch size with sides that the strides divide, and more than one voxel at the bottom."""
    sides = [
        factor * math.ceil(side / factor)
        for side, factor in zip(patch_size, ours.factor, strict=True)
    ]
    if tuple(sides) == ours.factor:  # instance norm needs more than one voxel
        sides = [2 * side for side in sides]
    return tuple(sides)


def _resolve(file: Path, configurations: dict[str, Any], name: str) -> dict[str, Any]:
    """Settings of a configuration, over those that it inherits."""
    settings: dict[str, Any] = {}
    wanted: str | None = name
    seen: list[str] = []
    while wanted is not None:
        found = configurations.get(wanted)
        if not isinstance(found, dict) or wanted in seen:
            raise TrainError(
                f"{file}: no configuration {wanted!r}; it has {', '.join(configurations)}"
            )
        seen.append(wanted)
        settings = {**found, **settings}
        wanted = found.get("inherits_from")
    if len(settings.get("patch_size") or ()) != 3:
        raise TrainError(
            f"{file}: configuration {name!r} is not 3-D; give a 3-D one with --configuration"
        )
    return settings
