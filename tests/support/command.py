"""The command line in a process of its own, and where the checkout is."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

ROOT = Path(__file__).parents[2]
Semgen: TypeAlias = Callable[..., subprocess.CompletedProcess[str]]


def run_semgen(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run it to its end; `cwd` is not the checkout unless given."""
    return subprocess.run(
        [sys.executable, "-m", "cli", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
