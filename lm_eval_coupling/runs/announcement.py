"""The block of lines at the start of a run: what will be measured, and roughly at what cost."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

import torch

from lm_eval_coupling.jacobians.certify import DTYPES
from lm_eval_coupling.measures.formulas.choices import (
    PROMPT_PART,
    choices_by_part,
    positions_at_most,
)
from lm_eval_coupling.measuring.settings import Settings
from lm_eval_coupling.numerics.devices import wait_for
from lm_eval_coupling.residual import ResidualModel
from lm_eval_coupling.runs.cost import duration
from lm_eval_coupling.runs.options import Options
from lm_eval_coupling.runs.session import Session

logger = logging.getLogger("lm_eval.coupling")

_NAMED = 6  # tasks; a run of MMLU has 57
_SECONDS = 0.05  # spent on timing matrix products


def announce(session: Session, options: Options, name: str, documents: Mapping[str, int]) -> None:
    """Log what will be measured, unless another process of the run speaks.

    ``name`` is the model's, and ``documents`` has the number of evaluated documents of every
    requested task or group.
    """
    if session.quiet:
        return
    model, settings = session.trained.model, session.settings
    limit = options.limit
    chosen = {
        task: count if limit is None else min(limit, count) for task, count in documents.items()
    }
    listed = [f"{chosen[task]} of {count} of {task}" for task, count in documents.items()]
    if len(listed) > _NAMED:
        listed[_NAMED:] = [f"and of {len(listed) - _NAMED} tasks more"]
    twin = "none; coupling_untrained_seed=0 adds one as a baseline"
    if options.untrained is not None:
        twin = f"the same model with fresh weights, seed {options.untrained}"
    prompts = sum(chosen.values()) * positions_at_most(session.position) * len(session.subjects)
    each = estimated_seconds(model, settings)
    rough = f"roughly {duration(each)} a prompt, {duration(each * prompts)} in all"
    measures, ranks = "+".join(settings.measures), ", ".join(map(str, settings.ranks))
    lines = {
        "model": f"{name}, {model.n_layers} blocks of width {model.d_model} on {model.device}",
        "measures": f"{measures} at K = {ranks}, in {settings.dtype}",
        "token": f"{session.position}" + _where(session.position),
        "documents": ", ".join(listed),
        "untrained twin": twin,
        "store": str(session.store.path),
        "cost": f"{rough}; known better after the first prompts",
    }
    logger.info(
        "coupling is measured after the scoring:\n%s",
        "\n".join(f"  {key + ':':<16}{value}" for key, value in lines.items()),
    )


def _where(position: int | str) -> str:
    if position == -1:
        return " of the prompt, its last"
    return " of the prompt" * (list(choices_by_part(position)) == [PROMPT_PART])


def estimated_seconds(model: ResidualModel, settings: Settings) -> float:
    """Return the estimated seconds of a prompt, from the model's size and a timed matrix product.

    Counted are the products of the Jacobians (d_model columns through every block), of the
    decompositions and of the pairs of layers. The weights of the three terms fit a model of 135M
    parameters on two CPU cores within a quarter; measures over several tokens come on top.
    """
    d_model, n_layers = model.d_model, model.n_layers
    block_params, _ = model.block_sizes
    jacobians = 0.9 * d_model * block_params * n_layers
    spectra = 10.0 * n_layers * d_model**3
    pairs = 4.6 * n_layers**2 * d_model**2 * settings.ranks[-1]
    return 1.25 * (jacobians + spectra + pairs) / _operations_per_second(model, settings)


def _operations_per_second(model: ResidualModel, settings: Settings) -> float:
    size = max(model.d_model, 256)
    dtype = DTYPES[settings.dtype]
    matrix = torch.full((size, size), 0.5, dtype=dtype, device=model.device)
    matrix @ matrix  # the first product loads libraries
    wait_for(model.device)
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < _SECONDS:
        matrix @ matrix
        wait_for(model.device)
        count += 1
    return count * 2 * size**3 / elapsed
