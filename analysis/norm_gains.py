r"""Does coupling come from the gains of the norms? (No figure of the paper.)

    python analysis/norm_gains.py OUT MODEL [MODEL …] --prompts 20 --out figures

Prompts of each model among the saved records in OUT are measured three times: with the gains as
trained; folded into the weights that follow, which leaves every block's function as it was; and
made equal in every coordinate, which makes another model, whose loss is told.
"""

from __future__ import annotations

from pathlib import Path

import command
import pandas as pd
import torch
from coupling_analysis import selection, study_tables
from coupling_analysis.line_figures import quartile_bars
from coupling_analysis.norm_gains import KINDS, change_gains
from coupling_analysis.prompt_matrices import load_causal_lm

from lm_eval_coupling import ResidualModel, measure_coupling
from lm_eval_coupling.measures.formulas.headline import chance_coupling

PRINTED = ["model", "gains", "measure", "mean", "stderr", "median", "n"]


def main(argv=None):
    parser = command.build_parser(__doc__, runs=False)
    add = parser.add_argument
    add("runs", type=Path, metavar="OUT", help="folder that lm-eval wrote, for its prompts")
    add("models", nargs="+", metavar="MODEL", help="folders or names for transformers")
    add("--prompts", type=int, default=20, metavar="N", help="the first N distinct prompts (20)")
    add("--rank", type=int, default=10, metavar="K", help="number of singular vectors (10)")
    options = parser.parse_args(argv)
    every = study_tables.read([options.runs], columns=["tokens"])
    rows = []
    for name in options.models:
        records = selection.select_model(every, name)
        prompts = list(dict.fromkeys(records["tokens"]))[: options.prompts]
        for kind in KINDS:
            rows += [
                {"model": records["model"].iloc[0], "gains": kind, "prompt": number} | values
                for number, values in enumerate(measured(name, kind, prompts, options.rank))
            ]
    table = pd.DataFrame(rows)
    summary = summarize(table, options.rank)
    title = f"Gains of norms, K = {options.rank}: median and quartiles over prompts"
    command.save(options.out, "norm_gains", quartile_bars(summary, title=title), table)
    command.print_table(summary[PRINTED])


def summarize(table, rank):
    """Return the quartiles over prompts, ready to be drawn: a panel for each model and measure."""
    values = table.melt(["model", "gains"], ["coupling", "loss"], "measure")
    summary = study_tables.summarize(values, ["model", "measure", "gains"])
    names = summary["measure"].map({"coupling": "coupling", "loss": "loss, nats"})
    return summary.sort_values(["model", "measure"], kind="stable").assign(
        line=summary["gains"],
        panel=summary["model"] + "\n" + names,
        chance=summary["measure"].map({"coupling": chance_coupling(rank)}),
        weights="trained",
    )


def measured(name, kind, prompts, rank):
    """Yield coupling and loss of each prompt, by a model with such gains."""
    hf_model, tokenizer = load_causal_lm(name, dtype="float32")
    change_gains(hf_model, kind)
    model = ResidualModel.wrap(hf_model, tokenizer)
    records = measure_coupling(model, prompts, ranks=[rank], measures=("depth",))
    for tokens, record in zip(prompts, records, strict=True):
        ids = torch.tensor([tokens])
        with torch.no_grad():
            loss = hf_model(ids, labels=ids).loss.item()
        yield {"coupling": record.coupling(rank), "loss": loss}


if __name__ == "__main__":
    command.run(main)
