"""The identity of a task's prompts: equal facts mean that the same document had the same prompt."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from lm_eval.models.huggingface import HFLM

from lm_eval_coupling.harness.plain import digest, plain
from lm_eval_coupling.runs.options import PREFIX
from lm_eval_coupling.saved.prompting import TEXTS

# White space, digits, scripts, symbols and special tokens: tokenizers differ in them.
_PROBE = (
    "The cat's 1,024 mats:  \tnaïve Straße, мир, 世界 🙂\n\n"
    "<s>[INST] x_1 = f(a)**2; </s> Question: why?\nAnswer:"
)


def prompt_identity(lm: Any, task: Any, samples: Any, call: Mapping[str, Any]) -> dict[str, Any]:
    """Return JSON-able facts about what makes a task's prompts, with a ``digest`` of them.

    The number of documents that are evaluated or measured changes no prompt and is left out.

    Args:
        lm: a `CouplingLM`, for its chat template and its encoding.
        task: as lm-eval loaded it.
        samples: numbers of the documents that ``--samples`` chose of this task, or nothing.
        call: arguments that `lm_eval.evaluate` was called with.
    """
    config = task.config
    shots = config.num_fewshot or 0
    chat = call.get("apply_chat_template")
    facts: dict[str, Any] = {
        "num_fewshot": shots,
        "chat_template": digest(lm.chat_template(chat)) if chat else None,
        "chat_template_name": chat if isinstance(chat, str) else None,
        "fewshot_as_multiturn": bool(call.get("fewshot_as_multiturn")) if chat and shots else None,
        "system_instruction": call.get("system_instruction") or None,
        "description": config.description or None,
        "task_version": str(task.VERSION),
        "task_texts": digest({name: getattr(config, name, None) for name in TEXTS}),
        "metadata": _metadata(lm, config.metadata),
        "room_for_generation": _room_for_generation(lm, config),
        "encoding": lm.encoding,
        "samples": sorted(set(samples)) if samples else None,
    }
    return facts | {"digest": digest(facts)}


def _metadata(lm: Any, metadata: Any) -> dict[str, Any] | None:
    """Return a task's metadata, such as RULER's lengths, from which it may make its documents.

    lm-eval adds the model's arguments to the metadata of every task. They are left out: models
    would have no prompt in common.
    """
    if not isinstance(metadata, Mapping):
        return None
    of_model = {"version", "config_source", *inspect.signature(HFLM.__init__).parameters}
    of_model.update(lm.argument_names)
    kept = {
        str(name): plain(value)
        for name, value in metadata.items()
        if name not in of_model and not str(name).startswith(PREFIX)
    }
    return kept or None


def _room_for_generation(lm: Any, config: Any) -> int | None:
    """Return the tokens that stay free for the answer: long contexts are cut by as many."""
    if config.output_type != "generate_until":
        return None
    from lm_eval.models.utils import normalize_gen_kwargs

    given = dict(config.generation_kwargs or {})
    return int(normalize_gen_kwargs(given, lm.max_gen_toks)["max_gen_toks"])


def named_tokenizer(arguments: Mapping[str, Any], model: Any) -> Any:
    """Return what identifies the argument ``tokenizer``.

    Args:
        arguments: those of `hf`.
        model: the loaded one; its own tokenizer lies under its name.

    Returns:
        A name as it was given, 16 hex digits for an object, or None for the model's own.
    """
    given = arguments.get("tokenizer")
    if given is None or isinstance(given, str):
        return given
    identity = tokenizer_digest(given)
    pretrained = arguments["pretrained"]
    name = pretrained if isinstance(pretrained, str) else getattr(model, "name_or_path", None)
    return None if name and identity == _digest_of_own(name, arguments) else identity


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest the tokens of a fixed text, the special tokens and the chat template."""
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
    """Digest the model's own tokenizer; None if it cannot be loaded without the network."""
    from transformers import AutoTokenizer

    names = ("revision", "subfolder", "trust_remote_code")
    kept = {name: arguments[name] for name in names if arguments.get(name)}
    try:
        return tokenizer_digest(AutoTokenizer.from_pretrained(name, local_files_only=True, **kept))
    except Exception:  # transformers and remote code raise anything
        return None
