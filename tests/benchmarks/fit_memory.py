"""Peak memory and seconds of ``fit`` on very many runs of many documents, with their samples.

    python tests/benchmarks/fit_memory.py [--runs 200] [--documents 2000]

The records are random numbers of the shapes of a real run of 12 layers with three ranks, the same
twenty over and over. Every run has a score, a coupling and a size of its own. ``peak`` is the
largest resident memory in MiB.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import machine
import numpy as np
import pyarrow.parquet as pq
from reading import RANKS, command

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from saved_runs import DATE, coupling_config, record, results, sample, task_summary, write_samples

from lm_eval_coupling.saved.checksums import write_with_checksums
from lm_eval_coupling.saved.tables import METADATA_KEY, write_tables

LAYERS, DISTINCT = 12, 20


def write(folder: Path, runs: int, documents: int) -> None:
    """Save the runs."""
    rng = np.random.default_rng(0)
    distinct = [record(doc_id=i, ranks=RANKS, layers=LAYERS) for i in range(DISTINCT)]
    rows = [
        distinct[i % DISTINCT] | {"doc_id": i, "doc_hash": f"{i:064x}", "prompt_hash": f"{i:064x}"}
        for i in range(documents)
    ]
    (written,) = write_tables(rows, folder, DATE, coupling_config({"arc": task_summary()}))
    table = pq.read_table(written)
    written.unlink()
    for number in range(runs):
        where = folder / f"model-{number}"
        where.mkdir()
        summary = {"arc": task_summary(rng.uniform(0.1, 0.4), n=documents)}
        about = {
            "run_id": f"run-{number}",
            "fingerprint": f"{number:064x}",
            "n_params": int(10 ** rng.uniform(8, 10)),
        }
        run = results(summary, f"org/model-{number}b", **about)
        run["results"]["arc"] |= {"acc,none": rng.uniform(0.3, 0.8), "acc_stderr,none": 0.01}
        run["n-samples"]["arc"] = {"original": documents, "effective": documents}
        (where / f"results_{DATE}.json").write_text(json.dumps(run))
        about = run["config"]["coupling"] | {"task": "arc", "date": DATE, "weights": "trained"}
        write_with_checksums(
            table.replace_schema_metadata({METADATA_KEY: json.dumps(about)}), where / written.name
        )
        right = rng.random(documents) < 0.6
        lines = [
            sample(row["doc_hash"], doc_id=i, doc={"question": row["text"]}, acc=float(right[i]))
            for i, row in enumerate(rows)
        ]
        write_samples(where, "arc", lines)


def main() -> None:
    """Write the runs, fit them, save and print what it took."""
    parser = machine.parser(__doc__, "fit_memory")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--documents", type=int, default=2000)
    options = parser.parse_args()
    about = machine.describe()
    with tempfile.TemporaryDirectory() as scratch:
        write(Path(scratch) / "runs", options.runs, options.documents)
        words = ("fit", str(Path(scratch) / "runs"), "--out", str(Path(scratch) / "fit"))
        row = {"runs": options.runs, "documents": options.documents} | command(*words)
    machine.save("fit_memory", about, options, [row])
    machine.show("fit", [row])


if __name__ == "__main__":
    main()
