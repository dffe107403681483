"""Resolved settings: where each comes from, as TOML that can be used as a settings file."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from store.settings import describe, to_json

DEFAULT, DERIVED = "default", "derived from other settings"


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolved:
    """Settings by name, those of a table as `table.name`; and where each comes from."""

    values: dict[str, Any]
    origins: dict[str, str]

    def __str__(self) -> str:
        """TOML; a setting without a value is a comment."""
        lines: list[str] = []
        for table, names in _tables(self.values):
            lines += ["", f"[{table}]"] if table else []
            texts = [
                f"# {name}: no value" if value is None else f"{name} = {format_value(value)}"
                for name, value in names.items()
            ]
            width = max(len(text) for text in texts)
            for text, name in zip(texts, names, strict=True):
                origin = self.origins[f"{table}.{name}" if table else name]
                lines.append(f"{text.ljust(width)}  # {origin}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Value and origin of each setting."""
        return {
            name: {"value": value, "from": self.origins[name]}
            for name, value in self.values.items()
        }


def resolve(config: Any, layers: Mapping[str, Mapping[str, Any]]) -> Resolved:
    """The settings in `config`, each from the last of the layers that gives it.

    layers
        Settings by where they come from, such as the name of a file; later ones take precedence.
    """
    defaults = _flatten(
        {
            s.name: to_json(s.default) if dataclasses.is_dataclass(s.default) else s.default
            for s in describe(type(config))
        }
    )
    given, origins = _flatten(to_json(config)), dict[str, str]()
    values = {name: given[name] for name in defaults}  # in the order of the documentation
    for name, value in values.items():
        default = defaults[name]
        plain = list(default) if isinstance(default, tuple) else default
        origins[name] = DEFAULT if value == plain else DERIVED
    for origin, layer in layers.items():
        origins |= dict.fromkeys(_flatten(layer), origin)
    return Resolved(values=values, origins=origins)


def recorded(values: Mapping[str, Any]) -> Resolved:
    """The settings that a store or a run records of how it was made."""
    flat = _flatten(values)
    return Resolved(values=flat, origins=dict.fromkeys(flat, "recorded"))


def template(kind: type) -> str:
    """A settings file with all settings of a class as comments, each with its description."""
    lines: list[str] = []
    tables: list[str] = []
    for setting in describe(kind):
        text = textwrap.wrap(setting.description, 96, initial_indent="# ", subsequent_indent="# ")
        if dataclasses.is_dataclass(setting.type):
            content = template(setting.type)  # type: ignore[arg-type]
            tables += ["", *text, f"[{setting.name}]", "", content]
            continue
        lines += text
        shown = "..." if setting.default is None else format_value(setting.default)
        lines += [f"#{setting.name} = {shown}", ""]
    return "\n".join([*lines[:-1], *tables])


def format_value(value: Any) -> str:
    """A value as TOML has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(format_value, value))}]"
    return repr(value)


def _flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": one for inner, one in value.items()}
        else:
            flat[name] = value
    return flat


def _tables(values: Mapping[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    """Values by table; those of no table come first."""
    tables: dict[str, dict[str, Any]] = {"": {}}
    for name, value in values.items():
        table, _, rest = name.rpartition(".")
        tables.setdefault(table, {})[rest] = value
    return tables.items()
