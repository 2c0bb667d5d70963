"""The residual stream of a transformers model, block by block, through TransformerLens.

A :class:`ResidualModel` is a `TransformerBridge` on a *second module tree* that shares the weights
of the model it wraps. The wrapped model keeps its attention implementation, and its outputs stay
bit-identical. Only this package knows TransformerLens and transformers; the mathematics sees
:class:`BlockCall` objects.
"""

from lm_eval_coupling.versions import require_versions

require_versions("transformer-lens", "transformers")  # Before the imports below fail.

from lm_eval_coupling.residual.arithmetic import TrueDtype
from lm_eval_coupling.residual.block_call import BlockCall
from lm_eval_coupling.residual.model import ResidualModel
from lm_eval_coupling.residual.trace import ResidualTrace

__all__ = ["BlockCall", "ResidualModel", "ResidualTrace", "TrueDtype"]
