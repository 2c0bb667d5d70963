"""Speed against the procedure of the paper's release (release.py), stage by stage and end to end.

    python tests/benchmarks/against_release.py --model DIR [--tokens 10 128] [--prompts 8] \\
        [--layers 3] [--device cuda]

Same model, same process, in turn. Ours is the whole record of a prompt: every layer's Jacobian with
its certificate, spectra, all layer pairs at K = 10, 30, 50 with U and V both ways. ``--prompts``
prompts of the same length are measured at a time, as in a run of lm-eval, and the mean of one is
quoted; ``together`` = 1 is one prompt alone. The release's procedure takes one prompt at a time and
is given the first. With ``--layers N`` it differentiates N layers and its Jacobian stage is
multiplied up to all of them; its other stages are always whole. That both compute the same is
checked on those layers.
"""

from __future__ import annotations

import copy

import machine
import models
import release
import stages
import torch

from lm_eval_coupling import block_jacobians
from lm_eval_coupling.measures.registry import default_measures
from lm_eval_coupling.measuring.settings import Settings
from lm_eval_coupling.residual import ResidualModel

STAGES = ("trace", "jacobians", "spectra", "pairs")


def compare(
    ours: ResidualModel,
    baseline,
    prompts: list[list[int]],
    settings: Settings,
    layers: list[int],
    repeats: int,
) -> dict:
    """Both, in turn: ours on the first prompt alone and on all together, the release's procedure on
    the first.
    """
    tokens = prompts[0]
    known = block_jacobians(ours, torch.tensor([tokens])).jacobians.to(ours.device)
    stages.measured(ours, prompts, settings)
    release.block_jacobian(*release.block_calls(baseline, tokens)[0])
    alone, together, their_runs = [], [], []
    for _ in range(repeats):
        alone.append(stages.measured(ours, prompts[:1], settings)[1])
        records, spent = stages.measured(ours, prompts, settings)
        together.append(spent)
        their = release.run(baseline, tokens, settings.ranks, layers, known)
        spent = their.seconds | {"jacobians": their.seconds["jacobians"] * len(known) / len(layers)}
        their_runs.append(spent | {"total": sum(spent.values())})
    they = stages.median(their_runs)
    return {
        "tokens": len(tokens),
        "layers": len(known),
        "layers_differentiated_by_baseline": layers,
        "jacobians_extrapolated": len(layers) < len(known),
        "repeats": repeats,
        "release": they,
        "ours": [
            {"together": size, "seconds": we}
            | {"ratio": {stage: they[stage] / we[stage] for stage in (*STAGES, "total")}}
            for size, we in ((1, stages.median(alone)), (len(prompts), stages.median(together)))
        ],
        "methods": sorted({method for record in records for method in record.method}),
        "worst_certificate": max(float(record.certificate.max()) for record in records),
        "agreement": agreement(records[0], known, their, settings, layers),
    }


def agreement(
    record, known: torch.Tensor, their: release.Release, settings: Settings, layers: list[int]
) -> dict:
    """How far the two are apart, over the layers that both differentiated."""
    J, theirs = known[layers], their.J[layers]
    found = {
        "jacobian_relative_error": ((J - theirs).norm(dim=(1, 2)) / theirs.norm(dim=(1, 2)))
        .max()
        .item()
    }
    for index, rank in enumerate(settings.ranks):
        ours = torch.from_numpy(record.normalized_miscoupling[index]).double()[layers][:, layers]
        expected = release.normalized_miscoupling(their, rank, layers)
        found[f"normalized_miscoupling_{rank}"] = {
            "mean_ours": ours.mean().item(),
            "mean_release": expected.mean().item(),
            "mean_difference": (ours - expected).mean().abs().item(),
            "largest_difference": (ours - expected).abs().max().item(),
        }
        for order, name in (
            ("ujv", "miscoupling_to_absolute"),
            ("vju", "miscoupling_to_absolute_vju"),
        ):
            ours = torch.from_numpy(getattr(record, name)[index]).double()[layers][:, layers]
            expected = torch.tensor(their.scores[order][rank], dtype=torch.float64)[layers][
                :, layers, 0
            ]
            found[f"absolute_{order}_{rank}"] = {
                "mean_difference": (ours - expected).mean().abs().item()
            }
    return found


def spread(layers: int, wanted: int | None) -> list[int]:
    """So many layer indices, evenly from first to last."""
    count = layers if wanted is None else min(wanted, layers)
    return [round(i * (layers - 1) / max(1, count - 1)) for i in range(count)]


def rows(results: list[dict]) -> list[dict]:
    return [
        {
            "tokens": f"{found['tokens']}",
            "together": f"{ours['together']}",
            "stage": stage,
            "release, s": found["release"][stage],
            "ours, s": ours["seconds"][stage],
            "ratio": ours["ratio"][stage],
            "": "from some layers"
            if found["jacobians_extrapolated"] and stage in ("jacobians", "total")
            else "",
        }
        for found in results
        for ours in found["ours"]
        for stage in (*STAGES, "total")
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = machine.parser(__doc__, "against_release")
    parser.add_argument(
        "--model",
        required=True,
        help="transformers folder, or llama-3-8b for random weights of its shape",
    )
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[10, 128], help="lengths of the prompts"
    )
    parser.add_argument("--prompts", type=int, default=8, help="measured together")
    parser.add_argument("--ranks", type=int, nargs="+", default=[10, 30, 50])
    parser.add_argument(
        "--layers", type=int, help="differentiated by the baseline (default all; 3 with --quick)"
    )
    parser.add_argument("--repeats", type=int, help="default 3; 1 with --quick")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype", default="float32", help="of the weights; the arithmetic is float32 in both"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    layers = options.layers or (3 if options.quick else None)
    about = machine.describe(options.device, options.dtype)
    model, tokenizer = models.load(options.model, getattr(torch, options.dtype), options.device)
    baseline = model if model.dtype == torch.float32 else copy.deepcopy(model).float()
    ours = ResidualModel.wrap(model)
    settings = Settings(tuple(options.ranks), (*default_measures(), "swapped"))
    results = []
    for tokens in options.tokens:
        vocabulary = model.config.get_text_config().vocab_size
        prompts = [
            models.prompt(tokens, vocabulary, tokenizer, number=i) for i in range(options.prompts)
        ]
        repeats = options.repeats or (1 if options.quick else 3)
        results.append(
            compare(ours, baseline, prompts, settings, spread(ours.n_layers, layers), repeats)
        )
    machine.save("against_release", about, options, results)
    machine.show(f"Against the release's procedure: {options.model}", rows(results))
    for found in results:
        rank = settings.ranks[0]
        same = found["agreement"][f"normalized_miscoupling_{rank}"]
        print(
            f"{found['tokens']} tokens, K = {rank}: mean normalised miscoupling "
            f"{same['mean_ours']:.5f}, "
            f"release's procedure {same['mean_release']:.5f}; Jacobians differ by "
            f"{found['agreement']['jacobian_relative_error']:.1e}, certificate "
            f"{found['worst_certificate']:.1e}"
        )


if __name__ == "__main__":
    main()
