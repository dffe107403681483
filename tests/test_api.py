"""The Python API: names that researchers import, imported on first use, typed."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support.command import ROOT

PACKAGES = ("pipeline", "store", "trainer", "trainer.finetuning", "trainer.comparison")


@pytest.mark.parametrize("name", PACKAGES)
def test_every_public_name_can_be_imported(name: str) -> None:
    package = importlib.import_module(name)
    assert sorted(package.__all__) == dir(package)
    for public in package.__all__:
        home = getattr(package, public).__module__
        assert home.split(".")[0] in {name.split(".", maxsplit=1)[0], "typing", "types"}


@pytest.mark.parametrize("name", PACKAGES)
def test_an_unknown_name_is_an_attribute_error(name: str) -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        importlib.import_module(name).nothing  # noqa: B018


def test_importing_the_packages_loads_nothing_heavy() -> None:
    heavy = {"torch", "numpy", "zarr", "dask", "SimpleITK", "faiss", "pydicom", "scipy"}
    script = f"import sys, {', '.join(PACKAGES)}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("name", ["pipeline", "store", "trainer"])
def test_a_package_is_marked_as_typed(name: str) -> None:
    assert Path(str(importlib.import_module(name).__file__)).with_name("py.typed").exists()


@pytest.mark.parametrize("name", ["pipeline", "store", "trainer"])
def test_a_package_has_the_version_of_the_project(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert importlib.import_module(name).__version__ == project["version"]


@pytest.mark.parametrize("name", PACKAGES)
def test_a_documented_signature_has_the_parameters_of_the_code(name: str) -> None:
    package = importlib.import_module(name)
    page = (ROOT / "docs" / "api.md").read_text("utf-8")
    for public in package.__all__:
        found = re.search(rf"\| `{public}\((.*?)\)(?: ->[^`]*)?`", page)
        if not found:
            continue
        head = ast.parse(f"def f({found[1].replace(', ...', '')}): ...").body[0]
        assert isinstance(head, ast.FunctionDef)
        arguments = [*head.args.posonlyargs, *head.args.args, *head.args.kwonlyargs]
        documented = [argument.arg for argument in arguments]
        actual = list(inspect.signature(getattr(package, public)).parameters)
        if "..." not in found[1]:
            assert documented == actual, public
        assert set(documented) <= set(actual), public


@pytest.mark.parametrize("name", PACKAGES)
def test_every_public_name_is_documented(name: str) -> None:
    page = (ROOT / "docs" / "api.md").read_text("utf-8")
    names = importlib.import_module(name).__all__
    assert [n for n in names if not re.search(rf"`[^`]*\b{n}\b[^`]*`", page)] == []
