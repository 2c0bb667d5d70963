"""Choices of tokens and blocks, written as short texts such as ``last8``. No torch."""

from __future__ import annotations

import random
import re
from typing import Any

from lm_eval_coupling.errors import CouplingError, is_several, shown, whole

TOKENS = "all, lastN, firstN, randomN such as last8, or positions such as 0+3+-1"
POSITIONS = "a token such as -1, or several such as -1+0+last4 or random8"
LAYERS = "all, spacedN such as spaced4, or blocks such as 0+10+29"


def written(name: str, choice: Any) -> str:
    """Return a choice in the form of the command line, given as text, a number, or several.

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
    """Return the tokens up to ``position`` that ``choice`` names.

    Returns:
        Indices from 0, each once, ascending.

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
    for part in str(choice).strip("[] ").replace(",", "+").split("+"):
        named = re.fullmatch(r"(?:last|first|random)[1-9]\d*", part.strip())
        tokens = (
            chosen_tokens(part.strip(), seq - 1)
            if named
            else _numbers(part, "coupling_position", POSITIONS)
        )
        for token in tokens:
            positions.setdefault(token % seq if -seq <= token < seq else token, token)
    return list(positions.values())


def positions_at_most(choice: str | int) -> int:
    """Return the number of tokens that ``choice`` names in a long prompt."""
    return len(chosen_positions(choice, 10**6))


def chosen_layers(choice: str, n_layers: int) -> list[int]:
    """Return the blocks that ``choice`` names.

    Returns:
        Indices from 0, each once, ascending.

    Raises:
        CouplingError: if the choice cannot be read, or names a block that the model lacks.
    """
    if choice == "all":
        return list(range(n_layers))
    if named := re.fullmatch(r"spaced([1-9]\d*)", choice):
        count = min(int(named[1]), n_layers)
        return sorted({round(i * (n_layers - 1) / max(1, count - 1)) for i in range(count)})
    layers = _numbers(choice, "coupling_layers", LAYERS)
    if bad := [layer for layer in layers if not -n_layers <= layer < n_layers]:
        raise CouplingError(
            f"got layer {bad[0]} of a model of {n_layers} blocks, "
            f"expected {-n_layers} to {n_layers - 1}"
        )
    return sorted({layer % n_layers for layer in layers})


def _numbers(choice: str, name: str, expected: str) -> list[int]:
    try:
        return [int(part) for part in choice.strip("[] ").replace(",", "+").split("+")]
    except ValueError:
        raise CouplingError(f"got {name}={choice}, expected {expected}") from None
