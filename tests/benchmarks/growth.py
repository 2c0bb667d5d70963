"""How the time of a measurement grows with tokens, width, layers and prompts, on Llamas with random
weights.

    python tests/benchmarks/growth.py [--device cuda] [--tokens 16 1024] \\
        [--widths 256 512] [--layers 2 4] [--prompts 1 2 4]

One size is varied, the others stay at --width, --depth and --length. The forward pass and the
certificate's backward pass grow with the sequence as the model itself does, so they are listed
apart from what the measurement adds: Jacobians, spectra, pairs. ``exponent`` is the slope of
log(seconds) over log(size), by least squares.
"""

from __future__ import annotations

import math

import machine
import models
import numpy as np
import stages
import torch
from timing import in_turn

from lm_eval_coupling.jacobians.certify import DTYPES
from lm_eval_coupling.measuring.settings import Settings
from lm_eval_coupling.residual import ResidualModel

STAGES = ("forward", "certificate", "jacobians", "spectra", "pairs")
MEASURING = ("jacobians", "spectra", "pairs", "regularity")


def cost(
    model: ResidualModel, settings: Settings, tokens: int, prompts: int, repeats: int
) -> dict[str, float]:
    """Seconds by stage for so many prompts, together; ``measuring`` is all but forward and
    certificate.
    """
    texts = [
        models.prompt(tokens, model.model.config.get_text_config().vocab_size, number=i)
        for i in range(prompts)
    ]
    runs = []

    def measure():
        _, found = stages.measured(model, texts, settings)
        runs.append({stage: seconds * prompts for stage, seconds in found.items()})

    def forward():
        model.traces(texts, DTYPES[settings.dtype])

    taken = in_turn({"measure": measure, "forward": forward}, repeats)
    found = stages.median(runs[-repeats:])
    apart = {
        "forward": taken["forward"],
        "certificate": max(0.0, found.pop("trace") - taken["forward"]),
    }
    return apart | found | {"measuring": sum(found[stage] for stage in MEASURING)}


def exponents(rows: list[dict]) -> dict[str, float]:
    """Slope of log(seconds) over log(size), by stage."""
    sizes = [math.log(row["size"]) for row in rows]
    positive = [s for s in (*STAGES, "measuring", "total") if all(row[s] > 0 for row in rows)]
    return {s: float(np.polyfit(sizes, [math.log(row[s]) for row in rows], 1)[0]) for s in positive}


def sizes_of(options) -> dict[str, list[int]]:
    """The sizes to go through, by axis."""
    quick = options.quick
    return {
        "tokens": options.tokens
        or ([16, 128, 1024] if quick else [16, 32, 64, 128, 256, 512, 1024, 2048]),
        "d_model": options.widths or ([256, 512, 1024] if quick else [256, 512, 1024, 2048]),
        "layers": options.layers or ([2, 4, 8] if quick else [2, 4, 8, 16, 32]),
        "prompts": options.prompts or ([1, 2, 4] if quick else [1, 2, 4, 8]),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = machine.parser(__doc__, "growth")
    for axis, name in (
        ("tokens", "tokens"),
        ("widths", "d_model"),
        ("layers", "layers"),
        ("prompts", "prompts"),
    ):
        parser.add_argument(
            f"--{axis}",
            type=int,
            nargs="+",
            help=f"values of {name}; default 4 to 8, 3 with --quick",
        )
    parser.add_argument("--length", type=int, default=64, help="tokens where they are not varied")
    parser.add_argument(
        "--width", type=int, default=576, help="d_model where it is not varied, a multiple of 64"
    )
    parser.add_argument("--depth", type=int, default=6, help="layers where they are not varied")
    parser.add_argument("--ranks", type=int, nargs="+", default=[10, 30, 50])
    parser.add_argument("--repeats", type=int, help="default 5; 3 with --quick")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    about = machine.describe(options.device, "float32")
    settings, repeats = (
        Settings(tuple(options.ranks)),
        options.repeats or (3 if options.quick else 5),
    )
    base = {
        "tokens": options.length,
        "d_model": options.width,
        "layers": options.depth,
        "prompts": 1,
    }
    results = {}
    for axis, sizes in sizes_of(options).items():
        rows = []
        for size in sizes:
            at = base | {axis: size}
            model = ResidualModel.wrap(models.llama(at["d_model"], at["layers"], options.device))
            rows.append(
                {"size": size} | cost(model, settings, at["tokens"], at["prompts"], repeats)
            )
        results[axis] = {"rows": rows, "exponent": exponents(rows) if len(rows) > 1 else {}}
        held = ", ".join(f"{name} {value}" for name, value in base.items() if name != axis)
        columns = ("size", *STAGES, "measuring", "total")
        table = [{c: str(row[c]) if c == "size" else row[c] for c in columns} for row in rows]
        slope = {"size": "exponent"} | {c: results[axis]["exponent"].get(c) for c in columns[1:]}
        machine.show(f"Seconds over {axis} ({held})", [*table, slope])
    at = {row["size"]: row["measuring"] for row in results["tokens"]["rows"]}
    low, high = (16, 1024) if {16, 1024} <= set(at) else (min(at), max(at))
    results["measuring_ratio"] = {"tokens": [low, high], "ratio": at[high] / at[low]}
    print(f"{high} tokens over {low}, forward and certificate apart: {at[high] / at[low]:.2f}")
    machine.save("growth", about, options, {"base": base, **results})


if __name__ == "__main__":
    main()
