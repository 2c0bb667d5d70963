"""What a timing was taken on, and where it is written."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lm_eval_coupling.versions import installed_version

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("lm-eval-coupling", "torch", "transformers", "transformer-lens", "lm-eval")


def parser(description: str, benchmark: str) -> argparse.ArgumentParser:
    """Options that every benchmark has."""
    made = argparse.ArgumentParser(description=description.split("\n")[0])
    made.add_argument("--threads", type=int, default=2, help="of torch on the CPU (default 2)")
    made.add_argument("--quick", action="store_true", help="fewer sizes and repeats")
    made.add_argument("--out", type=Path, default=RESULTS / f"{benchmark}.json", help="JSON file")
    return made


def describe(device: str = "cpu", dtype: str | None = None) -> dict[str, Any]:
    """The machine, in what changes a timing. ``load_average`` well above 0 before a run says that
    it was not alone.
    """
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.device(device).type == "cuda" else device,
        "dtype": dtype,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "packages": {name: installed_version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "system": platform.system(),
        "load_average": os.getloadavg()[0],
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def found_by(command: list[str], what: str, **how: Any) -> Any:
    """What a process of its own prints last, as JSON; where it fails, the benchmark ends with what
    it said.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False, **how)
    if done.returncode:
        raise SystemExit(f"{what} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def save(benchmark: str, machine: dict, options: argparse.Namespace, results: Any) -> None:
    """Write one benchmark's JSON to ``options.out``."""
    asked = {
        k: v.name if isinstance(v, Path) else v for k, v in vars(options).items() if k != "out"
    }
    if "model" in asked:
        asked["model"] = Path(asked["model"]).name
    found = {"benchmark": benchmark, "machine": machine, "options": asked, "results": results}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows of one shape as a table; numbers with three digits."""
    table = Table(*rows[0], title=title, title_justify="left")
    for row in rows:
        table.add_row(
            *(
                f"{v:.3g}" if isinstance(v, float) else "" if v is None else str(v)
                for v in row.values()
            )
        )
    Console(width=max(120, Console().width)).print(table)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
