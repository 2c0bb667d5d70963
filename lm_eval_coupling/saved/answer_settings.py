"""Settings of generation in words, equal for all ways to give lm-eval the same ones."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

SEED = 1234  # lm-eval's default for the choice of few-shot examples and for sampling
_SEEDS = {"torch_seed": SEED, "random_seed": 0}  # lm-eval's defaults of those that answers have
# Names of lm-eval's longest answer in tokens, the one that goes first at the front.
_MAX_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


def describe_generation(
    config: Mapping[str, Any], run: Mapping[str, Any], arguments: Mapping[str, Any]
) -> str | None:
    """Describe the settings of generation in one text, equal for equal settings.

    Args:
        config: lm-eval's configuration of the task.
        run: that of the run, with ``gen_kwargs`` and seeds.
        arguments: the model's; its ``max_gen_toks`` counts where the task and the run give none.

    Returns:
        The text, or None for a task that generates nothing or has no settings.
    """
    if config.get("output_type", "generate_until") != "generate_until":
        return None
    given = run.get("gen_kwargs")
    settings = from_text(given) if isinstance(given, str) else mapping(given)
    settings = _normalized({**mapping(config.get("generation_kwargs")), **settings})
    generates = settings or "output_type" in config
    if generates and (most := arguments.get("max_gen_toks")):
        settings.setdefault("max_gen_toks", _plain_value(most))
    if settings.get("do_sample"):
        settings |= {
            name: run[name] for name, usual in _SEEDS.items() if run.get(name) not in (None, usual)
        }
    words = [f"{name}={_setting(value)}" for name, value in sorted(settings.items())]
    return one_word(" ".join(words)) or None


def _normalized(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of generation in one form for all ways to give the same ones to lm-eval."""
    plain = {name: _plain_value(value) for name, value in settings.items()}
    lengths = [plain.pop(name, None) for name in _MAX_TOKENS]
    if (most := next((length for length in lengths if length is not None), None)) is not None:
        plain["max_gen_toks"] = most
    if "until" in plain and not isinstance(plain["until"], list):
        plain["until"] = [plain["until"]]
    if not plain:
        return {}
    temperature = plain.get("temperature") or 0
    is_hot = isinstance(temperature, int | float) and temperature > 0
    plain["do_sample"] = bool(plain.get("do_sample", is_hot))
    if not plain["do_sample"]:  # the most likely token, whatever these are
        for name in ("temperature", "top_p", "top_k"):
            plain.pop(name, None)
    return plain


def _plain_value(value: Any) -> Any:
    """Return the truth value or number that a text of the command line is."""
    if not isinstance(value, str):
        return value
    if value.strip().lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[value.strip().lower()]
    try:
        number = float(value)
    except ValueError:
        return value
    return number if math.isfinite(number) else value


def _setting(value: Any) -> str:
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, int | float) and abs(value) < 1e15:
        return f"{value:.15g}"
    return short_digest(value) or "none"


def from_text(arguments: str) -> Mapping[str, Any]:
    """Return the arguments of a text such as ``a=1,b={"c": 2}``, or of a JSON object."""
    if isinstance(given := _structure(arguments.strip()), dict):
        return given
    parts = re.split(r",(?![^][{}]*[]}])", arguments)  # at commas that stand in no bracket
    pairs = [part.split("=", 1) for part in parts if "=" in part]
    return {name: _structure(value) for name, value in pairs}


def _structure(text: str) -> Any:
    """Return the list or mapping that a text is in JSON, or else the text."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text) if text[:1] in ("[", "{") else text
    return text


def mapping(value: Any) -> Mapping[str, Any]:
    """Return a mapping as it is, and an empty one for anything else."""
    return value if isinstance(value, Mapping) else {}


def one_word(value: Any) -> str:
    """Return a value without the commas and line breaks that would end its part."""
    return " ".join(str(value).replace(", ", "+").replace(",", "+").split())


def short_digest(value: Any) -> str | None:
    """Return eight hexadecimal digits of the hash of a text or of JSON; None for nothing."""
    if not value:
        return None
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    # lm-eval writes functions in nested settings as Python prints them, with their address.
    text = without_addresses(text)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]


def without_addresses(text: str) -> str:
    """Remove the addresses from what Python prints of objects: they differ among processes."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)
