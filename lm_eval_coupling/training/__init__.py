"""Coupling in a training loop: measured by a callback, or changed by a differentiable penalty."""

from lm_eval_coupling.training.callback import CouplingCallback
from lm_eval_coupling.training.penalty import coupling_penalty

__all__ = ["CouplingCallback", "coupling_penalty"]
