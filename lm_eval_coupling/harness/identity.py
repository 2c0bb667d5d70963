"""What makes a task's prompts: two runs that differ in it measured other prompts, whatever their model and task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lm_eval_coupling.harness.plain import digest
from lm_eval_coupling.saved.prompting import TEXTS


def prompt_identity(lm: Any, task: Any, samples: Any, how: Mapping[str, Any]) -> dict[str, Any]:
    """JSON-able facts; equal ones mean that the same document had the same prompt.

    How many documents were evaluated or measured changes no prompt and is not among them.

    Args:
        lm: a `CouplingLM`, for its chat template and for how it makes tokens of a text.
        task: as lm-eval loaded it.
        samples: numbers of the documents that ``--samples`` chose of this task, or nothing.
        how: arguments that `lm_eval.evaluate` was called with.

    Returns:
        The facts by name, with a ``digest`` of them.
    """
    config = task.config
    shots = config.num_fewshot or 0
    chat = how.get("apply_chat_template")
    found: dict[str, Any] = {
        "num_fewshot": shots,
        "chat_template": digest(lm.chat_template(chat)) if chat else None,
        "chat_template_name": chat if isinstance(chat, str) else None,
        "fewshot_as_multiturn": bool(how.get("fewshot_as_multiturn")) if chat and shots else None,
        "system_instruction": how.get("system_instruction") or None,
        "description": config.description or None,
        "task_version": str(task.VERSION),
        "task_texts": digest({name: getattr(config, name, None) for name in TEXTS}),
        "encoding": lm.encoding,
        "samples": sorted(set(samples)) if samples else None,
    }
    return found | {"digest": digest(found)}
