"""Parts of device.py that need no large model: decompositions, TensorFloat32, every family against
float64 on the CPU.
"""

from __future__ import annotations

import contextlib
import functools
from types import SimpleNamespace
from typing import Any

import cases
import models
import oracles
import torch
from timing import seconds

from lm_eval_coupling import ResidualModel, block_jacobians
from lm_eval_coupling.measures.formulas.miscoupling import coupling_matrices
from lm_eval_coupling.numerics import device_eigh, gram, subspace
from lm_eval_coupling.numerics.spectra import top_singular


def spectra(report: Any, options: SimpleNamespace) -> None:
    """Top triplets of batches of matrices with known and with flat spectra; a few of them against
    float64 on the device.
    """
    shapes = (
        [(4, 96, 11)]
        if options.quick
        else [(240, 576, 51), (32, 4096, 51), (960, 576, 51), (30, 576, 51)]
    )
    for batch, d_model, k in shapes:
        for kind in ("flat", "decaying", "steep"):
            J = _matrices(kind, batch, d_model, options.device)
            top_singular(J[:2], k)
            with _counted() as counts:
                best = min(
                    seconds(lambda J=J, k=k: counts.update(found=top_singular(J, k)))
                    for _ in range(2)
                )
            found = counts["found"]
            some = J[: 1 if d_model > 1024 else 2].double()
            values = torch.linalg.eigvalsh(some.mT @ some).flip(-1)[:, :k].clamp_min(0).sqrt()
            eye = torch.eye(k, device=J.device, dtype=J.dtype)
            loss = max(float((X.mT @ X - eye).abs().max()) for X in (found.U, found.V))
            report.add(
                kind=kind,
                batch=batch,
                d_model=d_model,
                k=k,
                seconds=best,
                seconds_of_small_problems=counts["small"] / 2,
                products_with_columns=counts["columns"] / 2,
                residual=float(found.residual.max()),
                orthogonality=loss,
                values_relative_error=float(
                    ((found.S[: len(some)].double() - values).abs() / values[:, :1]).max()
                ),
            )
            del J, found
        if not options.quick and d_model == 576:
            G = torch.randn(4, d_model, d_model, device=options.device)
            G = G @ G.mT
            torch.linalg.eigh(G[:1])
            report.add(
                kind="torch.linalg.eigh of one",
                d_model=d_model,
                seconds=seconds(lambda G=G: torch.linalg.eigh(G)) / 4,
            )
    _small_problems(report, options)
    report.save(eigensolvers=device_eigh.choices())


def _small_problems(report: Any, options: SimpleNamespace) -> None:
    """Seconds of both solvers of many small matrices, and their errors."""
    shapes = [(8, 12)] if options.quick else [(240, 64), (960, 64), (240, 128), (960, 128)]
    for batch, n in shapes:
        for dtype, settled_at in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
            A = _matrices("flat", batch, n, options.device).to(dtype)
            H = A + A.mT
            exact = torch.linalg.eigvalsh(H[:4].double().cpu()).flip(-1)
            row: dict[str, Any] = {}
            for name, solver in device_eigh.SOLVERS.items():
                values, _ = solver(H, settled_at)
                decompose = functools.partial(solver, H, settled_at)
                row[f"{name}, s"] = min(seconds(decompose) for _ in range(2))
                row[f"{name}, error"] = float((values[:4].cpu() - exact).abs().max() / exact.max())
            report.add(kind="small problems", batch=batch, n=n, dtype=str(dtype), **row)


def _matrices(kind: str, batch: int, d_model: int, device: str) -> torch.Tensor:
    """Gaussian ones, as they are or with columns that decay: σ_k falls about as the columns do."""
    generator = torch.Generator(device=device).manual_seed(0)
    J = torch.randn(batch, d_model, d_model, device=device, generator=generator) / d_model**0.5
    i = torch.arange(d_model, device=device)
    scale = {
        "flat": torch.ones_like(i),
        "decaying": (1 + i) ** -0.5,
        "steep": torch.exp(-i / 15.0) + 1e-4,
    }[kind]
    return J * scale


@contextlib.contextmanager
def _counted():
    """Seconds spent in the small problems, and columns that went through JᵀJ."""
    counts: dict[str, Any] = {"small": 0.0, "columns": 0}
    small, product = subspace.small_eigh, subspace._Product.__call__

    def timed(H, settled_at=1e-13):
        out = []
        counts["small"] += seconds(lambda: out.append(small(H, settled_at)))
        return out[0]

    def counting(self, X):
        counts["columns"] += X.shape[-1]
        return product(self, X)

    subspace.small_eigh, subspace._Product.__call__ = timed, counting
    try:
        yield counts
    finally:
        subspace.small_eigh, subspace._Product.__call__ = gram.small_eigh, product


SWITCHES = {
    "nothing": lambda: None,
    "allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "fp32_precision": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
}


def tf32(report: Any, options: SimpleNamespace) -> None:
    """Certificates and coupling matrices with TensorFloat32 switched on outside, in each of torch's
    ways.
    """
    width = 64 if options.quick else 512
    model = models.llama(width, 3, options.device)
    wrapped, tokens = ResidualModel.wrap(model), torch.tensor([models.prompt(40, 1024)])
    exact = block_jacobians(wrapped, tokens, dtype=torch.float64).jacobians
    for name, switch in SWITCHES.items():
        if name == "fp32_precision" and not hasattr(torch.backends, "fp32_precision"):
            continue
        switch()
        try:
            outside = _error_of_a_product(options.device)
            found = block_jacobians(wrapped, tokens)
            triplets = top_singular(found.jacobians, 11)
            A = coupling_matrices(found.jacobians, triplets.U, triplets.V)
            expected = torch.stack(
                [
                    triplets.U.double().mT @ (J @ triplets.V.double())
                    for J in found.jacobians.double()
                ]
            )
            report.add(
                switched_on=name,
                a_product_outside=outside,
                certificate=float(found.certificate.max()),
                jacobian=float((found.jacobians.double() - exact).norm() / exact.norm()),
                coupling_matrices=float((A.double() - expected).norm() / expected.norm()),
                methods=sorted(set(found.method)),
            )
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False
            if hasattr(torch.backends, "fp32_precision"):
                torch.backends.fp32_precision = "none"
            torch.set_float32_matmul_precision("highest")


def _error_of_a_product(device: str) -> float | None:
    """About 1e-7 in float32, 3e-4 in TensorFloat32; torch refuses products where its two ways to
    set that disagree.
    """
    a = torch.randn(256, 256, device=device)
    exact = a.double() @ a.double()
    try:
        return float(((a @ a).double() - exact).norm() / exact.norm())
    except RuntimeError:
        return None


def exactness(report: Any, options: SimpleNamespace) -> None:
    """Every family: the device's Jacobians against plain automatic differentiation in float64 on
    the CPU.

    In float32 from a token to itself and to another one, in float64 to itself.
    """
    names = ["llama", "bloom", "mixtral"] if options.quick else list(cases.CASES)
    tokens = cases.tiny_tokens(9)
    for name in names:
        row: dict[str, Any] = {"family": name}
        try:
            plain = cases.tiny_model(name)
            layers = range(len(oracles.decoder_layers(plain)))
            expected = {
                pair: [oracles.oracle(plain, tokens, layer, *pair) for layer in layers]
                for pair in ((8, 8), (8, 4))
            }
            for dtype in (torch.float32, torch.float64):
                wrapped = ResidualModel.wrap(cases.tiny_model(name).to(options.device, dtype))
                worst, certificate, methods = 0.0, 0.0, set()
                for (t_out, t_in), oracle in (
                    expected.items() if dtype == torch.float32 else [*expected.items()][:1]
                ):
                    found = block_jacobians(
                        wrapped, tokens, output_token=t_out, input_token=t_in, dtype=dtype
                    )
                    errors = (
                        oracles.worst(J.double().cpu(), o)
                        for J, o in zip(found.jacobians, oracle, strict=True)
                    )
                    worst = max(worst, *errors)
                    certificate, methods = (
                        max(certificate, float(found.certificate.max())),
                        methods | set(found.method),
                    )
                row |= {
                    f"{dtype}"[6:]: worst,
                    f"certificate_{dtype}".replace("torch.", ""): certificate,
                }
            row["methods"] = sorted(methods)
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"[:200]
        report.add(**row)
    worst = {
        dtype: max((row.get(dtype, 0.0) for row in report.rows), default=0.0)
        for dtype in ("float32", "float64")
    }
    report.save(
        worst=worst, failed_families=[row["family"] for row in report.rows if "error" in row]
    )
    if report.found["failed_families"] or worst["float32"] > 2e-5:
        raise SystemExit(f"worst {worst}, failed: {report.found['failed_families']}")
