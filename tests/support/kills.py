r"""Kill an evaluation at random moments, finish it, and compare it with a run left alone.

    python tests/support/kills.py --kills 50

Runs are forked from one process that has loaded everything, so that a kill costs seconds. The
findings are the last line printed, as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sqlite3
import tempfile
import time
from pathlib import Path

import numpy as np
import tiny

SIZE = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 32}
ARRAYS = ("normalized_miscoupling", "singular_values", "certificate", "norms", "entropy")


def save_task(folder: Path, documents: int) -> None:
    """So many short questions of two choices, no two alike."""
    folder.mkdir(parents=True)
    rows = [
        {"text": f"Is {i} times {7 * i} even?", "choices": [" yes", " no"], "gold": i % 2}
        for i in range(documents)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = json.dumps(
        {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "cache")}
    )
    (folder / "kills.yaml").write_text(
        f"task: kills\ndataset_path: json\ndataset_kwargs: {source}\ntest_split: test\n"
        'output_type: multiple_choice\ndoc_to_text: "{{text}}"\ndoc_to_choice: "{{choices}}"\n'
        "doc_to_target: gold\nmetric_list:\n  - metric: acc\n"
    )


def evaluate(home: Path, out: Path, store: Path) -> None:
    """As lm-eval's command would, in this process."""
    from lm_eval_coupling.harness import plugin

    plugin.install()
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    arguments = {
        "coupling_ranks": "2+4",
        "coupling_limit": "all",
        "coupling_dtype": "float64",
        "coupling_store": str(store),
    }
    tracker = EvaluationTracker(output_path=str(out))
    found = simple_evaluate(
        model="coupling-hf",
        model_args={"pretrained": str(home / "model"), **arguments},
        tasks=["kills"],
        device="cpu",
        batch_size=64,
        bootstrap_iters=0,
        evaluation_tracker=tracker,
        task_manager=TaskManager(include_path=str(home), include_defaults=False),
    )
    tracker.save_results_aggregated(results=found, samples=found.pop("samples"))


def forked(*arguments: Path) -> int:
    """The evaluation in a process of its own; its number."""
    child = os.fork()
    if child:
        return child
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        evaluate(*arguments)
        os._exit(0)
    except BaseException:
        os._exit(1)


def stored(store: Path) -> dict[str, tuple[int, str]]:
    """Return row and time of writing of every entry; an entry written again has another row."""
    if not store.exists():
        return {}
    with sqlite3.connect(store, timeout=60) as db:
        try:
            return {
                key: (row, at)
                for key, row, at in db.execute("SELECT key, rowid, created FROM measurements")
            }
        except sqlite3.OperationalError:  # killed before the tables were made
            return {}


def killed_at_random(
    home: Path, out: Path, store: Path, chance: random.Random, further: int
) -> bool:
    """Kill a run once it has stored 1 to ``further`` entries; return False if it ended before."""
    enough, child = len(stored(store)) + chance.randint(1, further), forked(home, out, store)
    while len(stored(store)) < enough and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.02)
    time.sleep(chance.uniform(0, 0.1))
    try:
        os.kill(child, signal.SIGKILL)
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    except (ProcessLookupError, ChildProcessError):
        return False


def compare(folder: Path, kills: int, documents: int, seed: int = 0) -> dict[str, float | int]:
    """Kill, finish, and compare; what was found, or an AssertionError."""
    from lm_eval_coupling import load_records

    home, store, chance = folder / "home", folder / "killed.sqlite", random.Random(seed)
    save_task(home, documents)
    tiny.save_model(home / "model", **SIZE)
    started, done, moments = time.perf_counter(), 0, []
    evaluate(home, folder / "alone", folder / "alone.sqlite")
    seen: dict[str, tuple[int, str]] = {}
    while done < kills:
        further = max(1, documents // kills)
        assert killed_at_random(home, folder / "killed", store, chance, further), (
            f"it ended after {done} kills; use more documents"
        )
        found = stored(store)
        assert all(found[key] == entry for key, entry in seen.items()), (
            "a measurement was lost or made again"
        )
        seen, done = found, done + 1
        moments.append(len(found))
    assert not [*(folder / "killed").rglob("*.parquet")]
    child = forked(home, folder / "killed", store)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    last = stored(store)
    assert all(last[key] == entry for key, entry in seen.items()), "a measurement was made again"
    assert set(last) == set(stored(folder / "alone.sqlite")), (
        "other measurements than those of a run left alone"
    )
    with sqlite3.connect(store) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    alone, killed = (
        load_records(folder / name).set_index("doc_hash").sort_index()
        for name in ("alone", "killed")
    )
    assert list(alone.index) == list(killed.index) and len(alone) == documents
    worst = max(
        float(np.abs(a - b).max())
        for name in ARRAYS
        for a, b in zip(alone[name], killed[name], strict=True)
        if a is not None
    )
    assert worst < 1e-5, f"numbers differ by {worst}"
    return {
        "kills": done,
        "documents": documents,
        "entries": len(last),
        "found_by_the_last_run": moments[-1],
        "kills_that_found_progress": len(set(moments)),
        "worst_difference": worst,
        "seconds": round(time.perf_counter() - started, 1),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--documents", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)  # before anything is forked
    with tempfile.TemporaryDirectory() as temporary:
        findings = compare(Path(temporary), options.kills, options.documents, options.seed)
    print(json.dumps(findings))
