r"""Does "Let's think step by step." change coupling? The same documents in two tasks, paired (zero-shot chain of thought).

lm_eval --model coupling-hf … --tasks gsm8k,gsm8k_cot_zeroshot --num_fewshot 0 --output_path OUT
python analysis/chain_of_thought.py OUT --first gsm8k --second gsm8k_cot_zeroshot --out figures
"""

from __future__ import annotations

import command
from coupling_analysis import by_document
from coupling_analysis import study_tables as tables
from coupling_analysis.missing_documents import alone, left_out
from coupling_analysis.study_figures import paired_differences

from lm_eval_coupling.measures.registry import readings


def main(argv=None):
    parser = command.arguments(__doc__)
    parser.add_argument(
        "--first", default="gsm8k", metavar="T", help="task without it (%(default)s)"
    )
    parser.add_argument(
        "--second", default="gsm8k_cot_zeroshot", metavar="T", help="task with it (%(default)s)"
    )
    options = parser.parse_args(argv)
    names = options.first, options.second
    regularity = ["line_shape_score", "expodistance"]
    records = tables.read(options.runs, names, measures=["coupling", *regularity])
    rank = tables.choose_rank(records, options.rank)
    whole = ["coupling", *tables.recorded(records, regularity)]
    values = tables.long(records, [*whole, "layer_coupling"], rank)
    pairs = by_document.paired(values, *names)
    means = tables.named(by_document.mean_differences(pairs), rank)
    pairs = tables.named(pairs, rank)
    figure = paired_differences(
        pairs[pairs["measure"].isin(whole)],
        means[means["measure"] == "layer_coupling"],
        names=names,
        chance={readings()["coupling"].label: readings()["coupling"].chance_at(rank)},
        title=f"The same documents in {names[0]} and {names[1]}, K = {rank}",
    )
    name = command.of_tasks("chain_of_thought", records, names)
    command.save(
        options.out, name, figure, means, [*left_out(records, whole), *alone(values, *names)]
    )
    command.save_table(options.out, f"{name}_documents", pairs)
    columns = ["line", "weights", "measure", "difference", "low", "high", "positive", "n"]
    print(means.loc[means["measure"].isin(whole), columns].to_string(index=False))


if __name__ == "__main__":
    command.run(main)
