"""Rotary tables that a pass recomputes from its longest position: dynamic NTK and LongRoPE.

transformers leaves the table of one pass in the module for the next. A prompt's own value asks
for a table that was never used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def recomputed_names(module: nn.Module) -> set[str]:
    """Return the names of the attributes and buffers that a module's passes recompute."""
    prefixes = _prefixes(module)
    # transformers 5.9 writes the second name where it means the unprefixed one.
    names = {"attention_scaling", "None_max_seq_len_cached"} if prefixes else set()
    for prefix in prefixes:
        names |= {f"{prefix}{name}" for name in ("inv_freq", "long_inv_freq", "max_seq_len_cached")}
    return names


def _prefixes(module: nn.Module) -> list[str]:
    """Return what stands before the names of a module's recomputed tables; none if it has none."""
    kinds = getattr(module, "rope_type", None)
    by_prefix = {"": kinds} if isinstance(kinds, str) else {}
    if isinstance(kinds, dict):
        by_prefix = {f"{layer_type}_": kind for layer_type, kind in kinds.items()}
    return [
        prefix
        for prefix, kind in by_prefix.items()
        if isinstance(kind, str)
        and ("dynamic" in kind or kind == "longrope")
        and isinstance(getattr(module, f"{prefix}original_inv_freq", None), Tensor)
    ]


def edited_tables(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tables that no pass has written yet, and that are not the original ones."""
    for prefix in _prefixes(module):
        table: Any = getattr(module, f"{prefix}inv_freq")
        original = getattr(module, f"{prefix}original_inv_freq")
        longest = getattr(module, f"{prefix}max_seq_len_cached", module.max_seq_len_cached)
        was_run = f"{prefix}long_inv_freq" in vars(module) or longest != module.original_max_seq_len
        if not was_run and not torch.allclose(table.to(original), original):
            yield f"{prefix}inv_freq", table


def reset(model: nn.Module) -> None:
    """Give every recomputed table the state that it has before any pass."""
    module: Any
    for module in model.modules():
        for prefix in _prefixes(module):
            original = getattr(module, f"{prefix}original_inv_freq")
            module.register_buffer(f"{prefix}inv_freq", original.clone(), persistent=False)
            vars(module).pop(f"{prefix}long_inv_freq", None)
            for name in {f"{prefix}max_seq_len_cached", "max_seq_len_cached"}:
                if name in vars(module) and hasattr(module, "original_max_seq_len"):
                    vars(module)[name] = module.original_max_seq_len


@contextlib.contextmanager
def unused_tables(model: nn.Module) -> Iterator[None]:
    """Run passes of ``model`` as if it had never run before, then put its tables back."""
    kept = [
        (module, dict(vars(module)), dict(module._buffers))
        for module in model.modules()
        if _prefixes(module)
    ]
    try:
        with torch.inference_mode(False):
            reset(model)
        yield
    finally:
        for module, attributes, buffers in kept:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
