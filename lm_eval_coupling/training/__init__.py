"""Coupling in a training loop: a differentiable penalty."""

from lm_eval_coupling.training.penalty import coupling_penalty

__all__ = ["coupling_penalty"]
