"""Options of a command, made from a settings class; and the parameter types that they need."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, get_args, get_origin

import click

from store.errors import check_local, is_url
from store.settings import Setting, describe, expected_type, load, to_json

Command = TypeVar("Command", bound=Callable[..., Any])
_log = logging.getLogger(__name__)
_MOST_DIGITS: Final = 6
"""Of numbers in a range."""


class LocalPath(click.Path):
    """A file or folder; a URL is refused, because pathlib would make it a local folder."""

    def __init__(self, **rules: bool) -> None:
        super().__init__(path_type=Path, **rules)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        check_local(value)
        if not str(value):
            self.fail("is empty; give a path", param, ctx)
        return super().convert(value, param, ctx)


class StorePath(click.Path):
    """A store to read: a folder, or the URL of one."""

    def __init__(self) -> None:
        super().__init__(file_okay=False, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not str(value):
            self.fail("is empty; give a path", param, ctx)
        return value if is_url(value) else super().convert(value, param, ctx)


class Numbers(click.ParamType):  # type: ignore[type-arg]
    """Whole numbers and ranges of them, such as 0-9,12."""

    name = "numbers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        found: list[int] = []
        if isinstance(value, tuple):
            return value
        for part in filter(None, str(value).split(",")):
            first, _, last = part.partition("-")
            if not (first.isdecimal() and (last.isdecimal() or not last)):
                self.fail(f"{value!r}: give numbers such as 3 or 0-9,12", param, ctx)
            if last and int(last) < int(first):
                self.fail(f"{part!r}: the first number of a range must be smaller", param, ctx)
            if max(len(first), len(last)) > _MOST_DIGITS:
                self.fail(f"{part!r}: is too large", param, ctx)
            found += range(int(first), int(last or first) + 1)
        return tuple(dict.fromkeys(found))


class Count(click.ParamType):  # type: ignore[type-arg]
    """A number above 0, or "all", which becomes None."""

    name = "number|all"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "N|all"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | None:
        if value == "all":
            return None
        if not str(value).isdecimal() or int(value) < 1:
            self.fail(f"{value!r}: give a number above 0, or all", param, ctx)
        return int(value)


class Texts(click.ParamType):  # type: ignore[type-arg]
    """Texts separated by commas."""

    name = "text,..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(part.strip() for part in str(value).split(",") if part.strip())


class Vector(click.ParamType):  # type: ignore[type-arg]
    """Numbers separated by commas, or a word instead: Z,Y,X|native."""

    def __init__(self, kind: type, length: int, word: str | None) -> None:
        self.kind, self.length, self.word = kind, length, word
        axes = "Z,Y,X" if length == 3 else "LOW,HIGH"
        self.name = f"{axes}|{word}" if word else axes

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return self.name

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...] | str:
        if self.word is not None and value == self.word:
            return self.word
        try:
            numbers = tuple(self.kind(part) for part in str(value).split(","))
        except ValueError:
            numbers = ()
        if len(numbers) != self.length:
            self.fail(f"{value!r}: give {self.name}", param, ctx)
        return numbers


class ClassText(click.ParamType):  # type: ignore[type-arg]
    """CLASS=TEXT."""

    name = "class=text"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, str]:
        number, equals, text = str(value).partition("=")
        if not (number.isdecimal() and equals):
            self.fail(f'{value!r}: give a class and a text, such as 3="left lung"', param, ctx)
        return int(number), text


FILE: Final = LocalPath(exists=True, dir_okay=False)
FOLDER: Final = LocalPath(file_okay=False)
STORE: Final = StorePath()
NUMBERS: Final = Numbers()
TEXTS: Final = Texts()
COUNT: Final = Count()
CLASS_TEXT: Final = ClassText()
POSITION: Final = Vector(float, 3, None)


def options_from(
    kind: type,
    read: Callable[[Path | None, dict[str, Any]], Any] | None = None,
    *,
    headings: Mapping[str, str] | None = None,
) -> Callable[[Command], Command]:
    """Give a command its settings as `config`: --config FILE, and an option for each setting.

    A setting that is a table is left to the file. A setting for which the command declares an
    option itself (below this decorator) is left to that option.

    read
        Makes the settings from the file and the options by name; it gets --preset, too.
    headings
        For --help, by the setting that is the first below the heading.
    """
    settings = [s for s in describe(kind) if not dataclasses.is_dataclass(s.type)]
    names = {setting.name for setting in settings} | {"preset"}
    make = read or functools.partial(load, kind)

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def with_config(config_file: Path | None, **options: Any) -> Any:
            used = {name: options.pop(name) for name in names & options.keys()}
            config = make(config_file, used)
            if isinstance(config, kind):
                _log.info("settings: %s", json.dumps(to_json(config)))
            return command(config=config, **options)

        decorated: Any = with_config
        own = {parameter.name for parameter in getattr(command, "__click_params__", ())}
        for setting in reversed(settings):
            if setting.name not in own:
                decorated = _option(setting)(decorated)
        text = "TOML file with any of the settings below. Options take precedence."
        with_file: Command = click.option("--config", "config_file", type=FILE, help=text)(
            decorated
        )
        decorated.settings, decorated.headings = names - {"preset"}, headings or {}
        return with_file

    return decorate


def _option(setting: Setting) -> Callable[[Command], Command]:
    kind, text = expected_type(setting.type), setting.description
    name = setting.name.replace("_", "-")
    if isinstance(_click_type(kind), Vector):
        name = name.removesuffix("-mm").removesuffix("-hu")
    if setting.default is not None:
        text += f"  [default: {_show(setting.default, name)}]"
    flag = f"--{name}/--no-{name}" if kind is bool else f"--{name}"
    return click.option(flag, setting.name, type=_click_type(kind), default=None, help=text)


def _show(default: Any, name: str) -> str:
    """A default as it is typed."""
    if isinstance(default, bool):
        return name if default else f"no-{name}"
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _click_type(kind: Any) -> Any:
    """The parameter type for the annotation of a setting."""
    arguments = get_args(kind)
    if kind in (bool, int, float, str):
        return kind
    if get_origin(kind) is Literal:
        return click.Choice(arguments)
    if get_origin(kind) is tuple:
        number, length = arguments[0], len(arguments)
        if arguments[-1] is Ellipsis:
            return TEXTS if number is str else NUMBERS
        return Vector(number, length, None)
    numbers, word = arguments  # such as tuple[float, float, float] | Literal["native"]
    return Vector(get_args(numbers)[0], len(get_args(numbers)), get_args(word)[0])
