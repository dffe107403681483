"""The tables of settings in docs/, made from the settings classes.

python -m tests.support.settings_tables     writes them anew
"""

import re
from pathlib import Path
from typing import Any

from pipeline.config import PRESETS, AutoencoderConfig, PrepareConfig
from store.settings import Setting, describe
from trainer.config import FREE_TO_CHANGE, TrainConfig
from trainer.finetuning.config import FinetuneConfig

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
KINDS = (PrepareConfig, AutoencoderConfig, TrainConfig, FinetuneConfig)


def show(value: Any) -> str:
    """A value as TOML has it; `-` for None."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    return f"{list(value)}" if isinstance(value, tuple) else f"{value:g}".replace("1e+09", "10^9")


def row(kind: type, setting: Setting) -> list[str]:
    cells = [f"`{setting.name}`", show(setting.default)]
    if kind is PrepareConfig:
        paper = PRESETS["paper"]
        cells.append(show(paper[setting.name]) if setting.name in paper else "")
    elif kind is not AutoencoderConfig:
        cells.append("yes" if setting.name in FREE_TO_CHANGE else "")
    return [*cells, setting.description.replace("|", r"\|")]


def table(kind: type) -> str:
    third = {PrepareConfig: ["paper"], AutoencoderConfig: []}.get(kind, ["may change"])
    head = ["setting", "default", *third, "meaning"]
    rows = [row(kind, s) for s in describe(kind) if s.name != "autoencoder"]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fill(page: str) -> str:
    """The page with its tables as they must be."""
    for kind in KINDS:
        mark = f"<!-- settings: {kind.__name__} -->\n"
        page = re.sub(
            rf"{mark}.*?<!-- end -->",
            lambda _, m=mark, k=kind: f"{m}{table(k)}\n<!-- end -->",  # type: ignore[misc]
            page,
            flags=re.S,
        )
    return page


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text("utf-8")), "utf-8")
