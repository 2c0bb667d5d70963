"""Which tokens and which blocks a short text such as ``last8`` or ``spaced4`` means. No torch."""

from __future__ import annotations

import random
import re
from typing import Any

from lm_eval_coupling.errors import CouplingError, is_several, shown, whole

TOKENS = "all, lastN, firstN, randomN such as last8, or positions such as 0+3+-1"
POSITIONS = "a token such as -1, or several such as -1+0+last4 or random8"
LAYERS = "all, spacedN such as spaced4, or blocks such as 0+10+29"


def written(name: str, choice: Any) -> str:
    """Return a choice as it is written on the command line, also where it was given as a number or several.

    Raises:
        CouplingError: for anything else.
    """
    if isinstance(choice, str):
        return choice
    parts = choice if is_several(choice) else [choice]
    found = "+".join(part if isinstance(part, str) else str(whole(name, part)) for part in parts)
    if not found:
        raise CouplingError(f"got {name}={shown(choice)}, expected at least one")
    return found


def chosen_tokens(choice: str, position: int) -> list[int]:
    """The tokens up to ``position`` that ``choice`` names, in order.

    Returns:
        Indices from 0, each once, ascending.

    Raises:
        CouplingError: if it cannot be read, or names a token that is not there.
    """
    seq = position + 1
    if choice == "all":
        return list(range(seq))
    if named := re.fullmatch(r"(last|first|random)([1-9]\d*)", choice):
        count = min(int(named[2]), seq)
        everything = range(seq)
        if named[1] == "random":
            return sorted(random.Random(seq).sample(everything, count))
        return list(everything[-count:] if named[1] == "last" else everything[:count])
    found = _numbers(choice, "coupling_tokens", TOKENS)
    if bad := [t for t in found if not -seq <= t < seq]:
        raise CouplingError(
            f"got token {bad[0]} of a prompt whose measured token is number {position}, expected {-seq} to {position}"
        )
    return sorted({t % seq for t in found})


def chosen_positions(choice: str | int, seq: int) -> list[int]:
    """The tokens of a prompt of ``seq`` tokens that are measured, in the order of ``choice``, each once.

    Args:
        choice: one token such as ``-1``, or several such as ``-1+0+last4`` or ``random8``.
        seq: tokens of the prompt. A single token that it lacks is among the answers, so that its record can say so.

    Returns:
        Indices as ``choice`` writes them: negative ones stay negative.

    Raises:
        CouplingError: if the choice cannot be read.
    """
    found: dict[int, int] = {}
    for part in str(choice).strip("[] ").replace(",", "+").split("+"):
        named = re.fullmatch(r"(?:last|first|random)[1-9]\d*", part.strip())
        there = (
            chosen_tokens(part.strip(), seq - 1)
            if named
            else _numbers(part, "coupling_position", POSITIONS)
        )
        for token in there:
            found.setdefault(token % seq if -seq <= token < seq else token, token)
    return list(found.values())


def positions_at_most(choice: str | int) -> int:
    """How many tokens of a prompt ``choice`` names if it is long enough."""
    return len(chosen_positions(choice, 10**6))


def chosen_layers(choice: str, n_layers: int) -> list[int]:
    """The blocks, counted from 0, that ``choice`` names.

    Returns:
        Each once, ascending.

    Raises:
        CouplingError: if it cannot be read, or names a block that is not there.
    """
    if choice == "all":
        return list(range(n_layers))
    if named := re.fullmatch(r"spaced([1-9]\d*)", choice):
        count = min(int(named[1]), n_layers)
        return sorted({round(i * (n_layers - 1) / max(1, count - 1)) for i in range(count)})
    found = _numbers(choice, "coupling_layers", LAYERS)
    if bad := [layer for layer in found if not -n_layers <= layer < n_layers]:
        raise CouplingError(
            f"got layer {bad[0]} of a model of {n_layers} blocks, expected {-n_layers} to {n_layers - 1}"
        )
    return sorted({layer % n_layers for layer in found})


def _numbers(choice: str, name: str, expected: str) -> list[int]:
    try:
        return [int(part) for part in choice.strip("[] ").replace(",", "+").split("+")]
    except ValueError:
        raise CouplingError(f"got {name}={choice}, expected {expected}") from None
