"""Make the pictures of README and docs from a store of public scans: `make figures`.

python -m scripts.figures STORE [--out docs/images] [--label N] [--only NAME]

STORE needs its private catalogue, because crops are cut again from the archive. The pictures show
parts of its scans: name their sources in docs/images/sources.md.
"""

import argparse
from pathlib import Path

from scripts.figures.drawings import draw_neighbours, draw_perturbations, draw_placing
from scripts.figures.wall import photograph_wall
from store import PatchStore

FIGURES = {
    "neighbours": draw_neighbours,
    "placing": draw_placing,
    "perturbations": draw_perturbations,
    "wall": photograph_wall,
}


def main() -> None:
    """Write one WebP for each figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--label", type=int, help="Class to show. Default: one of many members.")
    parser.add_argument("--only", choices=FIGURES)
    options = parser.parse_args()
    store = PatchStore(options.store)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        if options.only in (None, name):
            picture = draw(store, options.label)
            file = options.out / f"{name}.webp"
            picture.convert("RGB").save(file, "WEBP", quality=82, method=6)
            print(f"{file}: {picture.width} x {picture.height}, {file.stat().st_size // 1024} KiB")


main()
