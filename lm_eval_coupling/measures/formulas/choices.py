"""Choices of tokens and blocks, written as short texts such as ``last8``. No torch."""

from __future__ import annotations

import random
import re
from typing import Any

from lm_eval_coupling.errors import CouplingError, is_several, shown, whole

TOKENS = "all, lastN, firstN, randomN such as last8, or positions such as 0+3+-1"
POSITIONS = "a token such as -1, or several such as -1+0+last4 or random8"
# What follows a prompt: the whole response, the two parts of a reasoning model's response, and the
# gold continuation of a multiple-choice document.
PARTS = ("generated", "reasoning", "answer", "target")
PROMPT_PART = "prompt"
_OF_PART = re.compile(rf"({'|'.join(PARTS)})-(first|last|spread[1-9]\d*)")
LAYERS = "all, spacedN such as spaced4, or blocks such as 0+10+29"


def written(name: str, choice: Any) -> str:
    """Return the text of the command line for a choice: a text, a whole number, or several of them.

    Raises:
        CouplingError: for anything else.
    """
    if isinstance(choice, str):
        return choice
    parts = choice if is_several(choice) else [choice]
    text = "+".join(part if isinstance(part, str) else str(whole(name, part)) for part in parts)
    if not text:
        raise CouplingError(f"got {name}={shown(choice)}, expected at least one")
    return text


def chosen_tokens(choice: str, position: int) -> list[int]:
    """Return the tokens up to ``position`` that ``choice`` names, from 0, each once, ascending.

    Raises:
        CouplingError: if the choice cannot be read, or names a token that the prompt lacks.
    """
    seq = position + 1
    if choice == "all":
        return list(range(seq))
    if named := re.fullmatch(r"(last|first|random)([1-9]\d*)", choice):
        count = min(int(named[2]), seq)
        if named[1] == "random":
            return sorted(random.Random(seq).sample(range(seq), count))
        return list(range(seq - count, seq) if named[1] == "last" else range(count))
    tokens = _numbers(choice, "coupling_tokens", TOKENS)
    if bad := [token for token in tokens if not -seq <= token < seq]:
        raise CouplingError(
            f"got token {bad[0]} of a prompt whose measured token is number {position}, "
            f"expected {-seq} to {position}"
        )
    return sorted({token % seq for token in tokens})


def chosen_positions(choice: str | int, seq: int) -> list[int]:
    """Return the measured tokens of a prompt, in the order of ``choice``, each once.

    Args:
        choice: one token such as ``-1``, or several such as ``-1+0+last4`` or ``random8``.
        seq: number of tokens of the prompt. A token that it lacks is returned too, so that its
            record can give the reason.

    Returns:
        Indices as written in ``choice``: negative ones stay negative.

    Raises:
        CouplingError: if the choice cannot be read.
    """
    positions: dict[int, int] = {}
    for part in _split(choice):
        if _OF_PART.fullmatch(part):
            raise CouplingError(
                f"got coupling_position={part} for a prompt that nothing follows, "
                f"expected {POSITIONS}"
            )
        named = re.fullmatch(r"(?:last|first|random)[1-9]\d*", part)
        tokens = (
            chosen_tokens(part, seq - 1)
            if named
            else _numbers(part, "coupling_position", f"{POSITIONS}; or generated-spread8")
        )
        for token in tokens:
            positions.setdefault(token % seq if -seq <= token < seq else token, token)
    return list(positions.values())


def choices_by_part(choice: str | int) -> dict[str, str]:
    """Split a choice of measured tokens by the part of a document's text that holds them.

    Returns:
        A choice for `chosen_positions` under `PROMPT_PART`, and choices for `chosen_in_part` under
        the names of `PARTS`, in the order in which ``choice`` names them first.
    """
    by_part: dict[str, list[str]] = {}
    for position in _split(choice):
        named = _OF_PART.fullmatch(position)
        part, tokens = named.groups() if named else (PROMPT_PART, position)
        by_part.setdefault(part, []).append(tokens)
    return {part: "+".join(tokens) for part, tokens in by_part.items()}


def chosen_in_part(choice: str, length: int) -> list[int]:
    """Return the tokens that ``choice`` names in a response or continuation, from 0, each once.

    Args:
        choice: ``first``, ``last`` or ``spreadN``, which spreads N tokens evenly from the first to
            the last; or several of them, joined by plus signs.
        length: number of tokens, at least one.
    """
    tokens: list[int] = []
    for name in choice.split("+"):
        if name in ("first", "last"):
            tokens.append(0 if name == "first" else length - 1)
        else:
            tokens += _spread(int(name.removeprefix("spread")), length)
    return list(dict.fromkeys(tokens))


def positions_at_most(choice: str | int) -> int:
    """Return the number of tokens that ``choice`` names where the texts are long.

    Raises:
        CouplingError: if the choice cannot be read.
    """
    long_text = 10**6
    return sum(
        len(chosen_positions(tokens, long_text))
        if part == PROMPT_PART
        else len(chosen_in_part(tokens, long_text))
        for part, tokens in choices_by_part(choice).items()
    )


def chosen_layers(choice: str, n_layers: int) -> list[int]:
    """Return the blocks that ``choice`` names, from 0, each once, ascending.

    Raises:
        CouplingError: if the choice cannot be read, or names a block that the model lacks.
    """
    if choice == "all":
        return list(range(n_layers))
    if named := re.fullmatch(r"spaced([1-9]\d*)", choice):
        return _spread(int(named[1]), n_layers)
    layers = _numbers(choice, "coupling_layers", LAYERS)
    if bad := [layer for layer in layers if not -n_layers <= layer < n_layers]:
        raise CouplingError(
            f"got layer {bad[0]} of a model of {n_layers} blocks, "
            f"expected {-n_layers} to {n_layers - 1}"
        )
    return sorted({layer % n_layers for layer in layers})


def _split(choice: str | int) -> list[str]:
    return [part.strip() for part in str(choice).strip("[] ").replace(",", "+").split("+")]


def _spread(count: int, length: int) -> list[int]:
    """Return ``count`` indices from the first of ``length`` to the last, or all of them."""
    count = min(count, length)
    return sorted({round(i * (length - 1) / max(1, count - 1)) for i in range(count)})


def _numbers(choice: str, name: str, expected: str) -> list[int]:
    try:
        return [int(part) for part in _split(choice)]
    except ValueError:
        raise CouplingError(f"got {name}={choice}, expected {expected}") from None
