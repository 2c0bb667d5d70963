r"""Train small models from scratch: which parts of coupling rise, peak and fall?

    python analysis/training_parts.py TEXT [TEXT …] --out TRAINING

A Llama of 8 blocks is trained with several seeds, which decide its first weights and the order of
the text. At every --steps the kept-out loss is taken, and coupling, its controls and the regularity
of trajectories are measured at the last token of the same kept-out prompts.
TRAINING/prompts.jsonl gets the rows of a seed when it is trained; a stopped command goes on with
the next seed. parts.csv and parts.png have medians and quartiles over prompts, by step and seed.
spearman.csv has, for every seed and reading, Spearman's correlation with less loss over the steps.
"""

from __future__ import annotations

import argparse
from typing import Any

import command
import pandas as pd
import torch
from coupling_analysis.line_figures import curves
from coupling_analysis.study_tables import summarize
from kept_rows import KeptRows
from scipy import stats
from small_training import (
    SIZES,
    check_steps,
    fresh_model,
    fresh_optimizer,
    read_windows,
    recipe_of,
    training_arguments,
    update,
)
from tqdm import tqdm

from lm_eval_coupling.measures.registry import readings
from lm_eval_coupling.measuring.prompt import measure_coupling
from lm_eval_coupling.residual import ResidualModel

MEASURED = SIZES | {"rank": 10, "prompts": 20, "seeds": 3}
STEPS = [0, 10, 20, 40, 80, 160, 320, 640, 1280]
RECIPE = ("column", "steps", *(name for name in MEASURED if name != "seeds"), "rate")
KEPT_OUT = 64  # windows
MEASURES = ("depth", "controls", "without_identity", "regularity", "geometry")
READ = (
    "coupling",
    "rotated",
    "deflated",
    "without_identity",
    "one_pair",
    "erasing",
    "mean_stable_rank",
    "line_shape_score",
    "expodistance",
)


def train(seed: int, windows, kept_out, tokenizer, options) -> list[dict[str, Any]]:
    """Return one row for each prompt at each of the steps."""
    options = argparse.Namespace(**vars(options) | {"seed": seed})
    model, last = fresh_model(tokenizer, options).train(), max(options.steps)
    draws = torch.Generator().manual_seed(seed)
    batches = torch.randint(len(windows), (last, options.windows), generator=draws)
    optimizer = fresh_optimizer(model, options.rate)
    rows = []
    for step in tqdm(range(last + 1), desc=f"seed {seed}", unit="step"):
        if step in options.steps:
            tokens = step * options.windows * options.context
            at_step = {"seed": seed, "step": step, "tokens": tokens}
            rows += [at_step | values for values in measure(model.eval(), kept_out, options)]
            model.train()
        if step == last:
            break
        batch = windows[batches[step]]
        loss = model(batch, labels=batch).loss
        update(model, optimizer, loss, rate=options.rate, step=step, last=last)
    return rows


def measure(model, kept_out: torch.Tensor, options: argparse.Namespace) -> list[dict[str, float]]:
    """Return the kept-out loss and all readings, a row for each prompt."""
    with torch.no_grad():
        loss = model(kept_out, labels=kept_out).loss.item()
    records = measure_coupling(
        ResidualModel.wrap(model),
        kept_out[: options.prompts].tolist(),
        ranks=options.rank,
        measures=MEASURES,
        progress=False,
    )
    return [
        {"prompt": index, "loss": loss}
        | {name: float(readings()[name].read(record, options.rank)) for name in READ}
        for index, record in enumerate(records)
    ]


def correlate_with_loss(rows: pd.DataFrame) -> pd.DataFrame:
    """Return, for every seed and reading, Spearman's correlation with less loss, and its extremes.

    The untrained model at step 0 is left out: it is at chance, as no later one is.
    """
    means = rows[rows["step"] > 0].groupby(["seed", "step"])[["loss", *READ]].mean()
    table = []
    for seed, of in means.groupby("seed"):
        of = of.droplevel("seed")
        for name in READ:
            r = stats.spearmanr(of[name], -of["loss"]).statistic
            table.append(
                {"seed": seed, "reading": name, "spearman": r, "steps": len(of)}
                | {"first": of[name].iloc[0], "last": of[name].iloc[-1]}
                | {"highest": of[name].max(), "highest_at": of[name].idxmax()}
            )
    return pd.DataFrame(table)


def quartiles(rows: pd.DataFrame, rank: int) -> pd.DataFrame:
    """Return medians and quartiles over prompts, a row for each seed, step and reading."""
    long = rows.melt(["seed", "step", "tokens", "prompt"], ["loss", *READ], "reading")
    table = summarize(long, ["reading", "seed", "step", "tokens"])
    chance = {name: readings()[name].chance_at(rank) for name in READ}
    labels = {name: readings()[name].label for name in READ} | {"loss": "kept-out loss, nats"}
    return table.assign(
        panel=table["reading"].map(labels),
        chance=table["reading"].map(chance),
        line="seed " + table["seed"].astype(str),
        weights="trained",
    )


def run(options: argparse.Namespace) -> pd.DataFrame:
    """Train and measure the missing seeds; return the rows of all of them."""
    recipe = recipe_of(options, RECIPE)
    kept = KeptRows(options.out, "prompts.jsonl", recipe)
    tokenizer, kept_out, windows = read_windows(options, KEPT_OUT)
    needed = len(set(options.steps)) * min(options.prompts, len(kept_out))
    rows = pd.DataFrame(kept.rows, columns=["seed", "step", "tokens", "prompt", "loss", *READ])
    # A stop in the middle of writing leaves some rows of a seed, which is trained again.
    complete = rows.drop_duplicates(["seed", "step", "prompt"]).groupby("seed").size().eq(needed)
    for seed in range(options.seeds):
        if not complete.get(seed, default=False):
            kept.add(train(seed, windows, kept_out, tokenizer, options))
    rows = pd.DataFrame(kept.rows).drop_duplicates(["seed", "step", "prompt"], keep="last")
    return rows[rows["seed"] < options.seeds].sort_values(["seed", "step", "prompt"])


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    training_arguments(parser, MEASURED, metavar="TRAINING", out="folder of the results")
    help_steps = "steps to measure at"
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS, metavar="N", help=help_steps)
    options = parser.parse_args(argv)
    check_steps(parser, options.steps)
    rows = run(options)
    spearman = correlate_with_loss(rows)
    command.save_table(options.out, "spearman", spearman.round(6))
    command.print_table(spearman.pivot(index="reading", columns="seed", values="spearman").round(2))
    table = quartiles(rows, options.rank)
    title = f"Along {options.seeds} trainings, K = {options.rank}: medians and quartiles"
    figure = curves(table, x="step", x_label="step", log_x=True, columns=3, title=title)
    command.save(options.out, "parts", figure, table)


if __name__ == "__main__":
    command.run(main)
