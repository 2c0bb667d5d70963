"""Whether the model at hand is the one that was evaluated, as far as the results tell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lm_eval.utils import hash_string

from lm_eval_coupling.samples.logged import evaluated_model, last_part
from lm_eval_coupling.saved.prompting import model_arguments


def differences(lm: Any, results: Mapping[str, Any]) -> list[str]:
    """Name what differs between a loaded model and the results of an evaluation.

    Only what both sides know is compared: backends other than ``hf`` record little.

    Args:
        lm: a `CouplingLM`.
        results: lm-eval's results.

    Returns:
        One phrase per difference, such as ``dtype (evaluated bfloat16, loaded float32)``.
    """
    return [
        f"{name} (evaluated {evaluated}, loaded {loaded})"
        for name, evaluated, loaded in _facts(lm, results)
        if evaluated is not None and loaded is not None and evaluated != loaded
    ]


def _facts(lm: Any, results: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, value of the evaluation and value of the model; None where it is not known."""
    config = results.get("config") or {}
    arguments, own = model_arguments(results), lm.get_model_info()
    yield "name", last_part(evaluated_model(results)), last_part(lm.pretrained)
    yield "revision", config.get("model_revision"), lm.revision
    dtype = config.get("model_dtype")
    yield "dtype", dtype and str(dtype).removeprefix("torch."), _dtype(lm)
    yield (
        "parameters",
        config.get("model_num_parameters"),
        own.get("model_num_parameters"),
    )
    yield "maximum length", _whole(results.get("max_length")), lm.max_length
    yield "add_bos_token", *_beginning(lm, arguments)
    if template := results.get("chat_template"):
        other = lm.chat_template(True) if lm.tokenizer.chat_template else ""
        yield "chat template", hash_string(template)[:8], hash_string(other)[:8]
    yield "token after which generation ends", results.get("eot_token_id"), lm.eot_token_id
    yield "tokenizer", *_tokenizer(lm, arguments)
    for kind in ("eos", "bos"):
        logged = results.get(f"tokenizer_{kind}_token")
        token = getattr(lm.tokenizer, f"{kind}_token"), getattr(lm.tokenizer, f"{kind}_token_id")
        yield f"{kind}_token", logged and [*map(str, logged)], [*map(str, token)]
    for name in ("model_sha", "peft_sha"):  # empty without the network
        yield name, config.get(name) or None, own.get(name) or None
    measured = (config.get("coupling") or {}).get("fingerprint")
    yield "weights", measured, lm.session.trained.model.fingerprint if measured else None


def _beginning(lm: Any, arguments: Mapping[str, Any]) -> tuple[str | None, str]:
    """Return whether a token stands before every prompt, in the evaluation and here."""
    given = arguments.get("add_bos_token")
    if "base_url" not in arguments:
        return None if given is None else str(given), str(lm.add_bos_token)
    # lm-eval sends no such token to a server unless it is told to; `hf` asks the tokenizer.
    has_own = lm.tok_encode("a") != lm.tok_encode("a", add_special_tokens=False)
    return str(bool(given)), str(has_own)


def _tokenizer(lm: Any, arguments: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Return the names of the tokenizers, or nothing to compare if both are the models' own."""
    pretrained = last_part(arguments.get("pretrained"))
    given = last_part(arguments.get("tokenizer")) or pretrained
    loaded = last_part(lm.tokenizer.name_or_path)
    are_own = given == pretrained and loaded == last_part(lm.pretrained)
    return (None, None) if are_own else (given, loaded)


def _dtype(lm: Any) -> str:
    return str(lm.model.dtype).removeprefix("torch.")


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) else None
