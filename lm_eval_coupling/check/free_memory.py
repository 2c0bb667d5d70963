"""Check of a device's free memory before a prompt is measured."""

from __future__ import annotations

from typing import Any

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.numerics import limits
from lm_eval_coupling.numerics.memory import memory_of


def require_room(model: Any, *, rank: int, seq: int) -> None:
    """Require enough free memory for one prompt beside the model.

    Raises:
        CouplingError: if there is too little, with the amount that is needed.
    """
    needed, free = memory_of(model, rank=rank, seq=seq), limits.free(model.device)
    at_least = needed.bases + needed.working
    if at_least > free:
        raise CouplingError(
            f"got {model.device} with {free / 1e9:.1f} GB free beside the model, expected "
            f"{at_least / 1e9:.1f} GB for the Jacobian of one block of width {model.d_model}; "
            "use a larger device, or device=cpu"
        )
