"""Test whether blocks may run at the same time, in different threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from lm_eval_coupling.residual.block import Block

# Their hooks and patched forwards keep what they keep in the module that they belong to.
_KNOWN = ("transformer_lens.", "transformers.", "lm_eval_coupling.")


def are_independent(blocks: Sequence[Block]) -> bool:
    """Return whether blocks share no module or tensor and call no hook of unknown origin.

    A user's hook may count calls, or keep what an earlier block left.
    """
    seen: set[int] = set()
    for block in blocks:
        modules = list(block.module.modules())
        own = {id(part) for part in (*modules, *block.weights)}
        origins = (str(getattr(f, "__module__", "")) for f in _functions(modules))
        if own & seen or not all(origin.startswith(_KNOWN) for origin in origins):
            return False
        seen |= own
    return True


def _functions(modules: Sequence[nn.Module]) -> Iterator[Callable[..., Any]]:
    """Yield hooks and patched forwards."""
    for module in modules:
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
            yield from getattr(module, kind).values()
        if "forward" in vars(module):
            yield vars(module)["forward"]
