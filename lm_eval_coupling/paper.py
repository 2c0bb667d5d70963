"""`run_coupling_hf`: the function of the paper's project page, on this package's exact Jacobians.

The module has another name than the function, which it would hide in the package's namespace.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from lm_eval_coupling.errors import CouplingError, flag, shown, whole, why
from lm_eval_coupling.errors import path as as_path
from lm_eval_coupling.jacobians.certify import DTYPES, TOLERANCE, probe
from lm_eval_coupling.jacobians.engine import BlockJacobians, jacobians_of_trace
from lm_eval_coupling.measures.formulas.miscoupling import coupling_matrices, miscoupling_to
from lm_eval_coupling.measuring.settings import Settings, chosen_ranks
from lm_eval_coupling.numerics.devices import known_device
from lm_eval_coupling.numerics.precision import exact_arithmetic
from lm_eval_coupling.numerics.spectra import numerical_rank, top_singular
from lm_eval_coupling.residual import ResidualModel

RANKS = (10, 30, 50)


@exact_arithmetic()
def run_coupling_hf(
    model: Any,
    tokenizer: Any,
    model_name: str,
    prompts: Sequence[str],
    start: int | None = None,
    end: int | None = None,
    save: bool = False,
    out_path: str | os.PathLike | None = None,
    device: str | torch.device | None = None,
    verbose: bool = False,
    *,
    ranks: Sequence[int] | None = None,
    last_layer_norm: bool = False,
    dtype: str = "float32",
) -> dict[int, dict[str, Any]]:
    """Measure coupling of all pairs of blocks at the last token, called as the paper's release is.

    Args:
        model: a transformers causal language model; it is not changed or moved.
        tokenizer: the model's own tokenizer.
        model_name: start of the names of the saved files.
        prompts: texts.
        start: number of the first prompt, 0 by default. As in the release, `prompts[0]` is prompt
            `start`, so that a part ``prompts[start:end]`` of a longer list keeps its numbers.
        end: one more than the last number, ``len(prompts)`` by default; prompts beyond it are left
            out, with a warning.
        save: write ``<model_name>_coupling.pt`` (for ``torch.load``) and ``.npz`` (for
            ``numpy.load``, with names such as ``0/coupling_ujv/10/norm``); neither needs pickle.
        out_path: folder of these files, created if absent; the current one by default.
        device: expected device of the model; None accepts any device.
        verbose: show a progress bar.
        ranks: numbers K of top singular vectors; by default 10, 30 and 50, up to d_model.
        last_layer_norm: differentiate the last block together with the final norm, as the release
            does.
        dtype: arithmetic of Jacobians and decompositions, ``float32`` or ``float64``.

    Returns:
        ``out[i]["coupling_ujv"][K]["norm"][a][b]`` = ‖|U_bᵀ J_a V_b| − S_a‖_F / ‖S_a‖_2 of the top
        K singular triplets, for the Jacobian of block a in the basis of block b; |·| is entrywise.
        ``"trace"`` divides by the sum of S_a instead, ``"coupling_vju"`` has U_b and V_b swapped.
        All are float32 tensors [layer, layer] on the CPU. They are NaN where the basis is arbitrary
        (J_b of rank below K) or J_a = 0. ``out[i]["prompt"]`` is the text.

    Raises:
        CouplingError: if the arguments do not fit the model, or a prompt cannot be measured.
    """
    if isinstance(prompts, str):
        raise CouplingError("got one string as prompts, expected a list of texts; pass [prompt]")
    if not isinstance(prompts, Sequence):
        raise CouplingError(f"got prompts={shown(prompts)}, expected a list of texts")
    start, end = (
        value if value is None else whole(name, value, 0)
        for name, value in (("start", start), ("end", end))
    )
    save, verbose = flag("save", save), flag("verbose", verbose)
    last_layer_norm = flag("last_layer_norm", last_layer_norm)
    if not isinstance(model_name, str):
        raise CouplingError(f"got model_name={shown(model_name)}, expected a text")
    wrapped = ResidualModel.wrap(model, tokenizer)
    settings = _settings(ranks, dtype, wrapped.d_model)
    _check_device(device, wrapped.device)
    stem = _stem(model_name, out_path) if save else None
    first = start or 0
    numbered = list(zip(range(first, len(prompts) if end is None else end), prompts, strict=False))
    if len(numbered) < len(prompts):
        warnings.warn(
            f"the last {len(prompts) - len(numbered)} of {len(prompts)} prompts are left out: "
            f"start={start} and end={end} number the prompts given, from {first}; pass "
            "prompts[start:end] with both to select some",
            stacklevel=2,
        )
    out = {}
    for i, prompt in tqdm(numbered, desc="Measuring coupling", disable=not verbose):
        try:
            blocks = _jacobians(wrapped, prompt, DTYPES[settings.dtype], last_layer_norm)
            out[i] = {"prompt": prompt} | _couplings(blocks, settings.ranks)
        except CouplingError as error:
            raise CouplingError(f"prompt {i}: {error}") from error
    if stem is not None:
        _save(out, stem)
    return out


@torch.no_grad()
def _jacobians(
    model: ResidualModel, prompt: str, dtype: torch.dtype, last_layer_norm: bool
) -> BlockJacobians:
    tokens = model.encode(prompt)
    if not tokens:
        raise CouplingError("got a prompt without any token, expected at least one; leave it out")
    last = len(tokens) - 1
    trace = model.trace(tokens, dtype, last, probe)
    blocks = jacobians_of_trace(trace, last, last, range(model.n_layers), "auto")
    for layer, error in enumerate(blocks.certificate.tolist()):
        if not error <= TOLERANCE[dtype]:
            raise CouplingError(
                f"got a Jacobian of block {layer} that is off by {error:.1e} against the model's "
                f'own derivative, expected at most {TOLERANCE[dtype]:.0e}; try dtype="float64"'
            )
    if last_layer_norm:
        J = blocks.jacobians
        J[-1] = _through_final_norm(model, J[-1], trace.resid_final[0, last])
    return blocks


def _through_final_norm(
    model: ResidualModel,
    J: Float[Tensor, "d_model d_model"],
    resid_final: Float[Tensor, " d_model"],
) -> Float[Tensor, "d_model d_model"]:
    """Return ∂(norm(F(x)) − x)/∂x, the derivative of the last hidden states' difference."""
    eye = torch.eye(len(J), dtype=J.dtype, device=J.device)
    J_norm = model.norm_jacobian(resid_final).to(J.device)
    if torch.equal(J_norm, eye):
        raise CouplingError(
            "got last_layer_norm=True for a model without a final norm; leave it out"
        )
    return J_norm @ (J + eye) - eye


def _couplings(blocks: BlockJacobians, ranks: Sequence[int]) -> dict[str, Any]:
    J = blocks.jacobians
    triplets = top_singular(J, max(ranks), device=blocks.device)
    U, S, V = triplets.U, triplets.S, triplets.V
    basis_rank = numerical_rank(S)
    norms: dict[str, Literal["p", "trace"]] = {"norm": "p", "trace": "trace"}

    def both_norms(A: Tensor, K: int) -> dict[str, Tensor]:
        values = {
            name: miscoupling_to(A[..., :K, :K], S[:, None, :K], absolute=True, norm=norm)
            for name, norm in norms.items()
        }
        return {
            name: value.masked_fill(basis_rank < K, torch.nan).float().cpu()
            for name, value in values.items()
        }

    matrices = {
        "coupling_ujv": coupling_matrices(J, U, V),
        "coupling_vju": coupling_matrices(J, V, U),
    }
    return {variant: {K: both_norms(A, K) for K in ranks} for variant, A in matrices.items()}


def _settings(ranks: Sequence[int] | None, dtype: str, d_model: int) -> Settings:
    if ranks is None and d_model < min(RANKS):
        raise CouplingError(
            f"got a model with d_model = {d_model}, too narrow for K = {min(RANKS)}; pass ranks=[…]"
        )
    settings = Settings(
        tuple(k for k in RANKS if k <= d_model) if ranks is None else chosen_ranks(ranks),
        dtype=dtype,
    )
    settings.check_shape(d_model)
    return settings


def _check_device(device: str | torch.device | None, actual: torch.device) -> None:
    expected = actual if device is None else known_device(device, is_here=False)
    if expected.type != actual.type or expected.index not in (None, actual.index):
        raise CouplingError(
            f"got device={device!r} for a model on {actual}, expected the same; "
            "move the model or leave device out"
        )


def _stem(model_name: str, out_path: str | os.PathLike | None) -> Path:
    folder = as_path("out_path", out_path or ".")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CouplingError(
            f"got out_path={str(out_path)!r}, expected a folder that can be written: {why(error)}"
        ) from error
    name = re.sub(r"[^\w.-]+", "_", model_name).strip("._") or "model"
    return folder / f"{name}_coupling"


def _save(out: dict[int, dict[str, Any]], stem: Path) -> None:
    """Write both files, each completely or not at all."""
    for suffix, write in (
        (".pt", torch.save),
        (".npz", lambda data, file: np.savez_compressed(file, **_flat(data))),
    ):
        part = Path(f"{stem}{suffix}.part")
        with part.open("wb") as file:
            write(out, file)
        part.replace(f"{stem}{suffix}")


def _flat(nested: dict) -> dict[str, Any]:
    """Return the arrays of a nested result by path, joined by slashes."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= {f"{key}/{path}": array for path, array in _flat(value).items()}
        else:
            flat[str(key)] = np.asarray(value)
    return flat
