"""Settings as frozen dataclasses: checks, TOML files, descriptions, differences.

A settings class has one annotation, one default and one docstring for each field. Everything else
follows from these: the command line's options, the tables of docs/configuration.md, the checks. A
class calls `check_types` in its `__post_init__`, then `require` for its ranges, so that a value is
checked wherever it comes from.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import itertools
import json
import math
import sys
import tomllib
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Real
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from store.errors import ConfigError, SemgenError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One field of a settings class."""

    name: str
    type: Any
    """Its annotation, resolved."""
    default: Any
    description: str
    """Its docstring, on one line."""


def describe(kind: type) -> list[Setting]:
    """The fields of a settings class; its own first, then those of its base."""
    descriptions, own = _descriptions(kind), kind.__annotations__
    return [
        Setting(
            name=field.name,
            type=_field_types(kind)[field.name],
            default=(
                field.default
                if field.default_factory is dataclasses.MISSING
                else field.default_factory()
            ),
            description=descriptions.get(field.name, ""),
        )
        for field in sorted(dataclasses.fields(kind), key=lambda field: field.name not in own)
    ]


def check_types(
    config: object, *, prefix: str = "", error: type[SemgenError] = ConfigError
) -> None:
    """Check every field of a settings object against its annotation, and convert it.

    Lists become tuples and 5 becomes 5.0 where a float is wanted, so that equal settings are equal.
    Raises `error` naming the field (after `prefix`), what it must be, and what it is.
    """
    for name, hint in _field_types(type(config)).items():  # type: ignore[arg-type]
        value = getattr(config, name)
        try:
            value = _convert(hint, value)
        except TypeError:
            raise error(f"{prefix}{name} must be {_expected(hint)}, got {value!r}") from None
        object.__setattr__(config, name, value)  # settings are frozen


def require(
    holds: bool, name: str, rule: str, value: Any, *, error: type[SemgenError] = ConfigError
) -> None:
    """Raise `error` that says what a setting must be, unless it holds."""
    if not holds:
        raise error(f"{name} must be {rule}, got {value!r}")


def require_choice(
    name: str, value: str, allowed: Sequence[str], *, error: type[SemgenError] = ConfigError
) -> None:
    """Raise `error` unless an argument has one of the allowed values."""
    require(value in allowed, name, f"one of {', '.join(allowed)}", value, error=error)


def build(
    kind: type[T],
    values: Mapping[str, Any],
    *,
    prefix: str = "",
    error: type[SemgenError] = ConfigError,
) -> T:
    """A settings object from values by name; tables of values for fields that are settings, too.

    Raises `error` for an unknown name; the message suggests the nearest known one.
    """
    hints = _field_types(kind)  # type: ignore[arg-type]
    given = {}
    for name, value in values.items():
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else ""
            raise error(f"unknown setting {prefix}{name}{hint}")
        if dataclasses.is_dataclass(hints[name]) and isinstance(value, Mapping):
            given[name] = build(hints[name], value, prefix=f"{prefix}{name}.", error=error)
        else:
            given[name] = value
    return kind(**given)


def load(
    kind: type[T],
    file: str | Path | None,
    options: Mapping[str, Any],
) -> T:
    """Settings from a TOML file, then from options, which take precedence; None: not given."""
    values = read_toml(file) if file is not None else {}
    given = {name: value for name, value in options.items() if value is not None}
    return build(kind, values | given)


def read_toml(file: str | Path, *, error: type[SemgenError] = ConfigError) -> dict[str, Any]:
    """The content of a TOML file; `error` where it cannot be read as one."""
    try:
        return tomllib.loads(Path(file).read_text("utf-8"))
    except FileNotFoundError:
        raise error(f"{file}: no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as problem:
        raise error(f"{file}: cannot be read as TOML: {problem}") from problem


def to_json(config: Any) -> dict[str, Any]:
    """Settings by name, as JSON has them: tuples are lists."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Settings that differ between two resolved configurations, as `name: theirs -> ours`."""
    return [
        f"{name}: {theirs.get(name)} -> {ours.get(name)}"
        for name in sorted({*ours, *theirs})
        if ours.get(name) != theirs.get(name)
    ]


def expected_type(hint: Any) -> Any:
    """An annotation without `| None`."""
    kinds = [kind for kind in get_args(hint) if kind is not types.NoneType]
    optional = get_origin(hint) in (Union, types.UnionType) and len(kinds) < len(get_args(hint))
    return Union[tuple(kinds)] if optional else hint  # noqa: UP007 - made at run time


@lru_cache
def _field_types(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}


@lru_cache
def _descriptions(kind: type) -> dict[str, str]:
    """Docstrings of a class's fields, which Python does not keep, from its source."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            tree = ast.parse(inspect.getsource(sys.modules[base.__module__]))
        except OSError:  # an installation without sources
            continue
        body = next(
            node.body
            for node in tree.body
            if isinstance(node, ast.ClassDef) and node.name == base.__name__
        )
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                match text:
                    case ast.Expr(value=ast.Constant(value=str(words))):
                        found[field.target.id] = " ".join(words.split())
    return found


def _convert(hint: Any, value: Any) -> Any:
    """The value as `hint` wants it; TypeError where it is something else."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value)
    if origin is Literal:
        if value not in arguments:
            raise TypeError
        return value
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
        if not number or (hint is int and (value != int(value) or abs(value) > 2**63)):
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


def _expected(hint: Any) -> str:
    """What a value of that type is called in a message."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_expected(kind) for kind in arguments if kind is not types.NoneType)
    if origin is Literal:
        return f"one of {', '.join(arguments)}" if len(arguments) > 1 else f'"{arguments[0]}"'
    if origin is tuple:
        number = {int: "whole numbers", str: "texts"}.get(arguments[0], "numbers")
        return f"a list of {number}" if arguments[-1] is Ellipsis else (
            f"a list of {len(arguments)} {number}"
        )  # fmt: skip
    if origin is dict:
        return "a table"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return words.get(hint, "a table")
