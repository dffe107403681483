"""Cut random rows of a store again, slowly and independently, and compare.

    python -m benchmarks.recut STORE [ROWS]

Knows docs/store-format.md, plain zarr, and the private catalogue for which file a scan came from;
imports nothing of semgen. Scans are oriented with SimpleITK, crops interpolated with
scipy.ndimage.map_coordinates (order 1). Rows whose grid is coarser than the scan along some axis
were smoothed on purpose; they are counted apart.
"""

import json
import os
import sqlite3
import sys

import numpy as np
import SimpleITK as sitk  # noqa: N813
import zarr
from scipy.ndimage import map_coordinates

path, wanted = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 200
store = zarr.open_group(path, mode="r")
window = store.attrs["semgen"]["config"]["window_hu"]
files = dict(
    sqlite3.connect(f"{path.rstrip('/')}.catalogue/catalogue.sqlite").execute(
        "SELECT scan_row, files FROM series WHERE scan_row IS NOT NULL"
    )
)
rng = np.random.default_rng(0)
splits = [("train", row) for row in range(store["train/label"].shape[0])]
splits += [("validation", row) for row in range(store["validation/label"].shape[0])]
chosen = [splits[i] for i in rng.permutation(len(splits))[:wanted]]
chosen.sort(key=lambda item: int(store[item[0]]["scan"][item[1]]))
volumes: dict[int, tuple[np.ndarray, np.ndarray]] = {}
exact, smoothed = [], []
for split, row in chosen:
    scan = int(store[split]["scan"][row])
    if scan not in volumes:
        names = [os.fsdecode(bytes.fromhex(name)) for name in json.loads(files[scan])]
        image = sitk.DICOMOrient(sitk.ReadImage(names if len(names) > 1 else names[0]), "LPS")
        hu = sitk.GetArrayFromImage(image).astype(np.float64)
        hu[hu <= -2000] = -1000
        volumes = {scan: (hu, np.array(image.GetSpacing()[::-1]))}
    hu, spacing = volumes[scan]
    crop = store[split]["patch"][row]
    origin, extent = store[split]["origin_mm"][row], store[split]["extent_mm"][row]
    step = extent / crop.shape
    axes = [(origin[a] + (np.arange(crop.shape[a]) + 0.5) * step[a]) / spacing[a] for a in range(3)]
    assert all(a[0] >= -1e-6 and a[-1] <= n - 1 + 1e-6 for a, n in zip(axes, hu.shape)), "padded"
    again = map_coordinates(hu, np.meshgrid(*axes, indexing="ij"), order=1, mode="nearest")
    again = np.clip(np.rint(again), *window)
    worst = float(np.abs(again - crop).max())
    (smoothed if (step > spacing * (1 + 1e-9)).any() else exact).append(worst)
print(f"{len(exact)} rows without smoothing: largest difference {max(exact, default=0):.0f} HU")
print(
    f"{len(smoothed)} smoothed rows: median of their largest differences"
    f" {np.median(smoothed or [0]):.0f} HU"
)
sys.exit(int(max(exact, default=0) > 2))
