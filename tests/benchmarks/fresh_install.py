"""The wheel alone in a new environment: seconds from a finished installation to the demo's picture.

    python tests/benchmarks/fresh_install.py --wheel dist/*.whl --torch torch==2.13.0

The cache is empty, so the time includes the download of the model. A second run finds the model and
its measurements.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine

# Variables that would let the environment see this checkout or its caches.
HIDDEN = ("PYTHONPATH", "VIRTUAL_ENV", "LM_EVAL_COUPLING_NO_HOOK", "HF_HOME", "OMP_NUM_THREADS")


def main(arguments: list[str] | None = None) -> None:
    made = machine.parser(__doc__, "fresh_install")
    made.add_argument("--wheel", type=Path, required=True, help="the wheel to install")
    made.add_argument("--torch", default="torch", help="what pip installs first")
    options = made.parse_args(arguments)
    about = machine.describe()
    with tempfile.TemporaryDirectory() as folder:
        results = fresh(options, Path(folder))
    about["packages"] = results.pop("packages")
    machine.save("fresh_install", about, options, results)
    machine.show("Seconds in a new environment", [results])


def fresh(options: Any, folder: Path) -> dict[str, Any]:
    """Install into a new environment below ``folder``, and run the demo there twice."""
    python = folder / "env" / "bin" / "python"
    environment = {k: v for k, v in os.environ.items() if k not in HIDDEN}
    environment |= {
        "XDG_CACHE_HOME": str(folder / "cache"),
        "OMP_NUM_THREADS": str(options.threads),
    }

    def run(*command: Any) -> str:
        done = subprocess.run(
            list(map(str, command)),
            env=environment,
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{command} failed:\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
        return done.stdout

    start = time.perf_counter()
    run(sys.executable, "-m", "venv", folder / "env")
    run(python, "-m", "pip", "install", "--quiet", *options.torch.split())
    run(python, "-m", "pip", "install", "--quiet", options.wheel.resolve())
    results: dict[str, Any] = {"install": time.perf_counter() - start}
    for name in ("to the picture", "again"):
        begun = time.time()
        run(python.parent / "lm-eval-coupling", "demo", "--out", folder / "out")
        # Measurements are kept below the cache; a second run draws anew.
        results[name] = (folder / "out" / "coupling_demo.png").stat().st_mtime - begun
    listed = json.loads(run(python, "-m", "pip", "list", "--format", "json"))
    versions = {package["name"]: package["version"] for package in listed}
    results["packages"] = {name: versions.get(name) for name in machine.PACKAGES}
    return results


if __name__ == "__main__":
    main()
