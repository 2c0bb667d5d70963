"""What the model answered, from the ``samples_*.jsonl`` that lm-eval writes with ``--log_samples``."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval_coupling.saved.jsonlines import read_json_lines

_TEXT = 1000  # characters of an answer


def read_answers(file: Path | None, main_score: str | None) -> dict[str, dict[str, Any]]:
    """Answers by ``doc_hash``; none if there is no file.

    Args:
        file: lm-eval's samples of one task.
        main_score: lm-eval's key, such as ``exact_match,strict-match``, of the metric that tells right from wrong.

    Returns:
        For each document ``given`` (what the model answered), ``expected``, ``options`` (text and log-likelihood of
        each choice), ``bytes`` (of each choice as scored), ``scores`` and ``right``, which is ``None`` where the score is
        neither 0 nor 1.
    """
    answers: dict[str, dict[str, Any]] = {}
    main_filter = (main_score or ",").split(",", 1)[1]
    for sample in read_json_lines(file) if file else ():
        answer = answers.setdefault(str(sample.get("doc_hash")), {"scores": {}})
        answer["scores"] |= _scores(sample)
        if (
            "given" not in answer or sample.get("filter") == main_filter
        ):  # one line per filter of the task
            answer |= _response(sample)
    for answer in answers.values():
        answer["right"] = {0: False, 1: True}.get(answer["scores"].get(main_score))
    return answers


def _scores(sample: Mapping[str, Any]) -> dict[str, float]:
    values = {name: sample.get(name) for name in sample.get("metrics") or [] if name != "coupling"}
    numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
    return {
        f"{name},{sample.get('filter', 'none')}": float(value) for name, value in numbers.items()
    }


def _response(sample: Mapping[str, Any]) -> dict[str, Any]:
    arguments = sample.get("arguments")
    arguments = list(arguments.values()) if isinstance(arguments, Mapping) else []
    requests: list[tuple[Any, Any]] = [
        (a.get("arg_0"), a.get("arg_1")) for a in arguments if isinstance(a, Mapping)
    ]
    responses = sample.get("filtered_resps") or []
    if requests and isinstance(requests[0][1], str):
        options = _options(requests, responses)
        given = max(options, key=lambda option: option[1])[0] if len(options) > 1 else None
        sizes = [
            len(continuation.encode(errors="surrogatepass"))
            for _, continuation in _choices(requests, responses)
        ]
        expected = _expected(sample.get("target"), options)
        return {
            "given": given,
            "expected": expected,
            "options": options,
            "bytes": sizes if options else [],
        }
    given, generated = _first_text(responses), _first_text(sample.get("resps"))
    expected = _expected(sample.get("target"), [])
    return {
        "given": given,
        "generated": generated if generated != given else None,
        "expected": expected,
        "options": [],
    }


def _options(
    requests: Sequence[tuple[str, str]], responses: Sequence[Any]
) -> list[tuple[str, float]]:
    """Each choice with its log-likelihood; unconditional ones, with an empty context beside full ones, are no choices."""
    chosen = _choices(requests, responses)
    likelihoods = [_likelihood(response) for response in _of_choices(requests, responses)]
    if not all(map(math.isfinite, likelihoods)):
        return []
    return list(zip(_distinct(chosen), likelihoods, strict=True))


def _choices(
    requests: Sequence[tuple[str, str]], responses: Sequence[Any]
) -> list[tuple[str, str]]:
    conditional = any(context for context, _ in requests)
    return [
        request
        for request, _ in zip(requests, responses, strict=False)
        if request[0] or not conditional
    ]


def _of_choices(requests: Sequence[tuple[str, str]], responses: Sequence[Any]) -> list[Any]:
    conditional = any(context for context, _ in requests)
    return [
        response
        for request, response in zip(requests, responses, strict=False)
        if request[0] or not conditional
    ]


def _distinct(requests: Sequence[tuple[str, str]]) -> list[str]:
    """What tells the choices apart: the continuations, or, where these are equal (Winogrande), the ends of the contexts."""
    continuations = [continuation for _, continuation in requests]
    if len(set(continuations)) > 1 or len(requests) == 1:
        return [_short(continuation.strip()) for continuation in continuations]
    contexts = [context for context, _ in requests]
    common = os.path.commonprefix(contexts).rfind(" ") + 1
    return [_short(context[common:]) for context in contexts]


def _likelihood(response: Any) -> float:
    try:
        return float(response[0])
    except (TypeError, ValueError, LookupError):
        return math.nan


def _expected(target: Any, options: Sequence[tuple[str, float]]) -> str | None:
    """The target in words; lm-eval gives some as the number of a choice."""
    texts = [text for text, _ in options]
    words = str(target).strip()
    if words not in texts and words.isdecimal() and int(words) < len(texts):
        return texts[int(words)]
    return None if target is None else _short(words)


def _first_text(value: Any) -> str | None:
    while isinstance(value, list | tuple):
        value = value[0] if value else None
    return None if value is None else _short(str(value))


def _short(text: str) -> str:
    return text if len(text) <= _TEXT else text[:_TEXT] + "…"
