"""A tokenizer given as an object, in the identity of a run: by what it makes of a text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lm_eval_coupling.harness.plain import digest

_PROBE = "The cat's 1,024 mats:  \tnaïve Straße, мир, 世界 🙂\n\n<s>[INST] x_1 = f(a)**2; </s> Question: why?\nAnswer:"


def told_apart(arguments: Mapping[str, Any], model: Any) -> Any:
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
