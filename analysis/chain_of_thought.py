r"""Does "Let's think step by step." change coupling? Pair the same documents of two tasks.

lm_eval --model coupling-hf … --tasks gsm8k,gsm8k_cot_zeroshot --num_fewshot 0 --output_path OUT
python analysis/chain_of_thought.py OUT --first gsm8k --second gsm8k_cot_zeroshot --out figures
"""

from __future__ import annotations

import command
from coupling_analysis import by_document, study_tables
from coupling_analysis.missing_documents import describe_missing, describe_unpaired
from coupling_analysis.study_figures import paired_differences

from lm_eval_coupling.measures.registry import readings

REGULARITY = ["line_shape_score", "expodistance"]


def main(argv=None):
    parser = command.build_parser(__doc__)
    add = parser.add_argument
    add("--first", default="gsm8k", metavar="T", help="task without it (%(default)s)")
    add("--second", default="gsm8k_cot_zeroshot", metavar="T", help="task with it (%(default)s)")
    options = parser.parse_args(argv)
    names = options.first, options.second
    records = study_tables.read(options.runs, names, measures=["coupling", *REGULARITY])
    rank = study_tables.choose_rank(records, options.rank)
    measures = ["coupling", *study_tables.recorded_measures(records, REGULARITY)]
    values = study_tables.long(records, [*measures, "layer_coupling"], rank)
    pairs = by_document.pair_documents(values, *names)
    means = study_tables.named(by_document.mean_differences(pairs), rank)
    pairs = study_tables.named(pairs, rank)
    coupling = readings()["coupling"]
    figure = paired_differences(
        pairs[pairs["measure"].isin(measures)],
        means[means["measure"] == "layer_coupling"],
        names=names,
        chance={coupling.label: coupling.chance_at(rank)},
        title=f"The same documents in {names[0]} and {names[1]}, K = {rank}",
    )
    name = command.name_study("chain_of_thought", records, names)
    notes = [*describe_missing(records, measures), *describe_unpaired(values, *names)]
    command.save(options.out, name, figure, means, notes)
    command.save_table(options.out, f"{name}_documents", pairs)
    columns = ["line", "weights", "measure", "difference", "low", "high", "positive", "n"]
    command.print_table(means.loc[means["measure"].isin(measures), columns])


if __name__ == "__main__":
    command.run(main)
