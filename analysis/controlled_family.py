r"""One model made worse by degrees: does coupling go the way of the score when nothing but the weights changes?

    python analysis/controlled_family.py --model DIR --out FAMILY --blend 0.05 0.1 0.2 --bits 8 6 4 3 \
        --run arc_easy --limit 200 --coupling-limit 100 --batch-size 16 --output-path RESULTS
    lm-eval-coupling fit RESULTS --facts FAMILY/facts.csv

Members are ordinary transformers folders in FAMILY. ``blend-s`` has the weights (1 − s)·W + s·R, where R is the
architecture's own initialisation with every tensor scaled to the size of W; ``bits-b`` has the matrices of its linear
layers rounded to b bits, symmetrically per output channel. What exists is not made or evaluated again. Without --out the
loss on a short text is printed for every strength, and nothing is written.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from lm_eval_coupling.errors import why
from lm_eval_coupling.numerics.randomness import seeded

TEXT = (
    "When water is heated in a pan, small bubbles of steam form at the bottom and rise to the surface. The boiling point "
    "of water depends on the pressure of the air: on a high mountain it boils at a lower temperature, so that an egg needs "
    "more time until it is done. Anna did not know this. She had grown up by the sea, and her first breakfast in the hut "
    "was a disappointment. “The eggs are still raw,” she said, and put them back into the pot."
)


def blend(weight: Tensor, random: Tensor, strength: float) -> Tensor:
    """``(1 − s)·W + s·R``, with R scaled to the Frobenius norm of W; what starts at zero fades out."""
    scale = weight.norm() / random.norm() if random.norm() > 0 else 0.0
    return (1 - strength) * weight + strength * scale * random


def round_to_bits(weight: Tensor, bits: int, channel: int = 0) -> Tensor:
    """The nearest of 2^b − 1 evenly spaced values around zero that span each output channel."""
    largest = (
        weight.abs().amax(dim=1 - channel, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
    )
    step = largest / (2 ** (bits - 1) - 1)
    return (weight / step).round() * step


@torch.no_grad()
def blended(model: nn.Module, strength: float, seed: int) -> nn.Module:
    with seeded(seed):
        fresh = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype)
    member = copy.deepcopy(model)
    random = dict(fresh.named_parameters())
    for name, weight in member.named_parameters():  # tied weights come once
        weight.copy_(blend(weight, random[name], strength))
    return member


@torch.no_grad()
def rounded(model: nn.Module, bits: int) -> nn.Module:
    member = copy.deepcopy(model)
    for module in member.base_model.modules():  # not the head, which is often the embedding
        if isinstance(module, (nn.Linear, Conv1D)):
            module.weight.copy_(
                round_to_bits(module.weight, bits, channel=int(isinstance(module, Conv1D)))
            )
    return member


def members(
    model: nn.Module, options: argparse.Namespace
) -> Iterator[tuple[dict, Callable[[], nn.Module]]]:
    """What each member is, and the function that makes it."""
    yield {"name": "intact", "kind": "intact", "strength": 0.0}, lambda: model
    for s in options.blend:
        yield (
            {"name": f"blend-{s:g}", "kind": "blend", "strength": s},
            lambda s=s: blended(model, s, options.seed),
        )
    for b in options.bits:
        yield {"name": f"bits-{b}", "kind": "bits", "strength": b}, lambda b=b: rounded(model, b)


@torch.no_grad()
def loss(model: nn.Module, tokenizer) -> float:
    """Nats per token of TEXT."""
    tokens = tokenizer(TEXT, return_tensors="pt").input_ids
    return float(model(tokens, labels=tokens).loss)


def make(options: argparse.Namespace) -> list[dict]:
    """Write the members that are not there, and ``family.json`` and ``facts.csv`` beside them."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    except (OSError, ValueError) as error:
        sys.exit(
            f"got {options.model}, which transformers cannot load ({why(error)}); give a folder with its tokenizer"
        )
    known = already_made(options)
    for about, maker in members(model, options):
        if about["name"] in known:
            continue
        member = maker()
        about["loss"] = round(loss(member, tokenizer), 4)
        print(f"{about['name']:<12} loss {about['loss']:.3f}", flush=True)
        if options.out:
            member.save_pretrained(options.out / about["name"])
            tokenizer.save_pretrained(options.out / about["name"])
            known[about["name"]] = about
            describe(options, [*known.values()])
    return [*known.values()]


def already_made(options: argparse.Namespace) -> dict[str, dict]:
    """The members in FAMILY by name."""
    if not options.out or not (file := options.out / "family.json").exists():
        return {}
    about = json.loads(file.read_text())
    if (about["model"], about["seed"]) != (options.model.name, options.seed):
        sys.exit(
            f"got {options.out}, made from {about['model']} with seed {about['seed']}; choose another folder"
        )
    return {member["name"]: member for member in about["members"]}


def describe(options: argparse.Namespace, made: list[dict]) -> None:
    """After every member, so that a stopped run goes on from there."""
    about = {"model": options.model.name, "seed": options.seed, "members": made}
    (options.out / "family.json").write_text(json.dumps(about, indent=1) + "\n")
    with (options.out / "facts.csv").open("w", newline="") as file:
        rows = csv.DictWriter(file, ["model", "family", "kind", "strength", "loss"])
        rows.writeheader()
        rows.writerows(
            {"model": m["name"], "family": options.model.name}
            | {key: m[key] for key in ("kind", "strength", "loss")}
            for m in made
        )


def evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run", metavar="TASKS", help="evaluate every model on these, separated by commas"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="documents scored per task")
    parser.add_argument(
        "--coupling-limit", default="100", metavar="N", help="documents measured per task"
    )
    parser.add_argument("--batch-size", default=1, metavar="B")
    parser.add_argument("--output-path", type=Path, default=Path("results"), metavar="RESULTS")


def evaluate_all(members: list[str], options: argparse.Namespace) -> None:
    """Run lm-eval on these models in the folder ``options.out``, if there are tasks."""
    if options.run and (failed := [name for name in members if not evaluate(name, options)]):
        sys.exit(f"no results of {', '.join(failed)}; the same command tries them again")


def evaluate(member: str, options: argparse.Namespace) -> bool:
    """Run lm-eval on one member, unless its results are there; whether they are there then."""
    out = options.output_path / member
    if any(
        is_the_same(json.loads(file.read_text()), options) for file in out.rglob("results_*.json")
    ):
        print(f"{member}: results are there", flush=True)
        return True
    arguments = f"pretrained={options.out / member},coupling_limit={options.coupling_limit}"
    command = [
        sys.executable,
        "-m",
        "lm_eval_coupling.cli",
        "run",
        "--model",
        "coupling-hf",
        "--model_args",
        arguments,
    ]
    command += [
        "--tasks",
        options.run,
        "--batch_size",
        str(options.batch_size),
        "--output_path",
        str(out),
        "--log_samples",
    ]
    print(f"{member}: {options.run}", flush=True)
    command += ["--limit", str(options.limit)] if options.limit else []
    return subprocess.run(command, check=False).returncode == 0


def is_the_same(results: dict, options: argparse.Namespace) -> bool:
    """Whether saved results are of these tasks and this many documents."""
    return (
        set(options.run.split(",")) <= set(results["results"])
        and results["config"]["limit"] == options.limit
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="DIR",
        help="transformers folder, with its tokenizer",
    )
    parser.add_argument("--out", type=Path, metavar="FAMILY", help="folder of the members")
    parser.add_argument(
        "--blend", type=float, nargs="*", default=[], metavar="S", help="strengths between 0 and 1"
    )
    parser.add_argument("--bits", type=int, nargs="*", default=[], metavar="B", help="2 or more")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    evaluation_arguments(parser)
    options = parser.parse_args()
    if not all(0 <= s <= 1 for s in options.blend) or not all(b >= 2 for b in options.bits):
        parser.error("expected strengths between 0 and 1, and 2 bits or more")
    if options.run and not options.out:
        parser.error("--run needs --out: lm-eval reads the members from there")
    made = [member["name"] for member in make(options)]
    evaluate_all(made, options)


if __name__ == "__main__":
    main()
