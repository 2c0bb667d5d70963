"""A run as lm-eval would have left it: ``results_*.json``, ``samples_*.jsonl`` and the coupling table beside them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from lm_eval_coupling.errors import CouplingError, why
from lm_eval_coupling.runs.results import CouplingInfo, add_to_results
from lm_eval_coupling.vision.classifier import Classifier
from lm_eval_coupling.vision.images import LabelledImages
from lm_eval_coupling.vision.scoring import Answer, Scored


def results_of(classifier: Classifier, images: LabelledImages, scored: Scored) -> dict[str, Any]:
    """Accuracy as lm-eval's results: the data set is the task, ``acc`` the metric, an image a sample."""
    task, (accuracy, error) = images.name, scored.accuracy()
    scores = {"name": task, "alias": task, "sample_len": len(scored.answers), "acc,none": accuracy}
    scores["acc_stderr,none"] = "N/A" if math.isnan(error) else error
    about: dict[str, Any] = {
        "task": task,
        "dataset_path": task,
        "test_split": images.split,
        "output_type": "image_classification",
    }
    about |= {
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "num_fewshot": 0,
    }
    return {
        "results": {task: scores},
        "group_subtasks": {},
        "configs": {task: about},
        "versions": {task: 1},
        "n-shot": {task: 0},
        "higher_is_better": {task: {"acc": True}},
        "n-samples": {task: {"original": len(images), "effective": len(scored.answers)}},
        "config": {
            "model": "image-classifier",
            "model_args": {"pretrained": classifier.name},
            "model_num_parameters": sum(p.numel() for p in classifier.model.parameters()),
            "model_dtype": str(classifier.dtype),
            "model_revision": classifier.revision,
            "device": str(classifier.device),
            "undecodable": [
                {"name": name, "reason": reason} for name, reason in scored.undecodable
            ],
        },
        "samples": {task: [_sample(answer, classifier.id2label) for answer in scored.answers]},
        "model_source": "image-classifier",
        "model_name": classifier.name,
        "model_name_sanitized": _sanitized(classifier.name),
    }


def _sample(answer: Answer, names: Mapping[int, str]) -> dict[str, Any]:
    choices = [(names[label], value) for label, value in answer.likely.items()]
    responses = [[str(value), str(place == 0)] for place, (_, value) in enumerate(choices)]
    asked = f"image {answer.name}"
    return {
        "doc_id": answer.number,
        "doc": {"image": answer.name, "label": names[answer.target]},
        "target": names[answer.target],
        "arguments": {
            f"gen_args_{i}": {"arg_0": asked, "arg_1": label}
            for i, (label, _) in enumerate(choices)
        },
        "resps": [[response] for response in responses],
        "filtered_resps": responses,
        "filter": "none",
        "metrics": ["acc"],
        "acc": float(answer.right),
        "doc_hash": answer.doc_hash,
        "prompt_hash": answer.prompt_hash,
    }


def save(results: dict[str, Any], info: CouplingInfo | None, folder: Path) -> Path:
    """Write a run into a folder of its model's, the tables first.

    Args:
        results: from :func:`results_of`.
        info: what was measured, with its rows; ``None`` where nothing was asked for.
        folder: where to; made if missing.

    Returns:
        The file of results.

    Raises:
        CouplingError: if the folder cannot be written.
    """
    date = datetime.now().isoformat().replace(":", "-")
    results = dict(results) | {"date": datetime.now().timestamp()}
    if info is not None:
        add_to_results(results, info, {})
    samples = results.pop("samples")
    where = folder / results["model_name_sanitized"]
    file = where / f"results_{date}.json"
    try:
        where.mkdir(parents=True, exist_ok=True)
        if info is not None:
            info.write_tables(where, date)
        for task, members in samples.items():
            if info is not None:
                for sample in members:
                    sample["metrics"] = ["acc", "coupling"]
            lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in members)
            (where / f"samples_{task}_{date}.jsonl").write_text(lines, encoding="utf-8")
        file.write_text(
            json.dumps(results, indent=2, ensure_ascii=False, default=str), encoding="utf-8"
        )
    except OSError as error:
        raise CouplingError(
            f"got {folder} for the results, which cannot be written ({why(error)}); choose another --out"
        ) from None
    return file


def _sanitized(name: str) -> str:
    return re.sub(r'["<>:/|\\?*\[\]]+', "__", name)
