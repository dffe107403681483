"""Settings as dataclasses: types, unknown names, TOML files, differences.

A settings class calls `check_types` in its `__post_init__`, so that a value is checked wherever it
comes from: the command line, a TOML file, a plan, Python.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import types
from collections.abc import Mapping
from functools import lru_cache
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from store.errors import ConfigError, SemgenError

T = TypeVar("T")


def check_types(
    config: object, *, prefix: str = "", error: type[SemgenError] = ConfigError
) -> None:
    """Hold every field of a settings dataclass against its annotation, and convert it.

    Lists become tuples, 5 becomes 5.0 where a float is wanted, so that equal settings are equal.
    Raises `error` naming the field (after `prefix`), what it must be, and what came.
    """
    for name, hint in _field_types(type(config)).items():  # type: ignore[arg-type]
        value = getattr(config, name)
        try:
            value = _convert(hint, value)
        except TypeError:
            raise error(f"{prefix}{name} must be {_describe(hint)}, got {value!r}") from None
        object.__setattr__(config, name, value)  # settings are frozen


def build(
    kind: type[T],
    values: Mapping[str, Any],
    *,
    prefix: str = "",
    error: type[SemgenError] = ConfigError,
) -> T:
    """A settings dataclass from values by name; `error` names an unknown one, and the nearest."""
    known = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else ""
            raise error(f"unknown setting {prefix}{name}{hint}")
    return kind(**values)


def read_toml(file: Path, *, error: type[SemgenError] = ConfigError) -> dict[str, Any]:
    """The content of a TOML file; `error` where it cannot be read as one."""
    try:
        return tomllib.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise error(f"{file}: no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as problem:
        raise error(f"{file}: cannot be read as TOML: {problem}") from problem


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Settings that differ between two resolved configurations, as `name: theirs -> ours`."""
    return [
        f"{name}: {theirs.get(name)} -> {ours.get(name)}"
        for name in sorted({*ours, *theirs})
        if ours.get(name) != theirs.get(name)
    ]


@lru_cache
def _field_types(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}


def _convert(hint: Any, value: Any) -> Any:
    """The value as `hint` wants it; TypeError where it is something else."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError
        if arguments[-1] is Ellipsis:
            arguments = arguments[:1] * len(value)
        if len(value) != len(arguments):
            raise TypeError
        return tuple(_convert(kind, one) for kind, one in zip(arguments, value, strict=True))
    if origin is dict:
        hint = dict
    if hint in (int, float):
        number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        if not number or (hint is int and value != int(value)):
            raise TypeError
        return hint(value)
    if not isinstance(value, hint):
        raise TypeError
    return value


def _convert_union(kinds: tuple[Any, ...], value: Any) -> Any:
    for kind in kinds:
        try:
            return _convert(kind, value)
        except TypeError:
            continue
    raise TypeError


def _describe(hint: Any) -> str:
    """What a value of that type is called in a message."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(kind) for kind in arguments if kind is not types.NoneType)
    if origin is tuple:
        number = "whole numbers" if arguments[0] is int else "numbers"
        return f"a list of {number}" if arguments[-1] is Ellipsis else (
            f"a list of {len(arguments)} {number}"
        )  # fmt: skip
    if origin is dict:
        return "a table"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return words.get(hint, f"a table [{getattr(hint, '__name__', hint)}]")
