"""pipeline -> store <- trainer, the command line on top, and nothing heavy before it is needed."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "zarr", "dask", "distributed", "SimpleITK", "faiss", "numpy", "scipy", "pydicom")


def imported(node: ast.AST) -> Iterator[str]:
    """Full names of the modules that a statement imports; relative ones stay in the package."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.level == 0:
        yield str(node.module)


def imports_of(package: str) -> set[tuple[str, str]]:
    """(file, first name of an imported module), wherever in the file the import stands."""
    return {
        (str(file.relative_to(ROOT)), name.split(".")[0])
        for file in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        for name in imported(node)
    }


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("store", {"pipeline", "trainer", "cli", "torch", "dask", "distributed"}),
        ("trainer", {"pipeline", "cli", "dask", "distributed", "faiss", "pydicom"}),
        ("pipeline", {"trainer", "cli"}),
    ],
)
def test_imports_point_towards_the_store(package: str, forbidden: set[str]) -> None:
    found = imports_of(package)
    assert {name for _, name in found} >= {"numpy"}, "the search sees imports at all"
    assert sorted((file, name) for file, name in found if name in forbidden) == []


def test_only_the_reader_of_images_needs_readers_of_images() -> None:
    found = {(f, n) for f, n in imports_of("store") if n in {"SimpleITK", "pydicom"}}
    assert {name for _, name in found} == {"SimpleITK", "pydicom"}
    assert {str(Path(file).parent) for file, _ in found} == {"store/images"}
    users = {
        file.relative_to(ROOT).as_posix()
        for package in ("store", "trainer")
        for file in (ROOT / package).rglob("*.py")
        if "store.images." in file.read_text("utf-8") and file.parent.name != "images"
    }
    assert {str(Path(user).parent) for user in users} == {"trainer/finetuning"}


def test_pretraining_needs_no_reader_of_images() -> None:
    """Only fine-tuning does."""
    found = {(f, n) for f, n in imports_of("trainer") if n in {"SimpleITK", "monai", "matplotlib"}}
    assert {name for _, name in found} == {"SimpleITK", "monai", "matplotlib"}
    folders = {str(Path(file).parent) for file, _ in found}
    assert folders == {"trainer/finetuning", "trainer/comparison", "trainer/nets"}


def test_the_packages_do_not_import_the_tests_or_benchmarks() -> None:
    found = set().union(*(imports_of(package) for package in ("pipeline", "store", "trainer")))
    assert sorted(pair for pair in found if pair[1] in {"tests", "benchmarks"}) == []


def test_settings_import_neither_torch_nor_numpy() -> None:
    modules = "pipeline.config", "trainer.config", "trainer.finetuning.config"
    script = f"import sys, {', '.join(modules)}; print(sorted(set({HEAVY}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_reading_a_catalogue_needs_no_reader_of_images() -> None:
    """`semgen inspect --paths` starts quickly, also where SimpleITK is slow to load."""
    names = "'pydicom', 'SimpleITK', 'distributed', 'torch'"
    script = f"import sys, pipeline.archive.lookup; print(sorted({{{names}}} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_the_page_of_a_store_does_not_need_torch() -> None:
    """`semgen report` looks whether it was given runs."""
    script = (
        "import sys; from store.report import write_report; from trainer.report import is_run;"
        " print(is_run.__name__, sorted({'torch', 'tensorboard'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "is_run []\n"


def test_no_help_text_needs_a_heavy_module() -> None:
    script = (
        "import sys, cli\n"
        "for arguments in ([], *([name] for name in cli.main.commands)):\n"
        "    cli.main([*arguments, '--help'], standalone_mode=False)\n"
        f"print('loaded:', sorted(set({HEAVY}) & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "loaded: []"
