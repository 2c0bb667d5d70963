"""Saved runs as lm-eval 0.4.13 and the package leave them, made of random numbers."""

import json

import numpy as np
import reference

from lm_eval_coupling.measures.registry import record_columns
from lm_eval_coupling.saved import tables as records

SETTINGS = {
    "ranks": [10, 30],
    "limit": 100,
    "seed": 0,
    "measures": ["depth", "regularity"],
    "position": -1,
}
SETTINGS |= {"dtype": "float32", "method": "auto", "depth_version": 1}
CHANCE = {k: reference.expected_miscoupling(k) for k in (10, 30)}  # m̃ of unrelated layers
CODES = {"out of memory": "out_of_memory", "too short": "too_short"}
DATE = "2025-06-01T12-00-00.123456"
PAIRS = (
    "normalized_miscoupling",
    "miscoupling",
    "miscoupling_to",
    "miscoupling_to_absolute",
    "miscoupling_to_trace",
)
PAIRS += ("miscoupling_to_vju", "miscoupling_to_absolute_vju")


def record(
    task="arc",
    doc_id=0,
    prompt_index=0,
    ranks=(10, 30),
    layers=4,
    reason=None,
    seed=0,
    over_tokens=False,
):
    """Make one record; with a ``reason``, of a prompt that could not be measured."""
    generator = np.random.default_rng([seed, doc_id, prompt_index])
    about = {
        "task": task,
        "doc_id": doc_id,
        "doc_hash": f"d{doc_id}",
        "prompt_hash": f"p{doc_id}",
        "prompt_index": prompt_index,
        "kind": "context",
        "weights": "trained",
        "place": 0,
        "reused": 0,
        "text": f"Question {doc_id}: why is the sky blue?\nAnswer:",
        "n_tokens": 5,
        "tokens": (1, 2, 3, 4, 5),
        "position": 4,
        "ranks": ranks,
        "measures": ("depth", "regularity"),
    }
    pairs = {
        name: generator.random((len(ranks), layers, layers), dtype=np.float32) for name in PAIRS
    }
    for matrices in pairs.values():
        matrices[:, range(layers), range(layers)] = 0
    tokenwise = {
        "trajectories": generator.random((5, layers + 1, 3), dtype=np.float32),
        "trajectory_variance": generator.random(3, dtype=np.float32),
        "effective_rank": generator.random(layers, dtype=np.float32),
        "participation_ratio": generator.random(layers, dtype=np.float32),
        "frobenius_norms": generator.random((layers, 5), dtype=np.float32),
        "spectral_norms": generator.random((layers, 5), dtype=np.float32),
        "depth_slope": generator.random(ranks[-1], dtype=np.float32),
        "depth_r2": generator.random(ranks[-1], dtype=np.float32),
        "self_tokens": (3, 4),
        "self_layers": (0, 1),
        "self_miscoupling": generator.random((len(ranks), 2, 2, 2, 2), dtype=np.float32),
        "context_tokens": (3, 4),
        "context_layers": (0, 1),
        "context_input_miscoupling": generator.random((len(ranks), 2, 2, 2, 2), dtype=np.float32),
        "context_output_miscoupling": generator.random((len(ranks), 2, 2, 2, 2), dtype=np.float32),
    }
    measured = pairs | {
        "subspace_overlap": generator.random((len(ranks), 2, layers, layers), dtype=np.float32),
        "singular_values": generator.random((layers, ranks[-1]), dtype=np.float32),
        "gap": generator.random((len(ranks), layers), dtype=np.float32),
        "svd_residual": generator.random(layers, dtype=np.float32),
        "certificate": generator.random(layers, dtype=np.float32) * np.float32(1e-6),
        "method": ("closed",) * layers,
        "line_shape_score": float(generator.random()),
        "expodistance": float(generator.random()),
        "norms": generator.random(layers + 1, dtype=np.float32),
        "line_shape_scores": generator.random(5, dtype=np.float32),
        "window": 2,
        "windowed_line_shape": generator.random(layers - 1, dtype=np.float32),
        "windowed_expodistance": generator.random(layers - 1, dtype=np.float32),
        "step_lengths": generator.random(layers, dtype=np.float32),
        "equidistance": float(generator.random()),
        "entropy": generator.random(layers + 1, dtype=np.float32),
        **(tokenwise if over_tokens else dict.fromkeys(tokenwise)),
        "seconds": float(generator.random()),
    }
    if reason:
        measured = dict.fromkeys(measured) | dict.fromkeys(
            ("line_shape_score", "expodistance", "equidistance"), np.nan
        )
        measured |= {"seconds": 0.0}
    others = {name: column.missing for name, column in record_columns().items()}
    return (
        others
        | about
        | measured
        | {
            "reason": reason,
            "reason_codes": (CODES.get(reason, "out_of_memory"),) if reason else (),
        }
    )


def value(mean, stderr=0.01, n=10):
    return {"mean": mean, "stderr": stderr, "n": n}


def task_summary(mean=0.3, n=10, failed=0, reasons=None):
    measures = {
        name: {k: value(mean - k / 1000, n=n) for k in CHANCE}
        for name in ("coupling", "coupling_with_diagonal", *PAIRS)
    }
    measures |= {"line_shape_score": value(2.0, n=n), "expodistance": value(0.5, n=n)}
    return {"measured": n, "failed": failed, "reasons": reasons or {}, "measures": measures}


def coupling_config(tasks, model="org/tiny", **changes):
    return {
        "run_id": "abc",
        "schema_version": 1,
        "settings": SETTINGS,
        "versions": {"lm-eval": "0.4.13"},
        "model": model,
        "revision": "main",
        "fingerprint": "f" * 64,
        "model_dtype": "torch.bfloat16",
        "device": "cpu",
        "d_model": 64,
        "n_layers": 4,
        "n_params": 1_000_000,
        "headline_rank": 10,
        "chance": CHANCE,
        "measured": sum(t["measured"] for t in tasks.values()),
        "reused": 0,
        "failed": sum(t["failed"] for t in tasks.values()),
        "worst_certificate": 2.5e-6,
        "tasks": tasks,
    } | changes


def results(tasks, model="org/tiny", coupling=True, groups=None, **changes):
    """Make a results file; ``tasks`` gives each task's summary."""
    scores = {
        task: {
            "alias": task,
            "name": task,
            "sample_len": 50,
            "acc,none": 0.5,
            "acc_stderr,none": 0.02,
            "f1,strict": 0.4,
        }
        | {"f1_stderr,strict": "N/A"}
        for task in [*tasks, *(groups or {})]
    }
    config = {
        "model": "coupling-hf",
        "model_args": f"pretrained={model},dtype=bfloat16",
        "model_num_parameters": 1_000_000,
    }
    config |= {"model_dtype": "torch.bfloat16", "model_revision": "main"}
    if coupling:
        config["coupling"] = coupling_config(tasks, model) | changes
    return {
        "results": scores,
        "group_subtasks": groups or {},
        "higher_is_better": {task: {"acc": True, "f1": True, "coupling": True} for task in scores},
        "n-shot": {task: 5 for task in tasks},
        "n-samples": {task: {"original": 100, "effective": 50} for task in tasks},
        "config": config,
        "model_name": model,
    }


def save(folder, tasks, model="org/tiny", date=DATE, rows=(), **kwargs):
    """Write a run the way lm-eval and the package do, and return its folder."""
    where = folder / model.replace("/", "__")
    where.mkdir(parents=True, exist_ok=True)
    run = results(tasks, model, **kwargs)
    (where / f"results_{date}.json").write_text(json.dumps(run), encoding="utf-8")
    records.write_tables(rows, where, date, run["config"].get("coupling", {}))
    return where


def sample(doc_hash, **changes):
    """Make one line of lm-eval's samples, of a multiple-choice task."""
    choices = [" red", " blue"]
    made = {
        "doc_hash": doc_hash,
        "target": "1",
        "filter": "none",
        "arguments": {
            f"gen_args_{i}": {"arg_0": "Why?", "arg_1": choice} for i, choice in enumerate(choices)
        },
        "resps": [[["-1.5", "False"]], [["-2.5", "False"]]],
        "filtered_resps": [["-1.5", "False"], ["-2.5", "False"]],
        "metrics": ["acc", "coupling"],
        "acc": 0.0,
        "coupling": 0.1,
    }
    return made | changes


def write_samples(folder, task, samples, date=DATE):
    file = folder / f"samples_{task}_{date}.jsonl"
    file.write_text("".join(json.dumps(s) + "\n" for s in samples), encoding="utf-8")
    return file
