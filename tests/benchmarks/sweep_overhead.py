"""What a sweep costs beside lm-eval's own work: per unit, per sweep, and per answer that is kept.

    python tests/benchmarks/sweep_overhead.py [--units 8] [--seconds 5] [--slurm]

A unit's cost is taken with a stand-in for lm-eval that sleeps for a known time and leaves lm-eval's
files: what the sweep takes beyond the time slept, divided by the units of one worker. Starting the
stand-in's Python is counted as lm-eval's. With ``--slurm`` the same units go through submitit to
the SLURM of this machine. The check of a plan, once a sweep, is that of a real plan (lm-eval's
tasks, a tiny model), the first time and again. Keeping answers is timed on lm-eval's own cache
around a model that answers at once.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine
import yaml
from rich.console import Console

from lm_eval_coupling.sweep import checks, command
from lm_eval_coupling.sweep import plan as plans

TESTS = Path(__file__).parents[1]
sys.path += [str(TESTS / "support"), str(TESTS / "sweep")]


def write(folder: Path, models: list[str], run: dict, **parts) -> plans.Plan:
    content = {
        "models": models,
        "tasks": ["one", "two"],
        "lm_eval": {"batch_size": 1},
        "output": str(folder / "out"),
    }
    file = folder / "plan.yaml"
    file.write_text(yaml.safe_dump(content | {"run": run} | parts))
    return plans.read(file)


def seconds_of_units(units: int, seconds: float, run: dict, workers: int) -> float:
    """Seconds that the sweep takes beyond its units' own, per unit of one worker."""
    from stand_in import STAND_IN

    with tempfile.TemporaryDirectory() as place:
        folder, models = Path(place), []
        for number in range(units):
            model = folder / f"model-{number}"
            model.mkdir()
            (model / "config.json").write_text("{}")
            (model / "behaviour.json").write_text(json.dumps({"seconds": seconds}))
            models.append(str(model))
        plan = write(folder, models, run)
        own = seconds + python_starts()
        before, checks.check = checks.check, lambda plan, **options: {}
        start = time.perf_counter()
        try:
            code = command.sweep(
                plan.file, command=STAND_IN, console=Console(file=open(os.devnull, "w"))
            )
        finally:
            checks.check = before
        taken = time.perf_counter() - start
        if code:
            raise SystemExit(f"got exit code {code}, expected every unit to be done")
        return taken / (units / workers) - own


def python_starts(repeats: int = 5) -> float:
    """Seconds that a Python with PyYAML takes to start: the stand-in's own."""

    def once() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import yaml"], check=True)
        return time.perf_counter() - start

    return statistics.median(once() for _ in range(repeats))


def seconds_of_check() -> tuple[float, float]:
    import tiny

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = tiny.save_model(folder / "model")
        run = {"environment": {"HF_HUB_OFFLINE": "1"}}
        plan = write(folder, [model], run, tasks=["arc_easy"], coupling={"ranks": "2+4"})
        taken = []
        for _ in range(2):
            start = time.perf_counter()
            checks.check(plan)
            taken.append(time.perf_counter() - start)
        return taken[0], taken[1]


def seconds_of_an_answer(requests: int = 2000) -> float:
    """What lm-eval's cache adds to a request."""
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM, CachingLM

    class Answers(LM):
        def loglikelihood(self, requests):
            for request in requests:
                self.cache_hook.add_partial("loglikelihood", request.args, (-1.0, False))
            return [(-1.0, False)] * len(requests)

        loglikelihood_rolling = generate_until = loglikelihood

    asked = [
        Instance("loglikelihood", {}, (f"question {n}", " answer"), n) for n in range(requests)
    ]
    with tempfile.TemporaryDirectory() as folder:
        cached = CachingLM(Answers(), f"{folder}/scores.db")
        start = time.perf_counter()
        cached.loglikelihood(asked)
        return (time.perf_counter() - start) / requests


def main(arguments: list[str] | None = None) -> None:
    parser = machine.parser(__doc__, "sweep_overhead")
    parser.add_argument("--units", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=5.0, help="that each of them sleeps")
    parser.add_argument(
        "--slurm", action="store_true", help="also through the SLURM of this machine"
    )
    options = parser.parse_args(arguments)
    about = machine.describe()
    units, seconds = (4, 1.0) if options.quick else (options.units, options.seconds)
    found = {
        "local, one worker": seconds_of_units(units, seconds, {"workers": 1}, 1),
        "local, two workers": seconds_of_units(units, seconds, {"workers": 2}, 2),
    }
    if options.slurm:
        run = {"on": "slurm", "hours": 0.2, "cpus": 1, "at_once": 1}
        found["SLURM, one at a time"] = seconds_of_units(units, seconds, run, 1)
    rows = [
        {"units": name, "s lost a unit": lost, "% of a unit of a minute": 100 * lost / 60}
        for name, lost in found.items()
    ]
    first, again = seconds_of_check()
    once = {"check of a plan, s": first, "the same plan again, s": again}
    once |= {"keeping an answer, ms": 1000 * seconds_of_an_answer()}
    machine.save("sweep_overhead", about, options, {"rows": rows, **once})
    machine.show(f"A sweep beside lm-eval's own work: {units} units of {seconds:g} s", rows)
    machine.show("Once", [once])


if __name__ == "__main__":
    main()
