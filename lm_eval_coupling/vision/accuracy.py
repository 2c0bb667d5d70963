"""A classifier's accuracy as lm-eval's results."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lm_eval_coupling.vision.classifier import Classifier
from lm_eval_coupling.vision.images import LabeledImages
from lm_eval_coupling.vision.scoring import Answer, Scored


def results_of(
    classifier: Classifier, images: LabeledImages, scored: Scored, measured: bool
) -> dict[str, Any]:
    """Make lm-eval's results: the data set is the task, ``acc`` the metric, an image a sample.

    Args:
        classifier: the scored model.
        images: the data.
        scored: the answers.
        measured: True if coupling is measured as well; samples then name it as a metric.

    Returns:
        What `lm_eval.evaluate` returns, with the name of the model.
    """
    task, (accuracy, error) = images.name, scored.accuracy()
    scores = {"name": task, "alias": task, "sample_len": len(scored.answers), "acc,none": accuracy}
    scores["acc_stderr,none"] = "N/A" if math.isnan(error) else error
    metrics = ["acc", "coupling"] if measured else ["acc"]
    return {
        "results": {task: scores},
        "group_subtasks": {},
        "configs": {
            task: {
                "task": task,
                "dataset_path": task,
                "test_split": images.split,
                "output_type": "image_classification",
                "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
                "num_fewshot": 0,
            }
        },
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
        "samples": {
            task: [_sample(answer, classifier.id2label, metrics) for answer in scored.answers]
        },
        "model_source": "image-classifier",
        "model_name": classifier.name,
    }


def _sample(answer: Answer, names: Mapping[int, str], metrics: list[str]) -> dict[str, Any]:
    choices = [(names[label], value) for label, value in answer.likely.items()]
    responses = [[str(value), str(place == 0)] for place, (_, value) in enumerate(choices)]
    question = f"image {answer.name}"
    return {
        "doc_id": answer.number,
        "doc": {"image": answer.name, "label": names[answer.target]},
        "target": names[answer.target],
        "arguments": {
            f"gen_args_{i}": {"arg_0": question, "arg_1": label}
            for i, (label, _) in enumerate(choices)
        },
        "resps": [[response] for response in responses],
        "filtered_resps": responses,
        "filter": "none",
        "metrics": metrics,
        "acc": float(answer.right),
        "doc_hash": answer.doc_hash,
        "prompt_hash": answer.prompt_hash,
    }
