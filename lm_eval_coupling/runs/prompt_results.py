"""Results in lm-eval's form for prompts of no task: those of a file, or of a training."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval_coupling.runs.rows import DocumentKey


def sample_of(document: DocumentKey, doc_id: int) -> dict[str, Any]:
    """Return the sample that lm-eval would have logged of a prompt without a metric."""
    return {
        "doc_id": doc_id,
        "doc": {},
        "target": "",
        "arguments": [],
        "resps": [],
        "filtered_resps": [],
        "filter": "none",
        "metrics": ["coupling"],
        "doc_hash": document.doc_hash,
        "prompt_hash": document.prompt_hash,
        "target_hash": "",
    }


def prompt_results(
    task: str, samples: Sequence[Mapping[str, Any]], *, model_name: str, config: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the results and samples that lm-eval would have left of a task without a metric.

    Args:
        task: name of the task.
        samples: one per prompt, see :func:`sample_of`.
        model_name: as tables and pictures name the model.
        config: what ``config`` of the results says of the model, with its kind as ``model``.
    """
    hashes = "".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in samples)
    number = len(samples)
    return {
        "results": {task: {"name": task, "alias": task, "sample_len": number}},
        "group_subtasks": {},
        "configs": {task: {"task": task, "output_type": "text", "num_fewshot": 0}},
        "versions": {task: 1},
        "n-shot": {task: 0},
        "higher_is_better": {task: {}},
        "n-samples": {task: {"original": number, "effective": number}},
        "config": dict(config),
        "samples": {task: list(samples)},
        "task_hashes": {task: hashlib.sha256(hashes.encode()).hexdigest()},
        "model_source": config["model"],
        "model_name": model_name,
    }
