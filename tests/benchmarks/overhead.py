"""What a user waits: an lm-eval run with every document measured, over the same run with `--model
hf`.

    python tests/benchmarks/overhead.py --model DIR --data FOLDER [--task hellaswag] [--limit 40]

FOLDER is lm-eval's working directory, where its tasks find their data when the hub is out of reach.
Both runs are whole processes and are made in turn, every measured one with a store of its own,
empty at the start. Starting Python and loading everything takes long beside a few dozen documents,
so each run is also made with a quarter of them: the difference gives the seconds a further document
takes, which is what a long run costs.
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
import torch


def command(options, kind: str, limit: int, out: Path) -> list[str]:
    arguments = f"pretrained={options.model}"
    if kind == "coupling-hf":
        arguments += f",coupling_limit=all,coupling_store={out / 'store.sqlite'}"
        arguments += f",coupling_ranks={options.ranks}"
    made = [
        sys.executable,
        "-m",
        "lm_eval",
        "--model",
        kind,
        "--model_args",
        arguments,
        "--tasks",
        options.task,
    ]
    made += ["--include_path", str(options.include_path)] if options.include_path else []
    return [
        *made,
        "--limit",
        str(limit),
        "--device",
        options.device,
        "--batch_size",
        "1",
        "--output_path",
        str(out),
    ]


def run(options, kind: str, limit: int) -> tuple[float, dict]:
    """Wall seconds of one whole process, and the JSON it left."""
    # Offline, because look-ups at the hub would be timed as well; the command needs the start-up
    # hook.
    settings = {
        "OMP_NUM_THREADS": str(options.threads),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }
    environment = {
        k: v for k, v in os.environ.items() if k != "LM_EVAL_COUPLING_NO_HOOK"
    } | settings
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        start = time.perf_counter()
        done = subprocess.run(
            command(options, kind, limit, out),
            cwd=options.data,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        taken = time.perf_counter() - start
        if done.returncode:
            raise SystemExit(f"{kind} failed:\n{done.stderr[-3000:]}")
        (path,) = out.rglob("results_*.json")
        return taken, json.loads(path.read_text())


def main(arguments: list[str] | None = None) -> None:
    parser = machine.parser(__doc__, "overhead")
    parser.add_argument("--model", type=Path, required=True, help="transformers folder")
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(),
        help="working directory of lm-eval (default the current one)",
    )
    parser.add_argument("--task", default="hellaswag")
    parser.add_argument("--include_path", type=Path, help="folder of tasks of one's own")
    parser.add_argument("--limit", type=int, help="documents; default 40, 12 with --quick")
    parser.add_argument("--ranks", default="10+30+50")
    parser.add_argument("--repeats", type=int, help="default 3; 1 with --quick")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    options.model = options.model.resolve()
    options.include_path = options.include_path and options.include_path.resolve()
    options.limit = options.limit or (12 if options.quick else 40)
    torch.set_num_threads(options.threads)
    about = machine.describe(options.device)
    limits = (max(1, options.limit // 4), options.limit)
    kinds = ("hf", "coupling-hf")
    run(options, "hf", limits[0])  # data are prepared and files read once
    taken: dict[tuple[str, int], list[float]] = {
        (kind, limit): [] for limit in limits for kind in kinds
    }
    for _ in range(options.repeats or (1 if options.quick else 3)):
        for (kind, limit), times in taken.items():
            spent, found = run(options, kind, limit)
            times.append(spent)
            if kind == "coupling-hf":
                info = found["config"]["coupling"]
    if info["failed"] or info["measured"] != options.limit:
        raise SystemExit(
            f"got {info['measured']} documents measured, {info['failed']} failed, expected "
            f"{options.limit} measured"
        )
    middle = {key: statistics.median(times) for key, times in taken.items()}
    rows = [
        {
            "model": kind,
            f"{limits[0]} documents, s": middle[kind, limits[0]],
            f"{limits[1]} documents, s": middle[kind, limits[1]],
            "s per further document": (middle[kind, limits[1]] - middle[kind, limits[0]])
            / (limits[1] - limits[0]),
        }
        for kind in kinds
    ]
    hf, ours = ([value for key, value in row.items() if key != "model"] for row in rows)
    ratio = {"model": "ratio"} | dict(
        zip(list(rows[0])[1:], (b / a for a, b in zip(hf, ours, strict=True)), strict=True)
    )
    results = {
        "documents": limits,
        "rows": rows,
        "ratio_whole_process": ratio[f"{limits[1]} documents, s"],
        "ratio_per_further_document": ratio["s per further document"],
        "all_seconds": {
            f"{kind}, {limit} documents": times for (kind, limit), times in taken.items()
        },
    }
    machine.save("overhead", about, options, results)
    machine.show(
        f"lm-eval on {options.task}, every document measured: {options.model.name}", [*rows, ratio]
    )


if __name__ == "__main__":
    main()
