"""Which tokens and which blocks a short text such as ``last8`` or ``spaced4`` means. No torch."""

from __future__ import annotations

import random
import re

from lm_eval_coupling.errors import CouplingError

TOKENS = "all, lastN, firstN, randomN such as last8, or positions such as 0+3+-1"
LAYERS = "all, spacedN such as spaced4, or blocks such as 0+10+29"


def chosen_tokens(choice: str, position: int) -> list[int]:
    """The tokens up to ``position`` that ``choice`` names, in order.

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


def chosen_layers(choice: str, n_layers: int) -> list[int]:
    """The blocks, counted from 0, that ``choice`` names.

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
        raise CouplingError(f"got layer {bad[0]} of a model of {n_layers} blocks, expected {-n_layers} to {n_layers - 1}")
    return sorted({layer % n_layers for layer in found})


def _numbers(choice: str, name: str, expected: str) -> list[int]:
    try:
        return [int(part) for part in choice.strip("[] ").replace(",", "+").split("+")]
    except ValueError:
        raise CouplingError(f"got {name}={choice}, expected {expected}") from None
