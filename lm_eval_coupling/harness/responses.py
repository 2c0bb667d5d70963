"""Texts with what follows the prompt: the model's own response, or the gold continuation.

A response is measured as it was scored: lm-eval cuts it at its stop sequences, and filters come
later. Its tokens are those of the text, for the run itself and for logged samples alike: prompt and
response are encoded together and split where the prompt ends. If the tokenizer joins the last
characters of the prompt with the first ones of the response, the response is encoded alone, because
the model read the prompt's own tokens. The first of several repeats is measured.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from lm_eval_coupling.errors import CouplingError, Reason, Unmeasurable, reason_of
from lm_eval_coupling.harness.lm_eval_internals import encode_pair
from lm_eval_coupling.harness.prompts import Prompt, generation_context, gold_request

THINK_END = "</think>"  # Where the arguments name no other end of the reasoning.


def continued_prompts(
    lm: Any, requests: Sequence[Any], target: Any, parts: Iterable[str]
) -> Iterator[Prompt]:
    """Yield the prompts of one document with what follows them.

    Args:
        lm: a `CouplingLM`.
        requests: the document's `Instance`s after scoring, or logged requests.
        target: what the task's ``doc_to_target`` returns.
        parts: some of :data:`~lm_eval_coupling.measures.formulas.choices.PARTS`.

    Yields:
        Prompts whose ``span`` is the part, or whose ``problem`` says why there is none.
    """
    for part in parts:
        try:
            if part == "target":
                yield _with_gold_continuation(lm, requests, target)
            else:
                yield from _with_responses(lm, requests, part)
        except Exception as error:  # tokenizers raise anything
            reason = reason_of(error)
            is_of_prompt = reason.code == "refused" and not isinstance(error, Unmeasurable)
            code = "no_such_token" if is_of_prompt else reason.code
            yield Prompt((), part, problem=Reason(code, reason.words))


def _with_gold_continuation(lm: Any, requests: Sequence[Any], target: Any) -> Prompt:
    scored = [r for r in requests if r.request_type == "loglikelihood"]
    if not scored:
        raise CouplingError("got a task that scores no continuations, which has no target-last")
    if (gold := gold_request(scored, target)) is None:
        raise CouplingError(
            f"got {len(scored)} continuations, and a target that names none of them alone"
        )
    context, continuation = gold.args
    before, after = (
        encode_pair(lm, context, continuation)
        if context
        else ([lm.prefix_token_id], lm.tok_encode(continuation, add_special_tokens=False))
    )
    tokens = tuple([*before, *after][-lm.max_length :])
    return _spanning(tokens, "target", range(max(0, len(tokens) - len(after)), len(tokens)))


def _with_responses(lm: Any, requests: Sequence[Any], part: str) -> Iterator[Prompt]:
    generating = [r for r in requests if r.request_type == "generate_until"]
    if not generating:
        raise CouplingError(f"got a task whose model writes no response, which has no {part} part")
    for request in generating:
        context = generation_context(lm, *request.args)
        response = _response(lm, request, context)
        ids = _response_ids(lm, request.args[0], response)
        tokens = (*context, *ids)
        if len(tokens) > lm.max_length:
            raise CouplingError(
                f"got a prompt of {len(context)} tokens and a response of {len(ids)}, "
                f"expected at most {lm.max_length} together"
            )
        span = range(len(context), len(tokens))
        if part != "generated":
            span = _around_end_of_thinking(lm, ids, response, part, len(context))
        prompt = _spanning(tokens, part, span)
        lm.session.trained.model.require_same_when_generated(tokens, len(context))
        yield prompt


def _spanning(tokens: tuple[int, ...], part: str, span: range) -> Prompt:
    if not span:
        what = "continuation" if part == "target" else "response"
        raise CouplingError(
            f"got an empty {what}, which has no token to measure"
            if part in ("generated", "target")
            else f"got a {what} whose {part} is empty"
        )
    return Prompt(tokens, part, span)


def _response(lm: Any, request: Any, context: tuple[int, ...]) -> str:
    """Return the text that the model wrote, with its reasoning, or raise CouplingError."""
    response = request.resps[0] if request.resps else None
    while isinstance(response, list | tuple) and response:
        response = response[0]
    if not isinstance(response, str):
        raise CouplingError("got a request without a response, expected a text")
    if lm.think_end_token is None:
        return response
    if (generated := lm.responses_with_reasoning.get(context)) is None:
        raise CouplingError(
            f"got a response from which think_end_token={lm.think_end_token} has removed the "
            "reasoning; measure it in the run that generates it, or evaluate without that argument"
        )
    # The answer as scored: cut at the stop sequences.
    end = generated.find(response, generated.rfind(str(lm.think_end_token)) + 1)
    return generated[: end + len(response)] if end >= 0 else generated


def _response_ids(lm: Any, context: str, response: str) -> list[int]:
    before, together = lm.tok_encode(context), lm.tok_encode(context + response)
    if together[: len(before)] == before:
        return together[len(before) :]
    return lm.tok_encode(response, add_special_tokens=False)


def _around_end_of_thinking(
    lm: Any, ids: Sequence[int], response: str, part: str, start: int
) -> range:
    """Return the tokens before or after the marker that ends the reasoning."""
    marker = THINK_END if lm.think_end_token is None else str(lm.think_end_token)
    reasoning, separator, _ = response.rpartition(marker)
    if not separator:
        raise CouplingError(f"got a response without {marker}, which has no {part} part")

    def n_characters(n_tokens: int) -> int:
        return len(lm.tokenizer.decode(list(ids[:n_tokens])))

    counts = range(len(ids) + 1)
    before = bisect.bisect_right(counts, len(reasoning), key=n_characters) - 1
    after = bisect.bisect_left(counts, len(reasoning) + len(marker), key=n_characters)
    if part == "reasoning":
        return range(start, start + before)
    return range(start + after, start + len(ids))
