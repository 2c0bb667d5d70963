"""The main job on a real model: scores as with `hf`, coupling against chance and an untrained twin,
kill, two processes.

    python tests/benchmarks/main_job.py --model DIR --data FOLDER \\
        --out tests/benchmarks/results/main_job_NAME.json

FOLDER is the working directory of lm-eval: where its tasks find their data when the hub is out of
reach.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import lm_eval_coupling
from lm_eval_coupling.measures.formulas.headline import chance_level
from lm_eval_coupling.residual import ResidualModel

RANK = 10


def lm_eval(
    options, model: str, tasks: str, limit: int, out: Path, store: Path | None = None, launcher=()
) -> list[str]:
    """The command of one evaluation."""
    arguments = f"pretrained={options.model}"
    if model == "coupling-hf":
        arguments += f",coupling_limit=all,coupling_store={store}"
    command = [
        sys.executable,
        *launcher,
        "-m",
        "lm_eval",
        "--model",
        model,
        "--model_args",
        arguments,
    ]
    return [
        *command,
        "--tasks",
        tasks,
        "--limit",
        str(limit),
        "--output_path",
        str(out),
        "--batch_size",
        "1",
    ]


def run(command: list[str], options) -> float:
    """Wall time of ``command`` in seconds."""
    start = time.perf_counter()
    subprocess.run(command, check=True, cwd=options.data, capture_output=True)
    return time.perf_counter() - start


def results(out: Path) -> dict:
    (path,) = out.rglob("results_*.json")
    return json.loads(path.read_text())


def scores(out: Path) -> dict:
    """Every metric that is not coupling."""
    found = results(out)["results"]
    return {
        task: {k: v for k, v in row.items() if not k.startswith("coupling")}
        for task, row in found.items()
    }


def documents(records):
    """Coupling of each document: mean over its prompts."""
    return records.groupby(["task", "doc_hash"])["coupling"].mean()


def main_job(options, work: Path) -> dict:
    seconds = {
        "hf": run(lm_eval(options, "hf", options.tasks, options.limit, work / "hf"), options),
        "coupling-hf": run(
            lm_eval(
                options,
                "coupling-hf",
                options.tasks,
                options.limit,
                work / "c",
                options.store or work / "c.sqlite",
            ),
            options,
        ),
    }
    records = lm_eval_coupling.load_records(work / "c")
    index = list(records["ranks"].iloc[0]).index(RANK)
    records["coupling"] = [
        coupling_of(np.stack([np.stack(row) for row in m[index]]))
        for m in records.normalized_miscoupling
    ]
    trained, untrained = (
        documents(records),
        documents(records.assign(coupling=untrained_couplings(options, records))),
    )
    info = results(work / "c")["config"]["coupling"]
    chance = 1 - chance_level(RANK)
    return {
        "seconds": seconds,
        "scores_equal_to_hf": scores(work / "hf") == scores(work / "c"),
        "scores": scores(work / "c"),
        "documents": len(trained),
        "prompts": len(records),
        "failed": info["failed"],
        "measured_before": info["reused"],
        "methods": sorted({m for methods in records.method for m in methods}),
        "worst_certificate": info["worst_certificate"],
        "chance": chance,
        "trained": mean_and_error(trained),
        "trained_minus_chance": mean_and_error(trained - chance),
        "untrained": mean_and_error(untrained),
        "untrained_minus_chance": mean_and_error(untrained - chance),
        "trained_minus_untrained_paired": mean_and_error(trained - untrained),
        "by_task": {task: mean_and_error(group) for task, group in trained.groupby(level=0)},
    }


def coupling_of(m: np.ndarray) -> float:
    return float(1 - m[~np.eye(len(m), dtype=bool)].mean())


def untrained_couplings(options, records) -> list[float]:
    """The same prompts through the same architecture with fresh weights."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(options.model), dtype=torch.float32
    ).eval()
    prompts = [list(map(int, tokens)) for tokens in records.tokens]
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    wrapped = ResidualModel.wrap(model)
    measured = lm_eval_coupling.measure_coupling(
        wrapped, list(map(list, distinct)), ranks=(RANK,), measures=("depth",)
    )
    value = {tokens: m.coupling(RANK) for tokens, m in zip(distinct, measured, strict=True)}
    return [value[tuple(tokens)] for tokens in prompts]


def mean_and_error(values) -> dict:
    values = np.asarray(values, dtype=float)
    error = values.std(ddof=1) / np.sqrt(len(values))
    return {"mean": values.mean(), "stderr": error, "in_stderr": values.mean() / error}


def stored(store: Path) -> dict[str, float]:
    """Key and time of writing of every measurement."""
    if not store.exists():
        return {}
    with sqlite3.connect(f"file:{store}?mode=ro", uri=True) as db:
        try:
            return dict(db.execute("SELECT key, created FROM measurements"))
        except sqlite3.OperationalError:
            return {}


def killed_and_resumed(options, work: Path) -> dict:
    """kill -9 in the middle of measuring; the same command then finishes, and what was stored is
    not written again.
    """
    store, command = work / "k.sqlite", None
    command = lm_eval(options, "coupling-hf", "arc_easy", 8, work / "k", store)
    process = subprocess.Popen(
        command,
        cwd=options.data,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while len(stored(store)) < 3 and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = stored(store)
    run(command, options)
    after, info = stored(store), results(work / "k")["config"]["coupling"]
    return {
        "stored_at_kill": len(before),
        "stored_at_end": len(after),
        "reused_by_second_run": info["reused"],
        "measured": info["measured"],
        "untouched": all(after[key] == written for key, written in before.items()),
    }


def two_processes(options, work: Path) -> dict:
    """The same records from one process and from two."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    run(lm_eval(options, "coupling-hf", "arc_easy", 8, work / "one", work / "one.sqlite"), options)
    run(
        lm_eval(options, "coupling-hf", "arc_easy", 8, work / "two", work / "two.sqlite", launcher),
        options,
    )
    one, two = (
        lm_eval_coupling.load_records(work / name).set_index("doc_hash").sort_index()
        for name in ("one", "two")
    )

    def values(records, column):
        return np.array(
            [np.concatenate([np.ravel(x) for x in flatten(m)]) for m in records[column]]
        )

    def flatten(nested):
        return (
            [nested]
            if np.ndim(nested[0]) == 0
            else [leaf for item in nested for leaf in flatten(item)]
        )

    return {
        "documents": len(two),
        "same_documents": list(one.index) == list(two.index),
        "same_scores": scores(work / "one") == scores(work / "two"),
        "largest_difference": {
            column: float(np.nanmax(np.abs(values(one, column) - values(two, column))))
            for column in ("normalized_miscoupling", "singular_values")
        },
        "stored": len(stored(work / "two.sqlite")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="transformers folder")
    parser.add_argument("--data", type=Path, required=True, help="working directory of lm-eval")
    parser.add_argument(
        "--tasks", default="arc_easy,hellaswag,winogrande,truthfulqa_mc2,gsm8k_cot_zeroshot"
    )
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--store", type=Path, help="measurements to go on from, and to keep")
    parser.add_argument(
        "--only-main", action="store_true", help="leave out the kill and the two processes"
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    options = parser.parse_args()
    options.model = options.model.resolve()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        found = {
            "model": options.model.name,
            "tasks": options.tasks,
            "limit": options.limit,
            "machine": {
                "processor": processor(),
                "cores": os.cpu_count(),
                "torch": torch.__version__,
            },
            "main_job": main_job(options, work),
        }
        if not options.only_main:
            found["killed_and_resumed"] = killed_and_resumed(options, work)
            found["two_processes"] = two_processes(options, work)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()
