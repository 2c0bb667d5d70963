"""Speed against the procedure of the paper's release (release.py), stage by stage and end to end.

    python tests/benchmarks/against_release.py --model DIR [--tokens 10 128] [--layers 3] [--device cuda]

Same model, same prompts, same process, in turn. Ours is the whole record of a prompt: every layer's Jacobian with its
certificate, spectra, all layer pairs at K = 10, 30, 50 with U and V both ways. With ``--layers N`` the baseline
differentiates N layers and its Jacobian stage is multiplied up to all of them; its other stages are always whole. That both
compute the same thing is checked on the layers that both differentiated.
"""

from __future__ import annotations

import copy

import machine
import models
import release
import stages
import torch

from lm_eval_coupling import block_jacobians
from lm_eval_coupling.measure import Settings
from lm_eval_coupling.residual import ResidualModel

STAGES = ("trace", "jacobians", "spectra", "pairs")


def compare(ours: ResidualModel, baseline, tokens: list[int], settings: Settings, layers: list[int], repeats: int) -> dict:
    """Both on one prompt, in turn."""
    known = block_jacobians(ours, torch.tensor([tokens])).jacobians.to(ours.device)
    stages.measured(ours, tokens, settings)
    release.block_jacobian(*release.block_calls(baseline, tokens)[0])
    our_runs, their_runs = [], []
    for _ in range(repeats):
        record, spent = stages.measured(ours, tokens, settings)
        our_runs.append(spent)
        their = release.run(baseline, tokens, settings.ranks, layers, known)
        spent = their.seconds | {"jacobians": their.seconds["jacobians"] * len(known) / len(layers)}
        their_runs.append(spent | {"total": sum(spent.values())})
    we, they = stages.median(our_runs), stages.median(their_runs)
    return {
        "tokens": len(tokens),
        "layers": len(known),
        "layers_differentiated_by_baseline": layers,
        "jacobians_extrapolated": len(layers) < len(known),
        "repeats": repeats,
        "ours": we,
        "release": they,
        "ratio": {stage: they[stage] / we[stage] for stage in (*STAGES, "total")},
        "methods": sorted(set(record.method)),
        "worst_certificate": float(record.certificate.max()),
        "agreement": agreement(record, known, their, settings, layers),
    }


def agreement(record, known: torch.Tensor, their: release.Release, settings: Settings, layers: list[int]) -> dict:
    """How far the two are apart, over the layers that both differentiated."""
    J, theirs = known[layers], their.J[layers]
    found = {"jacobian_relative_error": ((J - theirs).norm(dim=(1, 2)) / theirs.norm(dim=(1, 2))).max().item()}
    for index, rank in enumerate(settings.ranks):
        ours = torch.from_numpy(record.normalized_miscoupling[index]).double()[layers][:, layers]
        expected = release.normalized_miscoupling(their, rank, layers)
        found[f"normalized_miscoupling_{rank}"] = {
            "mean_ours": ours.mean().item(),
            "mean_release": expected.mean().item(),
            "mean_difference": (ours - expected).mean().abs().item(),
            "largest_difference": (ours - expected).abs().max().item(),
        }
        for order, name in (("ujv", "miscoupling_to_absolute"), ("vju", "miscoupling_to_absolute_vju")):
            ours = torch.from_numpy(getattr(record, name)[index]).double()[layers][:, layers]
            expected = torch.tensor(their.scores[order][rank], dtype=torch.float64)[layers][:, layers, 0]
            found[f"absolute_{order}_{rank}"] = {"mean_difference": (ours - expected).mean().abs().item()}
    return found


def spread(layers: int, wanted: int | None) -> list[int]:
    """So many layer indices, evenly from first to last."""
    count = layers if wanted is None else min(wanted, layers)
    return [round(i * (layers - 1) / max(1, count - 1)) for i in range(count)]


def rows(results: list[dict]) -> list[dict]:
    return [
        {
            "tokens": f"{found['tokens']}",
            "stage": stage,
            "release, s": found["release"][stage],
            "ours, s": found["ours"][stage],
            "ratio": found["ratio"][stage],
            "": "from some layers" if found["jacobians_extrapolated"] and stage in ("jacobians", "total") else "",
        }
        for found in results
        for stage in (*STAGES, "total")
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = machine.parser(__doc__, "against_release")
    parser.add_argument("--model", required=True, help="transformers folder, or llama-3-8b for random weights of its shape")
    parser.add_argument("--tokens", type=int, nargs="+", default=[10, 128], help="lengths of the prompts")
    parser.add_argument("--ranks", type=int, nargs="+", default=[10, 30, 50])
    parser.add_argument("--layers", type=int, help="differentiated by the baseline (default all; 3 with --quick)")
    parser.add_argument("--repeats", type=int, help="default 3; 1 with --quick")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of the weights; the arithmetic is float32 in both")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    layers = options.layers or (3 if options.quick else None)
    about = machine.describe(options.device, options.dtype)
    model, tokenizer = models.load(options.model, getattr(torch, options.dtype), options.device)
    baseline = model if model.dtype == torch.float32 else copy.deepcopy(model).float()
    ours = ResidualModel.wrap(model)
    settings = Settings(tuple(options.ranks))
    results = []
    for tokens in options.tokens:
        prompt = models.prompt(tokens, model.config.get_text_config().vocab_size, tokenizer)
        repeats = options.repeats or (1 if options.quick else 3)
        results.append(compare(ours, baseline, prompt, settings, spread(ours.n_layers, layers), repeats))
    machine.save("against_release", about, options, results)
    machine.show(f"Against the release's procedure: {options.model}", rows(results))
    for found in results:
        rank = settings.ranks[0]
        same = found["agreement"][f"normalized_miscoupling_{rank}"]
        print(
            f"{found['tokens']} tokens, K = {rank}: mean normalised miscoupling {same['mean_ours']:.5f}, "
            f"release's procedure {same['mean_release']:.5f}; Jacobians differ by "
            f"{found['agreement']['jacobian_relative_error']:.1e}, certificate {found['worst_certificate']:.1e}"
        )


if __name__ == "__main__":
    main()
