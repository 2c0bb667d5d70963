"""What made the prompts of an evaluation, as far as its results tell."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lm_eval_coupling.harness.plain import digest
from lm_eval_coupling.saved.answer_settings import without_addresses
from lm_eval_coupling.saved.prompting import TEXTS, encoding, model_arguments


def prompt_facts(task: str, results: Mapping[str, Any]) -> dict[str, Any]:
    """Return facts like those of :func:`~lm_eval_coupling.harness.identity.prompt_identity`.

    Results hold a task's texts as they are printed, not as they are in Python. Their digest
    therefore differs from that of a run of `coupling-hf`, and the two are not pooled.

    Args:
        task: name of a leaf task.
        results: lm-eval's results.

    Returns:
        The facts by name, with a ``digest`` of them.
    """
    config = results["configs"][task]
    texts = json.dumps({name: config.get(name) for name in TEXTS}, sort_keys=True)
    shots = (results.get("n-shot") or {}).get(task) or 0
    template = results.get("chat_template") or None
    facts = {
        "num_fewshot": shots,
        "chat_template": digest(template) if template else None,
        "chat_template_name": None,
        "fewshot_as_multiturn": (
            bool(results.get("fewshot_as_multiturn")) if template and shots else None
        ),
        "system_instruction": results.get("system_instruction") or None,
        "description": config.get("description") or None,
        "task_version": str((results.get("versions") or {}).get(task)),
        "task_texts": digest(without_addresses(texts)),
        "encoding": encoding(model_arguments(results)),
        "samples": None,
    }
    return facts | {"digest": digest(facts)}
