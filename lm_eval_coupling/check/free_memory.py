"""Whether a device has room for one prompt, or one sentence that says how much is missing."""

from __future__ import annotations

from typing import Any

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.numerics import limits
from lm_eval_coupling.numerics.memory import memory_of


def require_room(model: Any, *, rank: int, seq: int) -> None:
    """Refuse a device that cannot hold what one prompt takes beside the model.

    Raises:
        CouplingError: saying how much is missing.
    """
    needed, free = memory_of(model, rank=rank, seq=seq), limits.free(model.device)
    at_least = needed.bases + needed.working
    if at_least > free:
        raise CouplingError(
            f"got {model.device} with {free / 1e9:.1f} GB free beside the model, expected {at_least / 1e9:.1f} GB for the "
            f"Jacobian of one block of width {model.d_model}; use a larger device, or device=cpu"
        )
