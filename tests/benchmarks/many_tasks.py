"""Seconds and memory of ``show --csv`` and ``report`` on one run of very many tasks.

    python tests/benchmarks/many_tasks.py [--tasks 500 1000 5000] [--documents 2]

The records are random numbers of the shapes of a real run of 12 layers with three ranks, and every
task has a table of its own. Each command runs in a process of its own (``reading.py``);
``cpu_seconds`` are of all of its threads. ``peak`` is the largest resident memory in MiB.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine
from reading import RANKS, command

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from saved_runs import DATE, coupling_config, record, results, task_summary

from lm_eval_coupling.saved.tables import write_tables

LAYERS = 12


def write(folder: Path, tasks: int, documents: int) -> None:
    """Save one run of so many tasks."""
    where = folder / "org__tiny"
    where.mkdir(parents=True)
    names = [f"task_{number:05d}" for number in range(tasks)]
    summaries = {name: task_summary(0.2 + i / 1e5, n=documents) for i, name in enumerate(names)}
    (where / f"results_{DATE}.json").write_text(json.dumps(results(summaries)))
    about = coupling_config(summaries)
    rows = [record(doc_id=i, ranks=RANKS, layers=LAYERS) for i in range(documents)]
    for name in names:
        own = about | {"tasks": {name: summaries[name]}}
        write_tables([row | {"task": name} for row in rows], where, DATE, own)


def measure(tasks: int, documents: int) -> list[dict[str, Any]]:
    """Read a run of so many tasks with both commands."""
    with tempfile.TemporaryDirectory() as scratch:
        write(Path(scratch) / "runs", tasks, documents)
        commands = {
            "show --csv": ("show", str(Path(scratch) / "runs"), "--csv"),
            "report": ("report", str(Path(scratch) / "runs"), "-o", str(Path(scratch) / "r.html")),
        }
        return [
            {"command": name, "tasks": tasks, "documents": documents} | command(*words)
            for name, words in commands.items()
        ]


def main() -> None:
    """Measure each number of tasks, save and print what it took."""
    parser = machine.parser(__doc__, "many_tasks")
    parser.add_argument("--tasks", type=int, nargs="+", default=[500, 1000, 5000])
    parser.add_argument("--documents", type=int, default=2, help="of each task")
    options = parser.parse_args()
    about = machine.describe()
    rows = [row for tasks in options.tasks for row in measure(tasks, options.documents)]
    machine.save("many_tasks", about, options, rows)
    machine.show(f"One run, {options.documents} documents a task, {LAYERS} layers", rows)


if __name__ == "__main__":
    main()
