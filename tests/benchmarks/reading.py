"""Seconds and memory of the commands that read, on many runs of a deep model.

    python tests/benchmarks/reading.py [--runs 100] [--documents 1000] [--layers 80]

Each command runs in a process of its own. The records are random numbers of the shapes of a real
run with three ranks. Runs of a collection have a table each, copies of one that is small enough
for the disk: a link would be passed over as the same run again. One run beside them has all
documents. Wall time includes the start of Python; ``peak`` is the largest resident memory and
``table_mib`` the tables that the command looks at, in MiB.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from saved_runs import DATE, record, results, save, task_summary

RANKS = (10, 30, 50)
_MEASURED = """
import pathlib, resource, runpy, sys
sys.argv = ["lm-eval-coupling", *sys.argv[1:]]
try:
    runpy.run_module("lm_eval_coupling.cli", run_name="__main__")
finally:
    used = resource.getrusage(resource.RUSAGE_SELF)
    # Not getrusage: it starts from the size of the process that forked this one.
    status = pathlib.Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    peak = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    print(used.ru_utime + used.ru_stime, (peak or [used.ru_maxrss])[0] / 1024, file=sys.stderr)
"""


def write(folder: Path, runs: int, documents: int, layers: int) -> float:
    """Save the runs and return the size of their tables in MiB."""
    rows = [record(doc_id=i, ranks=RANKS, layers=layers) for i in range(documents)]
    first = save(folder, {"arc": task_summary()}, model="model-0", rows=rows, run_id="run-0")
    (table,) = first.glob("*.parquet")
    for number in range(1, runs):
        where = folder / f"model-{number}"
        where.mkdir()
        run = results(
            {"arc": task_summary(0.2 + number / 1000)},
            f"model-{number}",
            run_id=None,
            fingerprint=f"{number:064x}",
        )
        (where / f"results_{DATE}.json").write_text(json.dumps(run))
        shutil.copyfile(table, where / table.name)
    return runs * table.stat().st_size / 2**20


def command(*words: str) -> dict[str, float]:
    """Return wall seconds, CPU seconds and peak memory of one command."""
    started = time.perf_counter()
    ran = subprocess.run(
        [sys.executable, "-c", _MEASURED, *words], capture_output=True, text=True, check=True
    )
    seconds = time.perf_counter() - started
    cpu_seconds, peak = map(float, ran.stderr.strip().splitlines()[-1].split())
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak": peak}


def main() -> None:
    """Write the runs, read them with every command, save and print what it took."""
    parser = machine.parser(__doc__, "reading")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--documents", type=int, default=1000, help="of the run read alone")
    parser.add_argument("--documents-each", type=int, default=20, help="of a run among many")
    parser.add_argument("--layers", type=int, default=80)
    options = parser.parse_args()
    about = machine.describe()
    with tempfile.TemporaryDirectory() as scratch:
        many, single = Path(scratch) / "many", Path(scratch) / "single"
        sizes = {
            many: write(many, options.runs, options.documents_each, options.layers),
            single: write(single, 1, options.documents, options.layers),
        }
        last = str(options.documents - 1)
        page = str(Path(scratch) / "report.html")
        commands = {
            "show": ("show", many),
            "show --json": ("show", many, "--json"),
            "report": ("report", many, "-o", page),
            "show --doc": ("show", single, "--task", "arc", "--doc", last),
            "report of one run": ("report", single, "-o", page),
        }
        rows = [
            {"command": name} | command(*map(str, words)) | {"table_mib": sizes[words[1]]}
            for name, words in commands.items()
        ]
    machine.save("reading", about, options, rows)
    machine.show(
        f"{options.runs} runs of {options.documents_each} documents, one of {options.documents}, "
        f"{options.layers} layers",
        rows,
    )


if __name__ == "__main__":
    main()
