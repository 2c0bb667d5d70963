"""What makes a task's prompts: two runs that differ in it measured other prompts, whatever their model and task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lm_eval_coupling.harness.plain import digest
from lm_eval_coupling.saved.prompting import TEXTS

_PROBE = "The cat's 1,024 mats:  \tnaïve Straße, мир, 世界 🙂\n\n<s>[INST] x_1 = f(a)**2; </s> Question: why?\nAnswer:"


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


def named_tokenizer(arguments: Mapping[str, Any], model: Any) -> Any:
    """What stands for the argument ``tokenizer``: a name as it was given; of an object a digest, None for the model's own.

    Args:
        arguments: those of `hf`.
        model: the loaded one; the name that it has is where its own tokenizer lies.

    Returns:
        A name, 16 hex digits, or None.
    """
    given = arguments.get("tokenizer")
    if given is None or isinstance(given, str):
        return given
    found = tokenizer_digest(given)
    pretrained = arguments["pretrained"]
    own = pretrained if isinstance(pretrained, str) else getattr(model, "name_or_path", None)
    return None if own and found == _digest_of_own(own, arguments) else found


def tokenizer_digest(tokenizer: Any) -> str:
    """Of the tokens of a fixed text with and without special ones, of those that are special, and of the chat template."""
    return digest(
        {
            "tokens": [
                tokenizer.encode(_PROBE),
                tokenizer.encode(_PROBE, add_special_tokens=False),
            ],
            "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
            "chat_template": getattr(tokenizer, "chat_template", None),
            "size": len(tokenizer),
        }
    )


def _digest_of_own(name: str, arguments: Mapping[str, Any]) -> str | None:
    """None where it cannot be had without the network."""
    from transformers import AutoTokenizer

    kept = {
        key: arguments[key]
        for key in ("revision", "subfolder", "trust_remote_code")
        if arguments.get(key)
    }
    try:
        return tokenizer_digest(AutoTokenizer.from_pretrained(name, local_files_only=True, **kept))
    except Exception:
        return None
