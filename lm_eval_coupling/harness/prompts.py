"""The tokens on which each document is measured.

The prompt is the *context*, including few-shot examples, chat template, BOS token and left
truncation. If a context ends in white space, ``coupling_prompt`` chooses between two readings:

* ``scored``, the default: exactly the token ids that the model class feeds as context. To score a
  continuation, lm-eval moves the white space at the end of the context to the continuation. With a
  chat template, the prompt of a multiple-choice task therefore ends with ``<|im_start|>assistant``,
  and the prompt of a generation task with the newline after it.
* ``rendered``: the whole prompt with its last white space, for every kind of task.

Every distinct context of a document is measured once; Winogrande has one per choice. An empty
context beside others (unconditional likelihoods) is left out. A document without any context
(BLiMP) is measured on the prefix token and the target continuation. A rolling task (WikiText) is
measured on the last scored window; an empty page has none, and gives an empty prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from lm_eval_coupling.errors import Reason
from lm_eval_coupling.harness.lm_eval_internals import encode_pair


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Token ids to measure.

    Attributes:
        tokens: ids within the model's window.
        kind: ``context``, ``continuation``, ``window``, or one of
            :data:`~lm_eval_coupling.measures.formulas.choices.PARTS`.
        span: tokens of the part that follows the context; None if the text is the prompt alone.
        problem: reason for which there are no tokens.
    """

    tokens: tuple[int, ...]
    kind: str
    span: range | None = None
    problem: Reason | None = None


def document_prompts(
    lm: Any, requests: Sequence[Any], target: Any, reading: str = "scored"
) -> list[Prompt]:
    """Return the distinct prompts of one document, in the order of its requests, cut to the window.

    Args:
        lm: an `HFLM`, for its tokenizer, window and encoding rules.
        requests: the document's `Instance`s.
        target: what the task's ``doc_to_target`` returns; names the continuation to measure if
            there is no context.
        reading: one of :data:`~lm_eval_coupling.runs.options.READINGS`.
    """
    return list(dict.fromkeys(_prompts(lm, requests, target, reading)))


def _prompts(lm: Any, requests: Sequence[Any], target: Any, reading: str) -> Iterable[Prompt]:
    scored = [r for r in requests if r.request_type == "loglikelihood"]
    with_context = [r for r in scored if r.args[0]]
    for request in with_context:
        context = (
            _scored_context(lm, *request.args)
            if reading == "scored"
            else _whole_context(lm, request.args[0])
        )
        yield Prompt(context, "context")
    if scored and not with_context:
        gold = gold_request(scored, target) or scored[0]
        yield Prompt(_bare_continuation(lm, gold.args[1]), "continuation")
    for request in requests:
        if request.request_type == "generate_until":
            yield Prompt(generation_context(lm, *request.args), "context")
        elif request.request_type == "loglikelihood_rolling":
            yield Prompt(_last_window(lm, request.args[0]), "window")


def _scored_context(lm: Any, context: str, continuation: str) -> tuple[int, ...]:
    # HFLM cuts context and continuation to one token more than it feeds.
    context_ids, continuation_ids = encode_pair(lm, context, continuation)
    kept = (context_ids + continuation_ids)[-(lm.max_length + 1) :]
    return tuple(kept[: len(kept) - len(continuation_ids)])


def _whole_context(lm: Any, context: str) -> tuple[int, ...]:
    """Encode the context as HFLM does, but with the white space at its end."""
    return tuple(lm.tok_encode(context)[-lm.max_length :])


def _bare_continuation(lm: Any, continuation: str) -> tuple[int, ...]:
    """Encode a continuation as `TemplateLM.loglikelihood` does after an empty context."""
    ids = lm.tok_encode(continuation, add_special_tokens=False)
    prefix = lm.prefix_token_id
    tokens = ids if ids and ids[0] == prefix else [prefix, *ids]
    return tuple(tokens[-lm.max_length :])


def generation_context(lm: Any, context: str, gen_kwargs: dict) -> tuple[int, ...]:
    """Encode a context as HFLM does before it generates: with room for the response."""
    from lm_eval.models.utils import normalize_gen_kwargs

    room = normalize_gen_kwargs(dict(gen_kwargs), lm.max_gen_toks)["max_gen_toks"]
    ids, _ = lm.tok_batch_encode(
        [context], left_truncate_len=lm.max_length - room, truncation=lm.truncation
    )
    return tuple(ids[0].tolist())


def _last_window(lm: Any, text: str) -> tuple[int, ...]:
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    windows = get_rolling_token_windows(
        token_list=lm.tok_encode(text),
        prefix_token=lm.prefix_token_id,
        max_seq_len=lm.max_length,
        context_len=1,
    )
    *_, last = [([], []), *map(make_disjoint_window, windows)]
    return tuple([*last[0], *last[1]][-lm.max_length :])


def gold_request(requests: Sequence[Any], target: Any) -> Any | None:
    """Return the request that scores the right answer, or None if the target does not tell which.

    Args:
        requests: the document's loglikelihood requests, in the order of its choices.
        target: index of the right choice, as a number or in digits, or the text of its
            continuation. A single request is returned whatever the target is.
    """
    if isinstance(target, str) and target.isdecimal():
        target = int(target)
    if isinstance(target, int) and 0 <= target < len(requests):
        return requests[target]
    if len(requests) == 1:
        return requests[0]
    named = [r for r in requests if isinstance(target, str) and r.args[1].strip() == target.strip()]
    return named[0] if len(named) == 1 else None
