r"""What do the coupled directions say, and how long do they keep their words from layer to layer?

    python analysis/words.py MODEL [MODEL …] --prompt "What is the capital of France? The capital is" --out figures

Needs the models, transformers folders or names: records hold no singular vectors. words.csv has, for every prompt, layer and
top left singular vector, the vocabulary nearest to W_U·norm(u) and to its opposite; words_kept.csv and the picture have the
share of a direction's words that the most similar direction so many layers later has, and the same of random directions.
"""

from __future__ import annotations

import argparse

import command
import numpy as np
import pandas as pd
from coupling_matrices import PROMPT

from lm_eval_coupling.figures.lines import curves
from lm_eval_coupling.measuring import matrices
from lm_eval_coupling.measuring.direction_words import DirectionWords, chance_kept, direction_words
from lm_eval_coupling.saved.names import labels
from lm_eval_coupling.studies import tables


def table(found: DirectionWords, tokenizer) -> pd.DataFrame:
    """One row per layer, direction and sign, all counted from 1: its words, how many the next layer keeps, its life."""
    layers = len(found.ids)
    following = np.full(found.ids.shape[:3], np.nan)
    following[:-1] = found.kept[np.arange(layers - 1), np.arange(1, layers)]
    layer, k, sign = (index.ravel() for index in np.indices(found.ids.shape[:3]))
    words = [" ".join(repr(tokenizer.decode([i])) for i in ids) for ids in found.ids.reshape(len(layer), -1).tolist()]
    return pd.DataFrame(
        {
            "layer": layer + 1,
            "k": k + 1,
            "sign": np.array(["+", "-"])[sign],
            "singular_value": found.singular_values[layer, k],
            "kept_next": following.ravel(),
            "life": found.life.ravel(),
            "layers_after": layers - 1 - layer,
            "words": words,
        }
    )


def by_distance(found: DirectionWords) -> pd.DataFrame:
    """One row per layer and later layer: ``distance`` between them, and the share of words kept, mean over directions."""
    layers = len(found.kept)
    share = found.kept.mean(axis=(2, 3))
    parts = [pd.DataFrame({"distance": d, "value": np.diagonal(share, offset=d)}) for d in range(1, layers)]
    return pd.concat(parts, ignore_index=True)


def study(name: str, options: argparse.Namespace) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The words of one model's directions, and how they are kept with distance."""
    model = matrices.load(name, options.untrained)
    size = {"rank": options.rank, "words": options.words}
    found = [direction_words(model, model.encode(text), position=options.token, **size) for text in options.prompt]
    about = {"model": name, "weights": "trained" if options.untrained is None else "untrained"}
    words = pd.concat([table(one, model.tokenizer).assign(prompt=i + 1) for i, one in enumerate(found)], ignore_index=True)
    kept = tables.summary(pd.concat(map(by_distance, found)).assign(**about), [*about, "distance"])
    return words.assign(**about), kept.assign(chance=chance_kept(model, **size))


def main(argv: list[str] | None = None) -> None:
    """Decode, draw, save, and print the first words of the first direction of every layer."""
    parser = command.arguments(__doc__, runs=False)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folders or names for transformers")
    parser.add_argument("--prompt", nargs="+", default=[PROMPT], metavar="TEXT", help="one or more")
    parser.add_argument("--rank", type=int, default=10, metavar="K", help="singular vectors of a layer (%(default)s)")
    parser.add_argument("--words", type=int, default=10, metavar="N", help="of each side of a direction (%(default)s)")
    parser.add_argument("--token", type=int, default=-1, metavar="t", help="negative: from the end (%(default)s)")
    parser.add_argument("--untrained", type=int, metavar="SEED", help="with fresh weights instead")
    options = parser.parse_args(argv)
    words, kept = map(pd.concat, zip(*(study(name, options) for name in options.models), strict=True))
    names = labels(kept["model"].unique())
    kept["line"] = kept["model"].map(names)
    kept["panel"] = kept["line"] + f": share of {options.words} words kept"
    title = f"Words of the top {options.rank} directions: median, quartiles over layers"
    figure = curves(kept, x="distance", x_label="layers later", columns=2, title=title)
    command.save_table(options.out, "words", words)
    command.save(options.out, "words_kept", figure, kept.drop(columns=["line", "panel"]))
    first = words[(words["k"] == 1) & (words["prompt"] == 1)]
    for model, of in first.groupby("model", sort=False):
        print(f"\n{names[model]}: {options.prompt[0]}")
        print(of[["layer", "sign", "life", "words"]].to_string(index=False, max_colwidth=90))


if __name__ == "__main__":
    command.run(main)
