r"""Make one model worse by degrees: does coupling follow the score if only the weights change?

    python analysis/controlled_family.py --model DIR --out FAMILY --blend 0.05 0.1 0.2 \
        --bits 8 6 4 3 --run arc_easy --limit 200 --coupling-limit 100 --output-path RESULTS
    lm-eval-coupling fit RESULTS --facts FAMILY/facts.csv

Members are ordinary transformers folders in FAMILY. ``blend-s`` has the weights (1 − s)·W + s·R,
where R is a fresh initialization with every tensor scaled to the norm of W. ``bits-b`` has the
matrices of its linear layers rounded to b bits, symmetrically per output channel. What exists is
not made or evaluated again. Without --out, only the loss on a short text is printed.
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
    "When water is heated in a pan, small bubbles of steam form at the bottom and rise to the "
    "surface. The boiling point of water depends on the pressure of the air: on a high mountain it "
    "boils at a lower temperature, so that an egg needs more time until it is done. Anna did not "
    "know this. She had grown up by the sea, and her first breakfast in the hut was a "
    "disappointment. “The eggs are still raw,” she said, and put them back into the pot."
)


def blend(weight: Tensor, random: Tensor, strength: float) -> Tensor:
    """Return ``(1 − s)·W + s·R``, R scaled to the Frobenius norm of W; a zero R stays zero."""
    scale = weight.norm() / random.norm() if random.norm() > 0 else 0.0
    return (1 - strength) * weight + strength * scale * random


def round_to_bits(weight: Tensor, bits: int, channel: int = 0) -> Tensor:
    """Round to the nearest of 2^b − 1 even steps around zero that span each output channel."""
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
    """Yield the facts of each member and the function that makes it."""
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
    """Return nats per token of TEXT."""
    tokens = tokenizer(TEXT, return_tensors="pt").input_ids
    return float(model(tokens, labels=tokens).loss)


def make(options: argparse.Namespace) -> list[dict]:
    """Write the missing members, and ``family.json`` and ``facts.csv`` beside them."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    except (OSError, ValueError) as error:
        sys.exit(
            f"got {options.model}, which transformers cannot load ({why(error)}); give a folder "
            "with its tokenizer"
        )
    made = read_members(options)
    for facts, make_member in members(model, options):
        name = facts["name"]
        if name in made:
            continue
        member = make_member()
        facts["loss"] = round(loss(member, tokenizer), 4)
        print(f"{name:<12} loss {facts['loss']:.3f}", flush=True)
        if options.out:
            member.save_pretrained(options.out / name)
            tokenizer.save_pretrained(options.out / name)
            made[name] = facts
            write_facts(options, [*made.values()])  # each time, so that a stopped run can go on
    return [*made.values()]


def read_members(options: argparse.Namespace) -> dict[str, dict]:
    """Return the facts of the members in FAMILY, by name."""
    if not options.out or not (file := options.out / "family.json").exists():
        return {}
    family = json.loads(file.read_text())
    if (family["model"], family["seed"]) != (options.model.name, options.seed):
        sys.exit(
            f"got {options.out}, made from {family['model']} with seed {family['seed']}; choose "
            "another folder"
        )
    return {member["name"]: member for member in family["members"]}


def write_facts(options: argparse.Namespace, made: list[dict]) -> None:
    """Write ``family.json`` and ``facts.csv``."""
    family = {"model": options.model.name, "seed": options.seed, "members": made}
    (options.out / "family.json").write_text(json.dumps(family, indent=1) + "\n")
    with (options.out / "facts.csv").open("w", newline="") as file:
        rows = csv.DictWriter(file, ["model", "family", "kind", "strength", "loss"])
        rows.writeheader()
        rows.writerows(
            {"model": m["name"], "family": options.model.name}
            | {key: m[key] for key in ("kind", "strength", "loss")}
            for m in made
        )


def evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--run", metavar="TASKS", help="evaluate every model on these, separated by commas")
    add("--limit", type=int, metavar="N", help="documents scored per task")
    add("--coupling-limit", default="100", metavar="N", help="documents measured per task (100)")
    add("--batch-size", default=1, metavar="B")
    add("--output-path", type=Path, default=Path("results"), metavar="RESULTS")


def evaluate_all(members: list[str], options: argparse.Namespace) -> None:
    """Run lm-eval on these models in the folder ``options.out``, if tasks were given."""
    if options.run and (failed := [name for name in members if not evaluate(name, options)]):
        sys.exit(f"no results of {', '.join(failed)}; the same command tries them again")


def evaluate(member: str, options: argparse.Namespace) -> bool:
    """Run lm-eval on one member unless it has results; return whether it has results then."""
    out = options.output_path / member
    if any(is_same_run(json.loads(f.read_text()), options) for f in out.rglob("results_*.json")):
        print(f"{member}: has results", flush=True)
        return True
    model_args = f"pretrained={options.out / member},coupling_limit={options.coupling_limit}"
    command = [sys.executable, "-m", "lm_eval_coupling.cli", "run", "--model", "coupling-hf"]
    command += ["--model_args", model_args, "--tasks", options.run, "--log_samples"]
    command += ["--batch_size", str(options.batch_size), "--output_path", str(out)]
    command += ["--limit", str(options.limit)] if options.limit else []
    print(f"{member}: {options.run}", flush=True)
    return subprocess.run(command, check=False).returncode == 0


def is_same_run(results: dict, options: argparse.Namespace) -> bool:
    """Return whether saved results have these tasks and this number of documents."""
    return (
        set(options.run.split(",")) <= set(results["results"])
        and results["config"]["limit"] == options.limit
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    help_model = "transformers folder, with its tokenizer"
    add("--model", type=Path, required=True, metavar="DIR", help=help_model)
    add("--out", type=Path, metavar="FAMILY", help="folder of the members")
    add("--blend", type=float, nargs="*", default=[], metavar="S", help="strengths between 0 and 1")
    add("--bits", type=int, nargs="*", default=[], metavar="B", help="2 or more")
    add("--seed", type=int, default=0, help="seed of the random weights")
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
