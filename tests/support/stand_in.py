"""Stand-in for lm-eval that leaves the same files and fails as the model's folder says.

``behaviour.json`` lies beside the model's files: ``fail`` (a text to end with), ``most`` (documents
of a batch that fit into memory), ``seconds`` (to take), ``leave_out`` (files not to write),
``coupling`` (changes of its summary), ``say`` (names of variables whose values to print).
"""

import base64
import datetime
import json
import os
import sys
import time
from pathlib import Path

import yaml

STAND_IN = (sys.executable, str(Path(__file__)))
TABLE = base64.b64decode(  # a Parquet file of one row
    "UEFSMRUAFRQVFCwVAhUAFQYVBhwAAAACAAAAAgEBAAAAFQQZLDUAGAZzY2hlbWEVAgAVAiUCGAF4JR5MrBMIEQAAABYC"
    "GRwZHCYAHBUCGSUGABkYAXgVABYCFjoWOiYISRwVABUAFQIAPCkGGSYAAgAAABY6FgImCBY6ACggcGFycXVldC1jcHAt"
    "YXJyb3cgdmVyc2lvbiAyNi4wLjEZHBwAAACDAAAAUEFSMQ=="
)


def calls(model):
    """What the stand-in was called with for a model, call by call."""
    file = Path(model) / "calls.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def wait_for(condition, seconds=20):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.05)


def main(words):
    asked = yaml.safe_load(Path(words[words.index("--config") + 1]).read_text())
    model = Path(asked["model_args"]["pretrained"])
    behaviour = (
        json.loads((model / "behaviour.json").read_text())
        if (model / "behaviour.json").exists()
        else {}
    )
    with (model / "calls.jsonl").open("a") as calls:
        told = {
            "batch_size": asked["batch_size"],
            "tasks": asked["tasks"],
            "threads": os.environ.get("OMP_NUM_THREADS"),
        }
        calls.write(
            json.dumps(
                told | {"device": os.environ.get("CUDA_VISIBLE_DEVICES"), "pid": os.getpid()}
            )
            + "\n"
        )
    for name in behaviour.get("say", []):
        print(f"{name} is {os.environ.get(name)}", flush=True)
    print("Measuring coupling:  40%|####      | 4/10 [00:01<00:01]", flush=True)
    if use_cache := asked.get("use_cache"):
        Path(f"{use_cache}_rank0.db").write_text("answers")
    if asked["batch_size"] > behaviour.get("most", 10**9):
        raise SystemExit("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB")
    time.sleep(behaviour.get("seconds", 0))
    if "fail" in behaviour:
        raise SystemExit(behaviour["fail"])
    date = datetime.datetime.now().isoformat().replace(":", "-")
    folder = Path(asked["output_path"]) / str(model).replace("/", "__")
    folder.mkdir(parents=True, exist_ok=True)
    measured = {task: {"measured": 4, "failed": 0} for task in asked["tasks"]}
    coupling = {
        "fingerprint": f"of {model.name}",
        "measured": 4 * len(measured),
        "failed": 0,
        "tasks": measured,
    }
    found = {
        "configs": {task: {"metadata": asked["metadata"]} for task in asked["tasks"]},
        "results": {task: {"acc,none": 0.5} for task in asked["tasks"]},
        "n-samples": {task: {"original": 6, "effective": 6} for task in asked["tasks"]},
        "config": {"coupling": coupling | behaviour.get("coupling", {})},
        "total_evaluation_time_seconds": "1.5",
    }
    files = {f"results_{date}.json": json.dumps(found)}
    for task in asked["tasks"]:
        files[f"coupling_{task}_{date}.parquet"] = TABLE
        files[f"samples_{task}_{date}.jsonl"] = "{}\n" * 6
    for name, content in files.items():
        if not any(name.startswith(start) for start in behaviour.get("leave_out", [])):
            content = content if isinstance(content, bytes) else content.encode()
            (folder / name).write_bytes(content)


if __name__ == "__main__":
    main(sys.argv)
