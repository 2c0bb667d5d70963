"""Effect of noise on the input embeddings on trajectories and coupling (paper, fig. 32)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from lm_eval_coupling.errors import resolve_token
from lm_eval_coupling.jacobians.certify import DTYPES
from lm_eval_coupling.measuring.prompt import measure_prompt
from lm_eval_coupling.measuring.settings import Settings
from lm_eval_coupling.numerics.precision import exact_arithmetic

LEVELS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)


@exact_arithmetic()
def noise_robustness(
    model: Any,
    prompts: Sequence[Sequence[int]],
    levels: Sequence[float] = LEVELS,
    *,
    rank: int = 10,
    seed: int = 0,
    position: int = -1,
    dtype: str = "float32",
    progress: bool = True,
) -> pd.DataFrame:
    """Measure each prompt with Gaussian noise added to the first block's input at every token.

    Args:
        model: a :class:`~lm_eval_coupling.residual.ResidualModel`.
        prompts: token ids.
        levels: expected norm of the noise, relative to the norm of the vector it is added to.
        rank: number K of singular vectors.
        seed: seed of the noise; a prompt gets the same directions at every level.
        position: measured token.
        dtype: arithmetic, ``float32`` or ``float64``.
        progress: show a progress bar.

    Returns:
        One row per prompt and level: ``prompt, level``, the cosines with the clean stream after
        the first and the last block, ``cosine_first`` and ``cosine_last``, and ``coupling``, NaN
        where it could not be measured.
    """
    settings = Settings((rank,), ("depth",), dtype)
    settings.check_shape(model.d_model)
    rows = []
    for number, tokens in enumerate(tqdm(prompts, desc="Adding noise", disable=not progress)):
        token = resolve_token(position, len(tokens))
        trace = model.trace(tokens, DTYPES[dtype])
        clean = trace.trajectory(token)
        noise = _draw_noise(trace.calls[0].resid_pre, seed, number)
        for level in levels:
            with model.first_block_given(partial(torch.add, other=noise, alpha=level)):
                noisy = model.trace(tokens, DTYPES[dtype]).trajectory(token)
                record = measure_prompt(model, tokens, position, settings)
            rows.append(
                {"prompt": number, "level": level}
                | {"cosine_first": _cosine(noisy[1], clean[1])}
                | {"cosine_last": _cosine(noisy[-1], clean[-1])}
                | {"coupling": record.coupling(rank)}
            )
    return pd.DataFrame(rows)


def _cosine(a: Tensor, b: Tensor) -> float:
    """Return the cosine in float64, on the CPU: some devices have no float64."""
    return torch.cosine_similarity(a.cpu().double(), b.cpu().double(), dim=0).item()


def _draw_noise(resid: Tensor, seed: int, number: int) -> Tensor:
    """Draw noise of expected norm ‖x‖ at every token, on the CPU: equal on every device."""
    generator = torch.Generator().manual_seed((seed << 32) + number)
    noise = torch.randn(resid.shape, generator=generator, dtype=torch.float64)
    noise = noise.to(resid.device, resid.dtype)
    return noise * resid.norm(dim=-1, keepdim=True) / math.sqrt(resid.shape[-1])
