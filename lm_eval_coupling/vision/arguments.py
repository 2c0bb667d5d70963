"""Checks of the arguments of `lm-eval-coupling vision`, before torch or any data is loaded."""

from __future__ import annotations

from pathlib import Path

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.runs.options import Options, parse_settings
from lm_eval_coupling.saved.atomic import require_writable


def check_arguments(
    model: str, out: Path, *, limit: int | None, batch_size: int, coupling: str
) -> Options:
    """Return the settings in ``coupling``, once every argument is checked.

    Raises:
        CouplingError: naming the argument that is wrong.
    """
    options = Options.take_from({"pretrained": model} | parse_settings(coupling))
    options.require_positions_in_prompts("images")
    require_writable(out)
    if batch_size < 1 or (limit is not None and limit < 1):
        raise CouplingError(
            f"got a batch size of {batch_size} and a limit of {limit}, "
            "expected whole numbers above 0"
        )
    return options
