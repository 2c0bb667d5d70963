r"""Lower or raise coupling in training: does it change what a model learns?

    python analysis/intervention.py TEXT [TEXT …] --out INTERVENTION

A Llama of 4 blocks is trained from scratch with ``strength * coupling_penalty`` added to its loss:
every form of the penalty at every strength, and one control without it, for every seed. All members
of a seed have the same first weights and the same batches. INTERVENTION/members.jsonl gets a line
for each member as soon as it is trained; a stopped command goes on with the next. effects.csv and
effects.png show differences from the control of the same seed, with 95 % t-intervals over seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import command
import numpy as np
import pandas as pd
import torch
from kept_rows import KeptRows
from paired_seeds import paired_differences
from small_training import (
    fresh_model,
    fresh_optimizer,
    read_windows,
    recipe_of,
    training_arguments,
    update,
)
from tqdm import tqdm

from lm_eval_coupling.figures.scatter import intervals
from lm_eval_coupling.measures.registry import readings
from lm_eval_coupling.measuring.prompt import measure_coupling
from lm_eval_coupling.residual import ResidualModel
from lm_eval_coupling.training import coupling_penalty

SIZES = {
    "layers": 4,
    "width": 64,
    "heads": 4,
    "mlp": 192,
    "context": 64,
    "vocabulary": 512,
    "windows": 16,
    "steps": 600,
    "rank": 10,
    "prompts": 16,
    "seeds": 5,
}
RECIPE = ("column", *SIZES, "rate")
KEPT_OUT = 64  # windows
CONTROL = "none"
FORMS = ("rotated", "raw")
MEASURES = ("depth", "controls", "without_identity")
READ = ("coupling", "rotated", "deflated", "without_identity", "one_pair", "erasing")
OUTCOMES = ("loss", "loss_kept_out", *READ, "skipped_block", "noise")
NOISE = 0.1  # Standard deviation of noise on the embeddings, relative to theirs.


def members(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield form, strength and seed of every member, seed by seed."""
    for seed in range(options.seeds):
        yield {"form": CONTROL, "strength": 0.0, "seed": seed}
        for form in FORMS:
            for strength in options.strengths:
                yield {"form": form, "strength": strength, "seed": seed}


def train(member: dict[str, Any], windows, tokenizer, options) -> tuple[Any, float]:
    """Return the trained model and the mean loss of its last tenth of steps."""
    options = argparse.Namespace(**vars(options) | {"seed": member["seed"]})
    model = fresh_model(tokenizer, options).train()
    draws = torch.Generator().manual_seed(member["seed"])
    batches = torch.randint(len(windows), (options.steps, options.windows), generator=draws)
    optimizer = fresh_optimizer(model, options.rate)
    losses = []
    for step, batch in enumerate(tqdm(batches, desc=name_of(member), unit="step", leave=False)):
        loss = model(windows[batch], labels=windows[batch]).loss
        losses.append(loss.item())
        if member["strength"]:
            loss = loss + member["strength"] * coupling_penalty(
                model, windows[batch], rank=options.rank, form=member["form"], seed=step
            )
        update(model, optimizer, loss, rate=options.rate, step=step, last=options.steps)
    return model.eval(), float(np.mean(losses[-max(1, options.steps // 10) :]))


@torch.no_grad()
def outcomes(model, kept_out: torch.Tensor, options: argparse.Namespace) -> dict[str, float]:
    """Measure kept-out loss, coupling and its controls, and what damage costs."""
    loss = model(kept_out, labels=kept_out).loss.item()
    skipped = []
    for block in model.model.layers:
        handle = block.register_forward_hook(lambda module, args, output: args[0])
        skipped.append(model(kept_out, labels=kept_out).loss.item())
        handle.remove()
    embedded = model.get_input_embeddings()(kept_out)
    noise = torch.randn(embedded.shape, generator=torch.Generator().manual_seed(0))
    noisy = model(
        inputs_embeds=embedded + NOISE * embedded.std() * noise, labels=kept_out
    ).loss.item()
    records = measure_coupling(
        ResidualModel.wrap(model),
        kept_out[: options.prompts].tolist(),
        ranks=options.rank,
        measures=MEASURES,
        progress=False,
    )
    values = {
        name: float(np.nanmean([readings()[name].read(record, options.rank) for record in records]))
        for name in READ
    }
    return values | {
        "loss_kept_out": loss,
        "skipped_block": float(np.mean(skipped)) - loss,
        "noise": noisy - loss,
    }


def name_of(member: dict[str, Any]) -> str:
    if member["form"] == CONTROL:
        return CONTROL
    return f"{member['form']} {member['strength']:+g}"


def effects(rows: pd.DataFrame) -> pd.DataFrame:
    """Return differences from the control of the same seed, with 95 % t-intervals over seeds."""
    members = [name_of(row) for row in rows.to_dict("records")]
    return paired_differences(rows.assign(member=members), CONTROL, OUTCOMES)


def run(options: argparse.Namespace) -> pd.DataFrame:
    """Train and measure the missing members; return one row for each member."""
    recipe = recipe_of(options, [name for name in RECIPE if name != "seeds"])
    kept = KeptRows(options.out, "members.jsonl", recipe)
    rows = {(row["form"], row["strength"], row["seed"]): row for row in kept.rows}
    tokenizer, kept_out, windows = read_windows(options, KEPT_OUT)
    for member in members(options):
        if tuple(member.values()) in rows:
            continue
        model, loss = train(member, windows, tokenizer, options)
        row = member | {"loss": loss} | outcomes(model, kept_out, options)
        rows[tuple(member.values())] = row
        kept.add([row])
        print(
            f"seed {member['seed']}, {name_of(member)}: kept-out loss {row['loss_kept_out']:.3f}, "
            f"coupling@{options.rank} {row['coupling']:.3f}, rotated {row['rotated']:.3f}",
            flush=True,
        )
    return pd.DataFrame([rows[tuple(member.values())] for member in members(options)])


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    training_arguments(parser, SIZES, metavar="INTERVENTION", out="folder of the results")
    help_strengths = "factors of the penalty; a positive one lowers coupling (%(default)s)"
    parser.add_argument(
        "--strengths", type=float, nargs="+", default=[-1.0, 1.0], metavar="S", help=help_strengths
    )
    options = parser.parse_args(argv)
    if 0 in options.strengths:
        parser.error("got a strength of 0, which is the control; expected others")
    table = effects(run(options))
    command.print_table(table, float_format="%.4f")
    drawn = table.rename(columns={"difference": "value", "member": "kind"})
    drawn["label"] = drawn["outcome"] + ", " + drawn["kind"]
    figure = intervals(drawn, x_label="difference from the control", chance=0.0)
    notes = [f"Means over {options.seeds} seeds with 95 % t-intervals, K = {options.rank}"]
    command.save(options.out, "effects", figure, table, notes)


if __name__ == "__main__":
    command.run(main)
