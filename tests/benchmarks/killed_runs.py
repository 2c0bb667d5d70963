"""Kill an evaluation and a sweep at random moments, finish them, compare with those left alone.

    python tests/benchmarks/killed_runs.py [--kills 15] [--seed 0]

The moment of an evaluation is drawn between the start and the end of one that is left alone. A
sweep, whose seconds depend on what else the machine does, is killed after a drawn number of
measurements and up to half a second. SIGKILL meets the sweep and all processes below it. The killed
run is started again by the same command, and its records and scores are compared with those of the
run left alone. Each row of the JSON is one kill; any difference, lost measurement or exit code ends
the benchmark with an error.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "support"), str(TESTS / "sweep")]
import kills  # noqa: E402
import real  # noqa: E402
import tiny  # noqa: E402

from lm_eval_coupling import load_records, load_runs  # noqa: E402

DOCUMENTS = 120
NAMES = ("tiny-2", "tiny-long")


def compare(killed: Path, alone: Path) -> float:
    """Return the largest difference of two folders' records, whose scores must be equal.

    It is relative to the largest number of an array, if that is above 1.
    """
    tables = [
        load_records(folder).set_index(["model", "task", "doc_hash", "prompt_hash"]).sort_index()
        for folder in (killed, alone)
    ]
    assert list(tables[0].index) == list(tables[1].index), "other prompts than those left alone"
    scores = [
        load_runs(folder).sort_values(["model", "task"])[["model", "task", "acc,none", "measured"]]
        for folder in (killed, alone)
    ]
    assert scores[0].to_numpy().tolist() == scores[1].to_numpy().tolist(), "other scores"
    worst = max(
        float(np.abs(a - b).max() / max(1, np.abs(b).max()))
        for name in tables[1].columns.intersection(kills.ARRAYS)  # sweeps measure depth alone
        for a, b in zip(tables[0][name], tables[1][name], strict=True)
        if a is not None
    )
    assert worst < 1e-5, f"numbers differ by {worst}"
    return worst


def evaluations(folder: Path, number: int, chance: random.Random) -> list[dict[str, Any]]:
    """Kill evaluations that share nothing, each with a store of its own."""
    home = folder / "home"
    kills.save_task(home, DOCUMENTS)
    tiny.save_model(home / "model", **kills.SIZE)
    for warm in ("warm", "alone"):  # the first one fills caches that later ones find
        started = time.perf_counter()
        child = kills.forked(home, folder / warm, folder / f"{warm}.sqlite")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        seconds = time.perf_counter() - started
    rows = []
    for kill in range(number):
        out, store = folder / f"killed-{kill}", folder / f"killed-{kill}.sqlite"
        moment = chance.uniform(0, seconds)
        child = kills.forked(home, out, store)
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        ended = not os.WIFSIGNALED(os.waitpid(child, 0)[1])
        kept, results = kills.stored(store), len([*out.rglob("results_*.json")])
        child = kills.forked(home, out, store)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        last = kills.stored(store)
        assert all(last[key] == entry for key, entry in kept.items()), "measured again"
        assert set(last) == set(kills.stored(folder / "alone.sqlite")), "other measurements"
        rows.append(
            {
                "what": "evaluation",
                "moment": round(moment / seconds, 3),
                "had_ended": ended,
                "kept": len(kept),
                "of": len(last),
                "results_written": results,
            }
        )
    # Not before: reading starts threads, whose locks a process that is forked later may wait for.
    for kill, row in enumerate(rows):
        row["worst_difference"] = compare(folder / f"killed-{kill}", folder / "alone")
        print(row, flush=True)
    return rows


def sweeps(folder: Path, number: int, chance: random.Random) -> list[dict[str, Any]]:
    """Kill sweeps of two models and two tasks, with all of their processes."""
    folder.mkdir()
    real.models_and_tasks(folder)
    run = {"on": "local", "workers": 1}
    alone = real.write_plan(folder, folder / "alone", NAMES, run, {"dtype": "float64"})
    assert real.finish(real.start(alone)) == 0
    of = measured(alone)
    rows = []
    for kill in range(number):
        run = {"on": "local", "workers": 1 + kill % 2}
        plan = real.write_plan(folder, folder / f"killed-{kill}", NAMES, run, {"dtype": "float64"})
        head = real.start(plan)
        kill_after(head, plan, chance.randrange(of), chance.uniform(0, 0.5))
        kept, results = measured(plan), len([*plan.output.rglob("results_*.json")])
        assert real.finish(real.start(plan)) == 0
        rows.append(
            {
                "what": "sweep",
                "moment": round(kept / of, 3),
                "had_ended": head.returncode != -signal.SIGKILL,
                "kept": kept,
                "of": measured(plan),
                "results_written": results,
                "worst_difference": compare(plan.output, alone.output),
            }
        )
        print(rows[-1], flush=True)
    return rows


def measured(plan: Any) -> int:
    """Return how many measurements a sweep has stored."""
    return sum(real.measured(plan, unit) for unit in plan.units)


def kill_after(head: subprocess.Popen, plan: Any, enough: int, seconds: float) -> None:
    """Kill a sweep and all processes below it some time after so many measurements."""
    while head.poll() is None and measured(plan) < enough:
        time.sleep(0.02)
    time.sleep(seconds)
    for process in [head.pid, *below(head.pid)]:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.kill(process, signal.SIGKILL)
    head.communicate()


def below(process: int) -> list[int]:
    """Return the processes that a process has started, and those that they have."""
    parents: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name before the last bracket may hold anything.
            parent = int(status.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
        parents.setdefault(parent, []).append(int(status.parent.name))
    processes, waiting = [], [process]
    while waiting:
        children = parents.get(waiting.pop(), [])
        processes += children
        waiting += children
    return processes


def main(arguments: list[str] | None = None) -> None:
    """Kill, finish, compare and save what was seen."""
    parser = machine.parser(__doc__, "killed_runs")
    parser.add_argument("--kills", type=int, default=15, help="of evaluations, and of sweeps")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # before anything is forked
    number = 1 if options.quick else options.kills
    about, chance = machine.describe(), random.Random(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        rows = evaluations(Path(temporary) / "evaluations", number, chance)
        rows += sweeps(Path(temporary) / "sweeps", number, chance)
    machine.save("killed_runs", about, options, rows)
    machine.show(f"{number} kills of evaluations and of sweeps, seed {options.seed}", rows)


if __name__ == "__main__":
    main()
