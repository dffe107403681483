"""Test `store` with several versions of Python and zarr, and with all its lower bounds.

    python -m scripts.versions.check STORE [--only 3.13]

STORE is the store that the tests prepare from phantoms; it is made if there is none. Each
combination runs in an environment of its own with what `store` and these tests need. Tests of
`store` that also need torch, SimpleITK or a browser are left out. uv (`pip install uv`) makes the
environments, and finds or downloads the versions of Python.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from pipeline import load_config, prepare
from pipeline.phantom.files import write_archive
from tests.support.settings import SETTINGS

ROOT = Path(__file__).resolve().parents[2]
STORE = ("blake3", "click", "google-crc32c", "numcodecs", "numpy", "pillow", "rich", "scipy",
         "tornado", "zarr")  # fmt: skip
TOOLS = ("dask", "pandas", "pytest", "pytest-timeout", "tensorstore", "xarray")
COMBINATIONS = (
    ("3.11", "lowest"),
    ("3.12", "zarr==3.2.*"),
    ("3.12", "zarr==3.3.*"),
    ("3.13", "zarr==3.4.*"),
)
"""Python, and zarr with all else newest; "lowest" stands for the lower bounds of pyproject.toml.

The tests of the project itself run with Python 3.11 and the zarr of constraints.txt.
"""
TESTS = ("atomic", "classes", "layout", "matches", "quality", "readers", "settings", "sharded",
         "store", "verification")  # fmt: skip
VERSIONS = f"""
import platform
from importlib.metadata import version
print(platform.python_version(), *(f"{{name}} {{version(name)}}" for name in {[*STORE, *TOOLS]}))
"""


def main() -> None:
    """Run all combinations; exit status 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("--only", help="this version of Python")
    options = parser.parse_args()
    if not options.store.exists():
        _prepare(options.store)
    chosen = [pair for pair in COMBINATIONS if options.only in {None, pair[0]}]
    failed = [pair for pair in chosen if not _test(*pair, store=options.store.resolve())]
    print("failed:", failed)
    sys.exit(bool(failed))


def _prepare(store: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (settings := Path(folder, "small.toml")).write_text(SETTINGS)
        write_archive(Path(folder, "scans"), patients=5, format="mixed", seed=7, matrix=64)
        prepare(Path(folder, "scans"), store, load_config(settings), workers=1)


def _test(python: str, version: str, *, store: Path) -> bool:
    lowest = version == "lowest"
    requirements = [*_requirements(), *([] if lowest else [version])]
    run = [
        *("uv", "run", "--quiet", "--no-project", "--isolated", "--python", python),
        *("--resolution", "lowest-direct" if lowest else "highest"),
        *(part for requirement in requirements for part in ("--with", requirement)),
        "python",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SEMGEN_PREPARED": str(store)}
    print(f"\n== Python {python}, {version}", flush=True)
    subprocess.run([*run, "-c", VERSIONS], cwd=ROOT, check=True)
    files = [f"tests/store/test_{name}.py" for name in TESTS]
    command = [*run, "-m", "pytest", "-p", "no:cacheprovider", *files]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 0


def _requirements() -> list[str]:
    """What STORE and TOOLS name, with the bounds of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    given = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    bounds = {re.split(r"[\[<>=]", line)[0]: line for line in given}
    return [bounds[name] for name in (*STORE, *TOOLS)]


if __name__ == "__main__":
    main()
