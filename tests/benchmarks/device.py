"""The parts of device.sh, each guarded: what one of them finds is written and printed before the
next begins.

    python tests/benchmarks/device.py --out FOLDER [--device cuda] \\
        [--parts spectra tf32 …] [--model DIR] [--quick]

Models have random weights, the same every time: the shape of SmolLM2-135M (30 × 576, or the folder
given) and of Llama-3-8B (32 × 4096, bf16). Seconds are those of a prompt, the smaller of two after
a warm-up, synchronised. ``--quick`` shrinks every size, to try the script where there is no device.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import device_models
import device_numerics
import machine
import psutil
import torch

PARTS: dict[
    str, tuple[Callable[..., Any], float]
] = {  # with the share of a process's seconds that each may take at most
    "spectra": (device_numerics.spectra, 0.3),
    "tf32": (device_numerics.tf32, 0.2),
    "exactness": (device_numerics.exactness, 0.97),
    "small": (device_models.small, 0.45),
    "memory": (device_models.memory, 0.2),
    "profile": (device_models.profile, 0.3),
    "large": (device_models.large, 0.95),
    "release": (device_models.against_release, 0.6),
    "overhead": (device_models.overhead, 0.6),
}


class _TooLong(BaseException):
    """No Exception, which a measurement would take for its own failure and go on with halves."""


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise inside once so many seconds have passed."""

    def ring(*_):
        raise _TooLong(f"took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Report:
    """What a part has found so far: kept in its file and printed row by row, so that nothing is
    lost with its end.
    """

    def __init__(self, folder: Path, part: str, about: dict[str, Any]) -> None:
        self.file, self.rows, self.start = folder / f"{part}.json", [], time.perf_counter()
        self.found = {"part": part, "machine": about, "rows": self.rows}

    def add(self, **row: Any) -> None:
        """One more row."""
        self.rows.append(row)
        words = (
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
            for k, v in row.items()
            if not _long(v)
        )
        print(f"{time.perf_counter() - self.start:6.1f} s", ", ".join(words), flush=True)
        self.save()

    def save(self, **more: Any) -> None:
        """Write what there is."""
        self.found |= more
        self.file.write_text(json.dumps(self.found, indent=1, default=str) + "\n")


def _long(value: Any) -> bool:
    return isinstance(value, (dict, list)) and len(str(value)) > 160


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--model",
        default="",
        help="transformers folder of a small Llama, in place of random weights",
    )
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "device")
    parser.add_argument("--seconds", type=float, default=600, help="that this process may take")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print(
            f"got --device {options.device} where torch sees no GPU, expected one; --device cpu "
            "--quick is a trial"
        )
        return 2
    if torch.device(options.device).index is not None:
        torch.cuda.set_device(options.device)  # whose time and memory are looked at
    options.out.mkdir(parents=True, exist_ok=True)
    end = psutil.Process().create_time() + options.seconds - 6  # the imports count as well
    failed = 0
    for part in options.parts:
        function, share = PARTS[part]
        report = Report(options.out, part, machine.describe(options.device))
        print(f"-- {part}", flush=True)
        start = time.perf_counter()
        try:
            with at_most(max(1.0, min(share * options.seconds, end - time.time()))):
                function(report, options)
            report.save(seconds=time.perf_counter() - start)
        except (Exception, _TooLong, SystemExit) as error:
            failed = 1
            report.save(
                seconds=time.perf_counter() - start, failed=f"{type(error).__name__}: {error}"[:500]
            )
            print(f"FAILED {part}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            traceback.print_exc(limit=-4)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return failed


if __name__ == "__main__":
    sys.exit(main())
