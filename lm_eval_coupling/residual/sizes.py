"""Sizes of a model that measuring takes memory by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


def sizes_told(config: Any, causal: bool) -> tuple[int, int | None, int]:
    """What a configuration says of attention heads, of the width of one, and of words, 0 without any."""
    text = config.get_text_config()
    words = getattr(text, "vocab_size", None) if causal else None
    return (
        getattr(text, "num_attention_heads", None) or 1,
        getattr(text, "head_dim", None),
        words or 0,
    )


def block_sizes(blocks: Sequence[nn.Module]) -> tuple[int, int]:
    """Numbers of the largest block, and of the largest matrix that a token meets in a block (one expert's, of many)."""
    weights = [list(block.parameters()) for block in blocks]
    matrices = [p.shape[-1] * p.shape[-2] for some in weights for p in some if p.dim() > 1]
    return max(sum(p.numel() for p in some) for some in weights), max(matrices, default=0)
