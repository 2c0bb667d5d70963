"""Models as lm-eval loads them."""

import cases
import torch


def tiny(case="llama", dtype=torch.float32, **changes):
    """As lm-eval loads it: with fused attention."""
    attention = "eager" if case in ("gemma2", "falcon-alibi") else "sdpa"  # transformers has no, or another, fused one
    return cases.tiny_model(case, dtype, **{"attn_implementation": attention} | changes)
