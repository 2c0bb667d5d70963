"""One prompt in, one :class:`PromptCoupling` out. The only place that knows the order of the steps."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.jacobians.certify import probe
from lm_eval_coupling.jacobians.engine import TOLERANCE, BlockJacobians, check_method, jacobians_of_traces, resolve_token
from lm_eval_coupling.measures import coupling as coupling_maths
from lm_eval_coupling.measures import regularity
from lm_eval_coupling.measures.tokens import chosen_layers, chosen_tokens, context_coupling, influence, self_coupling
from lm_eval_coupling.numerics.allocator import keep_freed_memory
from lm_eval_coupling.numerics.memory import layers_at_once
from lm_eval_coupling.numerics.precision import exact_arithmetic
from lm_eval_coupling.numerics.spectra import SingularTriplets, numerical_rank, relative_gap, top_singular

TOKENWISE = {"spectra": influence, "self": self_coupling, "context": context_coupling}
MEASURES = ("depth", "regularity", *TOKENWISE)
DTYPES = {"float32": torch.float32, "float64": torch.float64}
MEASUREMENT_VERSION = 1  # raised whenever the same settings would give other numbers
REGULARITY_VERSION = 2  # the same for what is measured of the trajectory alone; couplings of other versions stay comparable
WINDOW = 11  # blocks, as in the paper; all of them where a model has fewer


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured of a prompt; together with weights and tokens it identifies a measurement."""

    ranks: tuple[int, ...] = (10, 30, 50)
    measures: tuple[str, ...] = ("depth", "regularity")
    dtype: str = "float32"
    method: str = "auto"
    window: int | None = None  # None: WINDOW, or all blocks of a shallower model
    tokens: str = "last8"  # of self- and context coupling, see tokenwise.py
    layers: str = "spaced4"
    trajectories: bool = False

    def __post_init__(self) -> None:
        if not self.ranks or any(not isinstance(k, int) or k < 1 for k in self.ranks):
            raise CouplingError(f"got coupling ranks {list(self.ranks)}, expected positive whole numbers such as 10+30+50")
        object.__setattr__(self, "ranks", tuple(sorted(set(self.ranks))))
        if unknown := [m for m in self.measures if m not in MEASURES]:
            raise CouplingError(f"got unknown measure {unknown[0]!r}, expected any of {', '.join(MEASURES)}")
        if self.dtype not in DTYPES:
            raise CouplingError(f"got coupling dtype {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        check_method(self.method)
        if self.window is not None and self.window < 1:
            raise CouplingError(f"got a window of {self.window} blocks, expected at least 1")
        if self.tokens != "all":
            chosen_tokens(self.tokens, 10**6)  # is it a choice of tokens at all? How long prompts are is seen later

    def check_shape(self, d_model: int, n_layers: int | None = None) -> None:
        """Refuse ranks that the model is too narrow for, and a window that it is too shallow for."""
        if self.ranks[-1] > d_model:
            raise CouplingError(
                f"got coupling rank {self.ranks[-1]} for a model with d_model = {d_model}; choose ranks of at most {d_model}"
            )
        if n_layers is not None:
            chosen_layers(self.layers, n_layers)
        if None not in (self.window, n_layers) and self.window > n_layers:
            raise CouplingError(
                f"got a window of {self.window} blocks for a model of {n_layers}, give a coupling_window of at most that"
            )

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form, part of a measurement's key: what is left at its default, or touches no measure, is left out."""
        plain = dataclasses.asdict(self)
        if self.window is None:
            del plain["window"]
        if not {"self", "context"} & {*self.measures}:
            del plain["tokens"], plain["layers"]
        if not self.trajectories:
            del plain["trajectories"]
        versions = {"measurement_version": MEASUREMENT_VERSION}
        if "regularity" in self.measures:
            versions["regularity_version"] = REGULARITY_VERSION
        return {name: list(v) if isinstance(v, tuple) else v for name, v in plain.items()} | versions


@dataclasses.dataclass(frozen=True)
class PromptCoupling:
    """Everything measured of one prompt at one token. Arrays are float32; what was not measured is ``None``.

    First layer index = the Jacobian's, second = that of the singular vectors: A = U_{l'}ᵀ J^l V_{l'}. ``_vju`` arrays have
    U and V swapped; ``_absolute`` take |A| entrywise; all but ``_trace`` divide by ‖S1‖_2, ``_trace`` by the sum of S1.
    ``reason`` says in words why something is missing or undefined.
    """

    tokens: tuple[int, ...]
    position: int
    ranks: tuple[int, ...]
    measures: tuple[str, ...]
    normalized_miscoupling: np.ndarray | None = None  # rank layer layer
    miscoupling: np.ndarray | None = None  # rank layer layer
    miscoupling_to: np.ndarray | None = None  # rank layer layer
    miscoupling_to_absolute: np.ndarray | None = None  # rank layer layer
    miscoupling_to_trace: np.ndarray | None = None  # rank layer layer
    miscoupling_to_vju: np.ndarray | None = None  # rank layer layer
    miscoupling_to_absolute_vju: np.ndarray | None = None  # rank layer layer
    subspace_overlap: np.ndarray | None = None  # rank 2 layer layer, for U and for V
    singular_values: np.ndarray | None = None  # layer max_rank
    gap: np.ndarray | None = None  # rank layer: (σ_K − σ_{K+1}) / σ_K
    svd_residual: np.ndarray | None = None  # layer
    certificate: np.ndarray | None = None  # layer
    method: tuple[str, ...] | None = None  # layer
    line_shape_score: float = math.nan
    expodistance: float = math.nan
    norms: np.ndarray | None = None  # layer + 1
    line_shape_scores: np.ndarray | None = None  # seq, of every token
    window: int | None = None  # blocks
    windowed_line_shape: np.ndarray | None = None  # layer − window + 1
    windowed_expodistance: np.ndarray | None = None  # layer − window + 1
    step_lengths: np.ndarray | None = None  # layer
    equidistance: float = math.nan  # coefficient of variation of the step lengths
    entropy: np.ndarray | None = None  # layer + 1, nats, of the logits decoded there
    trajectories: np.ndarray | None = None  # seq layer + 1 component, at most 3 principal components of the last layer
    trajectory_variance: np.ndarray | None = None  # component: share of the last layer's variance
    effective_rank: np.ndarray | None = None  # layer
    participation_ratio: np.ndarray | None = None  # layer
    frobenius_norms: np.ndarray | None = None  # layer seq, of the Jacobian from every token to the measured one
    spectral_norms: np.ndarray | None = None  # layer seq
    depth_slope: np.ndarray | None = None  # max_rank: of 1/σ_k over depth
    depth_r2: np.ndarray | None = None  # max_rank
    self_tokens: tuple[int, ...] | None = None
    self_layers: tuple[int, ...] | None = None
    self_miscoupling: np.ndarray | None = None  # rank layer layer token token
    context_tokens: tuple[int, ...] | None = None
    context_layers: tuple[int, ...] | None = None
    context_input_miscoupling: np.ndarray | None = None  # rank layer layer token token, NaN where a Jacobian is zero
    context_output_miscoupling: np.ndarray | None = None  # rank layer layer token token
    seconds: float = 0.0
    reason: str | None = None

    def coupling(self, rank: int, diagonal: bool = False) -> float:
        """1 − mean of m̃_K over layer pairs l ≠ l' (with ``diagonal``, over all pairs); NaN where not measured."""
        if rank not in self.ranks:
            raise CouplingError(f"got rank {rank}, expected one of the measured ranks {list(self.ranks)}")
        if self.normalized_miscoupling is None:
            return math.nan
        pairs = torch.from_numpy(self.normalized_miscoupling[self.ranks.index(rank)])
        return 1 - coupling_maths.mean_off_diagonal(pairs, diagonal=diagonal).item()

    def to_columns(self) -> dict[str, Any]:
        """Flat dict in field order: what is stored and exported."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @classmethod
    def from_columns(cls, columns: dict[str, Any]) -> PromptCoupling:
        """Inverse of :meth:`to_columns`; unknown columns are ignored."""
        names = {f.name for f in dataclasses.fields(cls)}
        values = {name: value for name, value in columns.items() if name in names}
        for name in _TUPLES:
            if values.get(name) is not None:
                values[name] = tuple(np.asarray(values[name]).tolist())
        return cls(**values)


_TUPLES = ("tokens", "ranks", "measures", "method", "self_tokens", "self_layers", "context_tokens", "context_layers")


class _Unmeasurable(RuntimeError):
    pass


@exact_arithmetic()
def measure_coupling(
    model,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    ranks: Sequence[int] = (10, 30, 50),
    measures: Sequence[str] = ("depth", "regularity"),
    position: int = -1,
    dtype: str = "float32",
    method: str = "auto",
    window: int | None = None,
    tokens: str = "last8",
    layers: str = "spaced4",
    trajectories: bool = False,
    progress: bool = True,
) -> list[PromptCoupling]:
    """Measure block coupling at one token of each prompt.

    Args:
        model: a :class:`~lm_eval_coupling.residual.ResidualModel`.
        prompts: strings (tokenised with the tokenizer's own special tokens) or token ids, taken as they are.
        ranks: numbers K of top singular vectors.
        measures: any of ``depth``, ``regularity``, ``spectra``, ``self``, ``context``.
        position: token whose trajectory is measured; negative counts from the end.
        dtype: arithmetic of Jacobians and decompositions, ``float32`` or ``float64``.
        method: see :func:`~lm_eval_coupling.jacobians.block_jacobians`.
        window: blocks of the windowed line-shape score and expodistance; 11, or all of a shallower model's, unless given.
        tokens: of self- and context coupling: ``all``, ``lastN``, ``firstN``, ``randomN`` or positions such as ``0+3+-1``.
        layers: of self- and context coupling: ``all``, ``spacedN`` or blocks such as ``0+10+29``.
        trajectories: keep the principal components of all tokens' trajectories (with ``regularity``).
        progress: show a progress bar.

    Returns:
        One record per prompt, in order. A prompt that cannot be measured gives a record whose ``reason`` says why.

    Raises:
        CouplingError: for settings that no prompt could be measured with.
    """
    settings = Settings(tuple(ranks), tuple(measures), dtype, method, window, tokens, layers, trajectories)
    settings.check_shape(model.d_model, model.n_layers)
    encoded = [model.encode(p) if isinstance(p, str) else list(p) for p in prompts]
    records: dict[int, PromptCoupling] = {}
    with tqdm(total=len(encoded), desc="Measuring coupling", disable=not progress) as bar:
        for together in groups(model, encoded, settings):
            found = measure_prompts(model, [encoded[i] for i in together], position, settings)
            records.update(zip(together, found, strict=True))
            bar.update(len(together))
    return [records[i] for i in range(len(encoded))]


PROMPTS = 8  # measured at once: from there on the steps of a block cost little beside its matrix products
TOKENS = 2048  # of one padded pass; longer prompts keep the processor busy by themselves
BYTES = 1 << 30  # of Jacobians


def groups(model, prompts: Sequence[Sequence[int]], settings: Settings) -> list[list[int]]:
    """Indices of the prompts to measure together: of about the same length, and as many as a GiB of Jacobians allows."""
    jacobians = model.n_layers * model.d_model**2 * DTYPES[settings.dtype].itemsize
    most = max(1, min(PROMPTS, BYTES // jacobians))
    found: list[list[int]] = []
    for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
        together = found[-1] if found else []
        if together and len(together) < most and (len(together) + 1) * len(prompts[i]) <= TOKENS:
            together.append(i)
        else:
            found.append([i])
    return found


def measure_prompt(model, tokens: Sequence[int], position: int, settings: Settings) -> PromptCoupling:
    """One prompt's record; never raises for what a single prompt or a lack of memory can cause."""
    return measure_prompts(model, [tokens], position, settings)[0]


@exact_arithmetic()
def measure_prompts(model, prompts: Sequence[Sequence[int]], position: int, settings: Settings) -> list[PromptCoupling]:
    """The records of several prompts, measured together; what fails together is measured alone."""
    start = time.perf_counter()
    common = [
        {"tokens": tuple(map(int, tokens)), "ranks": settings.ranks, "measures": settings.measures} for tokens in prompts
    ]
    try:
        positions = [resolve_token(position, len(tokens)) for tokens in prompts]
        measured = _measure(model, prompts, positions, settings)
    except Exception as error:
        if len(prompts) > 1:
            return [measure_prompt(model, tokens, position, settings) for tokens in prompts]
        seq = len(prompts[0])
        positions = [position % seq if -seq <= position < seq else position]
        measured = [{"reason": _in_words(error)}]
    seconds = (time.perf_counter() - start) / len(prompts)
    return [
        PromptCoupling(**about, position=at, **found, seconds=seconds)
        for about, at, found in zip(common, positions, measured, strict=True)
    ]


def _in_words(error: Exception) -> str:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return "out of memory"
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, (_Unmeasurable, CouplingError)) else f"{type(error).__name__}: {text}"


@torch.no_grad()
def _measure(model, prompts: Sequence[Sequence[int]], positions: Sequence[int], settings: Settings) -> list[dict[str, Any]]:
    depth = "depth" in settings.measures
    if model.device.type == "cpu":
        keep_freed_memory()
    traces = model.traces(prompts, DTYPES[settings.dtype], positions if depth else None, probe)
    found = [_along_the_stream(model, trace, token, settings) for trace, token in zip(traces, positions, strict=True)]
    if depth:
        blocks = jacobians_of_traces(traces, positions, settings.method)
        found = [_and(regular, _depth(J, settings)) for regular, J in zip(found, blocks, strict=True)]
        del blocks
    for i, (trace, token) in enumerate(zip(traces, positions, strict=True)):
        for name in settings.measures:
            if name in TOKENWISE:
                found[i] = _and(found[i], _tokenwise(name, trace, token, settings))
    return found


def _tokenwise(name: str, trace, token: int, settings: Settings) -> dict[str, Any]:
    """One measure over tokens; where it fails, the others are kept."""
    try:
        return TOKENWISE[name](trace, token, settings)
    except Exception as error:
        return {"reason": f"no {name}: {_in_words(error)}"}


def _and(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    reasons = [part["reason"] for part in (one, other) if part.get("reason")]
    return one | other | {"reason": "; ".join(reasons) or None}


def _along_the_stream(model, trace, token: int, settings: Settings) -> dict[str, Any]:
    trajectory = _off_mps(trace.trajectory(token))
    broken = [layer for layer, x in enumerate(trajectory) if not torch.isfinite(x).all()]
    if broken:
        where = "the embeddings are" if broken[0] == 0 else f"the output of block {broken[0] - 1} is"
        raise _Unmeasurable(f"{where} not finite")
    return _regularity(model, trace, token, settings) if "regularity" in settings.measures else {"reason": None}


def _regularity(model, trace, token: int, settings: Settings) -> dict[str, Any]:
    trajectory = _off_mps(trace.trajectory(token))
    window = min(WINDOW, len(trajectory) - 1) if settings.window is None else settings.window
    scores = {
        "line_shape_score": regularity.line_shape_score(trajectory).item(),
        "expodistance": regularity.expodistance(trajectory).item(),
    }
    undefined = " and ".join(name.replace("_", "-") for name, score in scores.items() if math.isnan(score))
    reasons = [f"undefined {undefined}: a step, a norm or their sum is zero"] if undefined else []
    try:
        entropy = _array(regularity.entropy(_off_mps(model.logits(trace.trajectory(token)))))
    except Exception as error:
        entropy = None
        reasons.append(f"no entropy: {_in_words(error)}")
    return scores | {
        "norms": _array(regularity.norms(trajectory)),
        "line_shape_scores": _line_shape_scores(trace),
        "window": window,
        "windowed_line_shape": _array(regularity.line_shape_score(trajectory, window)),
        "windowed_expodistance": _array(regularity.expodistance(trajectory, window)),
        "step_lengths": _array(regularity.step_lengths(trajectory)),
        "equidistance": regularity.equidistance(trajectory).item(),
        "entropy": entropy,
        **(_trajectories(trace) if settings.trajectories else {}),
        "reason": "; ".join(reasons) or None,
    }


def _trajectories(trace) -> dict[str, np.ndarray]:
    points, share = regularity.principal_trajectories(_off_mps(trace.trajectories(slice(None))))
    return {"trajectories": _array(points), "trajectory_variance": _array(share)}


def _line_shape_scores(trace, at_once: int = 64) -> np.ndarray:
    """Of every token, so many at once: a double-precision trajectory of all of a long prompt would be large."""
    starts = range(0, trace.resid_final.shape[1], at_once)
    parts = [regularity.line_shape_score(_off_mps(trace.trajectories(slice(i, i + at_once)))) for i in starts]
    return np.concatenate([_array(part) for part in parts])


def _depth(found: BlockJacobians, settings: Settings) -> dict[str, Any]:
    tolerance = TOLERANCE[DTYPES[settings.dtype]]
    worst = int(found.certificate.nan_to_num(math.inf).argmax())
    proof = {"certificate": _array(found.certificate), "method": tuple(found.method)}
    if not found.certificate[worst] <= tolerance:
        error = f"{found.certificate[worst]:.1e} against the model's own derivative, expected at most {tolerance:.0e}"
        return proof | {"reason": f"the Jacobian of block {worst} ({found.method[worst]}) is off by {error}"}
    J = found.jacobians
    largest = settings.ranks[-1]
    triplets = top_singular_by_parts(J, min(largest + 1, J.shape[-1]), found.device)
    U, S, V = triplets.U[..., :largest], triplets.S[..., :largest], triplets.V[..., :largest]
    A = coupling_maths.coupling_matrices(J, U, V)
    A_vju = coupling_maths.coupling_matrices(J, V, U)
    by_rank = [_at_rank(k, A, A_vju, S, J.shape[-1]) for k in settings.ranks]
    arrays = {name: _array(torch.stack([at[name] for at in by_rank])) for name in by_rank[0]}
    overlap = torch.stack([coupling_maths.subspace_overlaps(basis, settings.ranks) for basis in (U, V)], dim=1)
    gap = torch.stack([relative_gap(triplets.S, k) for k in settings.ranks])
    return (
        proof
        | arrays
        | {
            "subspace_overlap": _array(overlap),
            "singular_values": _array(S),
            "gap": _array(gap),
            "svd_residual": _array(triplets.residual),
            "reason": _undefined_pairs(arrays["normalized_miscoupling"]),
        }
    )


def top_singular_by_parts(J, k: int, device: torch.device) -> SingularTriplets:
    """On the device where the model computes (MPS has no symmetric eigendecomposition), a few layers at a time."""
    device = torch.device("cpu") if device.type == "mps" else device
    parts = J.split(layers_at_once(J.shape[-1], J.element_size(), device))
    found = [top_singular(part.to(device), k) for part in parts]
    return SingularTriplets(*(torch.cat([getattr(f, name) for f in found]) for name in ("U", "S", "V", "residual")))


def _at_rank(k: int, A, A_vju, S, d_model: int) -> dict[str, torch.Tensor]:
    """Every coupling quantity at rank ``k``, cut from the matrices of the largest rank."""
    A, A_vju = A[..., :k, :k], A_vju[..., :k, :k]
    S1 = S[:, None, :k]  # broadcast over the layers of the bases
    off, off_vju = coupling_maths.off_diagonal_norm(A), coupling_maths.off_diagonal_norm(A_vju)
    to = coupling_maths.miscoupling_to
    found = {
        "normalized_miscoupling": coupling_maths.miscoupling(A, normalized=True, off=off),
        "miscoupling": coupling_maths.miscoupling(A, off=off),
        "miscoupling_to": to(A, S1, off=off),
        "miscoupling_to_absolute": to(A, S1, absolute=True, off=off),
        "miscoupling_to_trace": to(A, S1, norm="trace", off=off),
        "miscoupling_to_vju": to(A_vju, S1, off=off_vju),
        "miscoupling_to_absolute_vju": to(A_vju, S1, absolute=True, off=off_vju),
    }
    too_low = numerical_rank(S, d_model) < k  # singular vectors of a zero singular value are arbitrary
    return {name: values.masked_fill(too_low, math.nan) for name, values in found.items()}


def _undefined_pairs(normalized: np.ndarray) -> str | None:
    """In words, how many layer pairs have no value at the largest rank."""
    undefined = int(np.isnan(normalized[-1]).sum())
    if not undefined:
        return None
    return f"{undefined} of {normalized[-1].size} layer pairs are undefined: a Jacobian is zero or of rank below K"


def _off_mps(tensor: torch.Tensor) -> torch.Tensor:
    """MPS has neither float64 nor a symmetric eigendecomposition."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().to("cpu", torch.float32).numpy()
