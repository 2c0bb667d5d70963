"""Each stage of a measurement against its floor: the matrix products it contains (products.py),
alone, on this machine.

    python tests/benchmarks/floors.py --model DIR [--tokens 10 128] [--prompts 8] [--device cuda]

Seconds are those of one prompt, the mean of ``--prompts`` measured together. Stage and floor are
timed in turn, with float32 operands of the same shapes. The spectra contain symmetric
eigendecompositions, which are no products: their floor counts the library's own, of matrices of
that size and for as many vectors, with its seconds beside it. The machine's own rate is that of a
large square product.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import machine
import models
import products
import scipy.linalg
import stages
import torch
from timing import in_turn, seconds

from lm_eval_coupling.jacobians.certify import DTYPES
from lm_eval_coupling.measures.registry import default_measures
from lm_eval_coupling.measuring.settings import Settings
from lm_eval_coupling.residual import ResidualModel

SQUARE = 2048


def floors(shape: products.Shape, tokens: int, rank: int) -> dict[str, list[products.Product]]:
    """Products of each stage, per layer."""
    triplets = min(rank + 1, shape.d_model)
    return {
        "forward": products.forward(shape, tokens),
        "certificate": products.certificate(shape, tokens),
        "jacobians": products.jacobians(shape, tokens),
        "spectra": products.spectra(shape, triplets),
        "pairs": products.pairs(shape, rank),
    }


def stage_and_floor(
    model: ResidualModel, shape: products.Shape, prompts: list[list[int]], settings, device, repeats
) -> list[dict]:
    """One row per stage, per prompt."""
    contained = floors(shape, len(prompts[0]), settings.ranks[-1])
    alone = {
        name: products.runner(found, shape.layers, device) for name, found in contained.items()
    }
    alone["eigh"] = decompositions(shape, min(settings.ranks[-1] + 1, shape.d_model), device)
    dtype, spent, records = DTYPES[settings.dtype], [], []

    def measure():
        records[:], found = stages.measured(model, prompts, settings)
        spent.append(found)

    candidates = {
        "measure": measure,
        "trace without derivative": lambda: model.traces(prompts, dtype),
    }
    taken = in_turn(candidates | alone, repeats)
    if (methods := {method for record in records for method in record.method}) != {"closed"}:
        raise SystemExit(
            f"got blocks of level {sorted(methods)}, expected all closed: the floors are theirs"
        )
    ours = stages.median(spent[-repeats:])
    ours["forward"] = taken["trace without derivative"] / len(prompts)
    ours["certificate"] = ours["trace"] - ours["forward"]
    return [
        {
            "tokens": str(len(prompts[0])),
            "stage": name,
            "seconds": ours[name],
            "floor": taken[name] + (taken["eigh"] if name == "spectra" else 0),
            "of_it_eigh": taken["eigh"] if name == "spectra" else None,
            "ratio": ours[name] / (taken[name] + (taken["eigh"] if name == "spectra" else 0)),
            "floor_gflops_per_second": (gflop := shape.layers * sum(p.flops for p in found) / 1e9)
            / taken[name],
            "gflop": gflop,
        }
        for name, found in contained.items()
    ]


def decompositions(shape: products.Shape, rank: int, device: str) -> Callable[[], None]:
    """As many symmetric eigendecompositions as the model has layers: only the top ``rank`` where
    the library can.
    """
    J = torch.randn(shape.d_model, shape.d_model, device=device)
    gram = J @ J.T
    top = [shape.d_model - rank, shape.d_model - 1]

    def one() -> None:
        if gram.is_cuda:
            torch.linalg.eigh(gram)
        else:
            scipy.linalg.eigh(gram.numpy(), subset_by_index=top, check_finite=False)

    def run() -> None:
        for _ in range(shape.layers):
            one()

    return run


def rate(device: str) -> float:
    """Gflop/s of a large square product in float32, the median of five."""
    a, b = torch.randn(2, SQUARE, SQUARE, device=device)
    out = a @ b
    return (
        2
        * SQUARE**3
        / 1e9
        / statistics.median(seconds(lambda: torch.mm(a, b, out=out)) for _ in range(5))
    )


def main(arguments: list[str] | None = None) -> None:
    parser = machine.parser(__doc__, "floors")
    parser.add_argument(
        "--model",
        required=True,
        help="transformers folder of a Llama, or llama-3-8b for random weights",
    )
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[10, 128], help="lengths of the prompts"
    )
    parser.add_argument("--prompts", type=int, default=8, help="measured together")
    parser.add_argument("--ranks", type=int, nargs="+", default=[10, 30, 50])
    parser.add_argument("--repeats", type=int, help="default 7; 3 with --quick")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype", default="float32", help="of the weights; the arithmetic is float32"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    about = machine.describe(options.device, options.dtype)
    model, tokenizer = models.load(options.model, getattr(torch, options.dtype), options.device)
    shape = products.Shape.of(model.config)
    ours, settings = (
        ResidualModel.wrap(model),
        Settings(tuple(options.ranks), (*default_measures(), "swapped")),
    )
    rows = []
    for tokens in options.tokens:
        prompts = [
            models.prompt(tokens, model.config.vocab_size, tokenizer, number=i)
            for i in range(options.prompts)
        ]
        repeats = options.repeats or (3 if options.quick else 7)
        rows += stage_and_floor(ours, shape, prompts, settings, options.device, repeats)
    found = {"gflops_per_second": rate(options.device), "stages": rows}
    machine.save("floors", about, options, found)
    machine.show(
        f"Stages and their floors: {options.model}, {found['gflops_per_second']:.0f} Gflop/s", rows
    )


if __name__ == "__main__":
    main()
