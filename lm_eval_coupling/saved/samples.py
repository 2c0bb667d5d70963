"""Answers of the model, from the ``samples_*.jsonl`` that lm-eval writes with ``--log_samples``."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval_coupling.errors import shown, why
from lm_eval_coupling.saved.jsonlines import read_json_lines
from lm_eval_coupling.saved.results_file import number
from lm_eval_coupling.saved.saved_run import SavedRun

_TEXT = 1000  # characters of an answer
_ROUNDING = 1e-3  # by which a backend's log-likelihood of a certain answer may be above 0


class _Impossible(ValueError):
    """Log-likelihood of an answer that no probability has."""


def answers_of_run(
    run: SavedRun, task: str, main_score: str | None, problems: list[str]
) -> dict[str, dict[str, Any]]:
    """Read the answers of one task of a run, whose number is compared with what lm-eval evaluated.

    Args:
        run: with results.
        task: a single task.
        main_score: as for :func:`read_answers`.
        problems: a sentence is added where the samples lack documents or have others besides.

    Returns:
        The answers of :func:`read_answers`.
    """
    count = (run.results.get("n-samples") or {}).get(task)
    evaluated = number(count.get("effective")) if isinstance(count, Mapping) else math.nan
    return read_answers(run.samples(task), main_score, evaluated=evaluated, problems=problems)


def read_answers(
    file: Path | None,
    main_score: str | None,
    *,
    evaluated: float = math.nan,
    problems: list[str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Read the answers of one task by ``doc_hash``.

    Args:
        file: lm-eval's samples of the task; no answers if it is None or not there.
        main_score: lm-eval's key, such as ``exact_match,strict-match``, of the metric that tells
            right from wrong.
        evaluated: how many documents lm-eval evaluated; NaN if unknown.
        problems: sentences are added to it where the file cannot be read, or lines are misshapen,
            missing or too many, or hold a log-likelihood that is NaN or above 0.

    Returns:
        For each document ``given`` (what the model answered), ``expected``, ``options`` (text and
        log-likelihood of each choice), ``bytes`` (of each choice as scored), ``scores`` and
        ``right``, which is None where the score is neither 0 nor 1.
    """
    answers: dict[str, dict[str, Any]] = {}
    main_filter = (main_score or ",").split(",", 1)[1]
    lines: Counter[str] = Counter()  # a document has a line per filter of the task
    problems, misshapen = [] if problems is None else problems, 0
    impossible: list[str] = []
    try:
        for sample in read_json_lines(file) if file else ():
            try:
                document = _document(sample)
                scores, response = _scores(sample), _response(sample)
            except _Impossible as error:
                impossible.append(f"a log-likelihood of {error} of document {shown(document)}")
                lines[str(sample.get("filter"))] += 1
                continue
            except (TypeError, ValueError, AttributeError, LookupError, OverflowError):
                misshapen += 1
                continue
            lines[str(sample.get("filter"))] += 1
            answer = answers.setdefault(document, {"scores": {}})
            answer["scores"] |= scores
            if "given" not in answer or sample.get("filter") == main_filter:
                answer |= response
    except OSError as error:
        problems.append(f"got {file}, which cannot be read ({why(error)})")
        return {}
    for answer in answers.values():
        answer["right"] = {0: False, 1: True}.get(answer["scores"].get(main_score))
    if misshapen:
        problems.append(f"got {file} with {misshapen} lines that are not as lm-eval writes them")
    if impossible:
        problems.append(
            f"got {file} with {impossible[0]}, expected at most 0; {len(impossible)} such lines "
            "are left out: run the evaluation again"
        )
    documents = max(lines.values(), default=0)
    if documents and documents != evaluated and not math.isnan(evaluated):
        problems.append(
            f"got {file} with the answers to {documents} documents, expected those to the "
            f"{evaluated:g} that were evaluated; copy it again"
        )
    return answers


def _document(sample: Mapping[str, Any]) -> str:
    if not isinstance(document := sample["doc_hash"], str):  # such documents would be one
        raise TypeError
    return document


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
            for _, continuation in _conditional(requests, requests, responses)
        ]
        return {
            "given": given,
            "expected": _expected(sample, options),
            "options": options,
            "bytes": sizes if options else [],
        }
    given, generated = _first_text(responses), _first_text(sample.get("resps"))
    return {
        "given": given,
        "generated": generated if generated != given else None,
        "expected": _expected(sample, []),
        "options": [],
    }


def _options(
    requests: Sequence[tuple[str, str]], responses: Sequence[Any]
) -> list[tuple[str, float]]:
    """Return each choice with its log-likelihood; none where one is unknown or −∞.

    Raises:
        _Impossible: if one is NaN or above 0.
    """
    choices = _conditional(requests, requests, responses)
    likelihoods = [_likelihood(r) for r in _conditional(responses, requests, responses)]
    if not all(map(math.isfinite, likelihoods)):
        return []
    return list(zip(_distinct(choices), likelihoods, strict=True))


def _conditional(
    values: Sequence[Any], requests: Sequence[tuple[str, str]], responses: Sequence[Any]
) -> list[Any]:
    """Return the values of requests that have a response and are choices.

    Requests with an empty context beside others with a full one are unconditional likelihoods.
    """
    has_context = any(context for context, _ in requests)
    together = zip(values, requests, responses, strict=False)
    return [value for value, (context, _), _ in together if context or not has_context]


def _distinct(requests: Sequence[tuple[str, str]]) -> list[str]:
    """Return what tells the choices apart: continuations, or else (Winogrande) ends of contexts."""
    continuations = [continuation for _, continuation in requests]
    if len(set(continuations)) > 1 or len(requests) == 1:
        return [_short(continuation.strip()) for continuation in continuations]
    contexts = [context for context, _ in requests]
    common = os.path.commonprefix(contexts).rfind(" ") + 1
    return [_short(context[common:]) for context in contexts]


def _likelihood(response: Any) -> float:
    """Return the log-likelihood that a response begins with; −∞ for a response of another kind."""
    given = response[0] if isinstance(response, list) and response else None
    if not isinstance(given, str | float | int) or isinstance(given, bool):
        return -math.inf
    try:
        likelihood = float(given)
    except ValueError:
        return -math.inf
    if not likelihood <= _ROUNDING:
        raise _Impossible(likelihood)
    return likelihood


def _expected(sample: Mapping[str, Any], options: Sequence[tuple[str, float]]) -> str | None:
    """Return the target in words, None where it is unknown.

    lm-eval writes the index of a choice as a text, which may be the text of another choice.
    """
    if (target := sample.get("target")) is None:
        return None
    texts, words = [text for text, _ in options], str(target).strip()
    by_text = [position for position, text in enumerate(texts) if text == words]
    is_index = words.isdecimal() and len(words) < 9 and int(words) < len(texts)
    if not is_index or by_text == [int(words)]:
        return _short(words)
    if not by_text:
        return texts[int(words)]
    right = _gold_of_two(sample, options, int(words), by_text)
    return None if right is None else texts[right]


def _gold_of_two(
    sample: Mapping[str, Any],
    options: Sequence[tuple[str, float]],
    index: int,
    by_text: Sequence[int],
) -> int | None:
    """Decide whether a target is the index or the text of a choice, where it may be both.

    The accuracy says whether the most likely choice was right. Else the document may hold the
    target as a number or as a text.

    Returns:
        The position of the right choice, None where it stays open.
    """
    best = max(range(len(options)), key=lambda position: options[position][1])
    accuracy = sample.get("acc")
    possible = {index, *by_text}
    possible = (
        possible & {best} if accuracy == 1 else possible - {best} if accuracy == 0 else possible
    )
    if len(possible) == 1:
        return possible.pop()
    document = sample.get("doc")
    fields = list(document.values()) if isinstance(document, Mapping) else []
    is_number = any(type(field) is int and field == index for field in fields)
    is_text = any(isinstance(field, str) and field.strip() == str(index) for field in fields)
    if is_number == is_text or (is_text and len(by_text) > 1):
        return None
    right = index if is_number else by_text[0]
    return right if right in possible else None


def _first_text(value: Any) -> str | None:
    while isinstance(value, list | tuple):
        value = value[0] if value else None
    return None if value is None else _short(str(value))


def _short(text: str) -> str:
    return text if len(text) <= _TEXT else text[:_TEXT] + "…"
