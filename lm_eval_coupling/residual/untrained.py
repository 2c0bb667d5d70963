"""The same architecture before any training, with which coupling is compared."""

from __future__ import annotations

import copy
from typing import Any, cast

from torch import nn

from lm_eval_coupling.numerics.randomness import seeded
from lm_eval_coupling.residual.scored import looked_through
from lm_eval_coupling.residual.weights import float_dtype


def untrained_twin(model: nn.Module, seed: int) -> nn.Module:
    """Return a new model of the class, configuration, dtype and device of ``model``, untrained.

    The weights depend on the seed alone. They take the model's memory once more, unpacked where its
    weights are packed. An adapter is left out. It is in evaluation mode.
    """
    base = looked_through(model)
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with seeded(seed):
        twin = cast(Any, type(base))._from_config(config, dtype=float_dtype(base))
    takes_tokens = "input_ids" in getattr(base, "main_input_name", "input_ids")
    first = base.get_input_embeddings() if takes_tokens else base
    return twin.to(next(first.parameters()).device).eval()
