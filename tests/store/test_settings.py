"""Settings classes: types, descriptions, TOML files."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from store.errors import ConfigError
from store.settings import build, check_types, describe, differences, load, to_json


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    size: int = 3
    """Size in voxels."""

    def __post_init__(self) -> None:
        check_types(self, prefix="inner.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    seed: int = 0
    """Seed of every
    draw."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings(Base):
    word: Literal["a", "b"] = "a"
    """A word."""
    sides: tuple[float, float] | Literal["own"] = (1.0, 2.0)
    """Two sides."""
    some: tuple[int, ...] | None = None
    """Some numbers."""
    inner: Inner = field(default_factory=Inner)
    """A table."""
    seed: int = 7


def test_a_setting_is_described_by_its_docstring_and_its_own_come_first() -> None:
    found = {setting.name: setting for setting in describe(Settings)}
    assert list(found) == ["seed", "word", "sides", "some", "inner"]
    assert found["seed"].description == "Seed of every draw."  # that of the base
    assert found["seed"].default == 7
    assert found["inner"].default == Inner()
    assert found["sides"].type == tuple[float, float] | Literal["own"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"word": "c"}, "word must be one of a, b, got 'c'"),
        ({"sides": "other"}, "sides must be a list of 2 numbers or \"own\", got 'other'"),
        ({"sides": [1, 2, 3]}, 'sides must be a list of 2 numbers or "own", got [1, 2, 3]'),
        ({"some": 3}, "some must be a list of whole numbers, got 3"),
        ({"inner": 5}, "inner must be a table, got 5"),
        ({"inner": {"size": "x"}}, "inner.size must be a whole number, got 'x'"),
        ({"inner": {"sise": 1}}, "unknown setting inner.sise; did you mean inner.size?"),
        ({"wrod": "a"}, "unknown setting wrod; did you mean word?"),
        ({"entirely": 1}, "unknown setting entirely"),
    ],
)
def test_a_wrong_value_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(Settings, values)
    assert str(caught.value) == message


def test_values_are_converted_so_that_equal_settings_are_equal() -> None:
    assert build(Settings, {"sides": [1, 2], "some": [3.0], "inner": {"size": 3}}) == Settings(
        some=(3,)
    )


def test_options_take_precedence_over_the_file_and_none_is_no_option(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('word = "b"\nsides = "own"\n[inner]\nsize = 4')
    config = load(Settings, file, {"sides": (3.0, 4.0), "word": None})
    assert config == Settings(word="b", sides=(3.0, 4.0), inner=Inner(size=4))


def test_settings_survive_json() -> None:
    config = Settings(some=(1, 2))
    assert to_json(config)["some"] == [1, 2]
    assert build(Settings, to_json(config)) == config


def test_differences_are_named() -> None:
    changed = differences(to_json(Settings(word="b")), to_json(Settings()))
    assert changed == ["word: a -> b"]
