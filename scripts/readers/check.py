"""Read a store with the readers that are no Python libraries of the tests: zarrita and napari.

    python scripts/readers/check.py STORE --modules FOLDER --napari NAPARI_ENVIRONMENT/bin/python

Runs the examples of docs/readers.md. Then compares every array that zarrita reads, and the slices
that napari shows, with the store. Run it with the Python of semgen. FOLDER is where
`npm install zarrita @zarrita/storage` was run; napari is in an environment of its own
(`pip install "napari[pyqt6]" dask zarr`). Its window needs a display with OpenGL; without one, put
`xvfb-run` in front of the command.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path

from store import PatchStore
from store.format import SHARDED
from store.group import digest_values
from store.sharded import ShardedReader

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "readers.md"
SHOWN = """
import numpy as np
import zarr

patch = zarr.open_array("chest.store/train/patch", mode="r")
(layer,) = viewer.layers
for row in (0, patch.shape[0] - 1):
    viewer.dims.set_point(0, row)
    row, z, *_ = viewer.dims.current_step
    assert (layer._slice.image.view == patch[row, z]).all()
    assert len(np.unique(viewer.screenshot(flash=False))) > 2
print("napari", napari.__version__, "shows", layer.data)
viewer.close()
"""


def main() -> None:
    """Check both readers; raises on the first difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("--modules", type=Path, required=True)
    parser.add_argument("--napari", type=Path, required=True)
    options = parser.parse_args()
    javascript, napari = (
        re.findall(rf"```{language}\n(.*?)```", PAGE.read_text("utf-8"), re.S)[0]
        for language in ("js", "py")
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "chest.store").symlink_to(options.store.resolve())
        (folder / "node_modules").symlink_to((options.modules / "node_modules").resolve())
        (folder / "example.mjs").write_text(javascript)
        (folder / "every.mjs").write_text((HERE / "zarrita.mjs").read_text())
        print(_run(folder, "node", "example.mjs"), end="")
        _compare(PatchStore(options.store), folder)
        script = napari.replace("napari.run()", SHOWN)
        print(_run(folder, str(options.napari.absolute()), "-c", script), end="")


def _compare(store: PatchStore, folder: Path) -> None:
    """Shape, names of dimensions and values of every array, as zarrita reads them."""
    dimensions = {name: table.dimensions for name, table in store.tables.items()} | SHARDED
    lines = _run(folder, "node", "every.mjs", "chest.store", *dimensions).splitlines()
    for name, line in zip(dimensions, lines, strict=True):
        values = (
            ShardedReader(store.path, name).read(slice(None))
            if name in SHARDED
            else store.group[name][...]
        )
        assert json.loads(line) == {
            "name": name,
            "shape": list(values.shape),
            "dimensions": list(dimensions[name]),
            "digest": digest_values(values),
        }
    print(f"zarrita read the same values of {len(lines)} arrays")


def _run(folder: Path, *command: str) -> str:
    return subprocess.run(command, cwd=folder, check=True, text=True, stdout=subprocess.PIPE).stdout


if __name__ == "__main__":
    main()
