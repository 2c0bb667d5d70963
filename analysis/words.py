r"""What do the coupled directions say, and how long do they keep their words from layer to layer?

    python analysis/words.py MODEL [MODEL …] --prompt "What is the capital of France? The capital is" --out figures
    python analysis/words.py MODEL --results OUT --task arc_easy --doc 3 7 --out figures

Needs the models, transformers folders or names: records hold no singular vectors. words.csv has, for every prompt, layer and
top left singular vector, the vocabulary nearest to W_U·norm(u) and to its opposite; words_kept.csv and the picture have the
share of a direction's words that the most similar direction so many layers later has, and the same of random directions.
With --results, prompts are those that a run measured of these documents, read at the measured token, and
`lm-eval-coupling report OUT --words figures/words.csv` shows their words with the documents.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import command
import numpy as np
import pandas as pd
from coupling_analysis import prompt_matrices as matrices
from coupling_analysis import study_tables as tables
from coupling_analysis.direction_words import DirectionWords, chance_kept, direction_words
from coupling_analysis.line_figures import curves
from coupling_matrices import PROMPT

from lm_eval_coupling.errors import CouplingError, resolve_token
from lm_eval_coupling.saved.names import labels
from lm_eval_coupling.saved.words import tokens_hash

_DOCUMENT = ("task", "doc_id", "doc_hash", "prompt_hash")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Tokens, the one that is read (from 0), a name to print, and of which document it is, empty for a text."""

    tokens: tuple[int, ...]
    position: int
    name: str
    document: dict[str, Any]

    @property
    def about(self) -> dict[str, Any]:
        """The columns of its rows."""
        return self.document | {"tokens_hash": tokens_hash(self.tokens), "position": self.position}


def of_texts(model: Any, texts: Sequence[str], token: int) -> list[Prompt]:
    """Texts, of no document."""
    encoded = [(text, tuple(model.encode(text))) for text in texts]
    empty = dict.fromkeys(_DOCUMENT, "")
    return [Prompt(ids, resolve_token(token, len(ids)), text, empty) for text, ids in encoded]


def of_run(model: Any, results: Path, task: str, docs: Sequence[int]) -> list[Prompt]:
    """What a run measured of these documents, if it was of these very weights."""
    records = tables.read([results], [task], weights="trained", columns=["tokens"])
    own = records[records["fingerprint"] == model.fingerprint]
    if own.empty:
        others = ", ".join(
            sorted(set(records["model"] + " (" + records["fingerprint"].fillna("unknown") + ")"))
        )
        raise CouplingError(
            f"got weights of the fingerprint {model.fingerprint}, expected those that {results} measured: {others}; give "
            "that model, with --dtype as the run loaded it"
        )
    found = []
    for row in pd.concat([tables.of_document(own, doc) for doc in docs]).to_dict("records"):
        document = {key: row[key] for key in _DOCUMENT}
        found.append(
            Prompt(
                row["tokens"], row["position"], f"{row['task']}, document {row['doc_id']}", document
            )
        )
    return found


def table(found: DirectionWords, tokenizer) -> pd.DataFrame:
    """One row per layer, direction and sign, all counted from 1: its words, how many the next layer keeps, its life."""
    layers = len(found.ids)
    following = np.full(found.ids.shape[:3], np.nan)
    following[:-1] = found.kept[np.arange(layers - 1), np.arange(1, layers)]
    layer, k, sign = (index.ravel() for index in np.indices(found.ids.shape[:3]))
    words = [
        " ".join(repr(tokenizer.decode([i])) for i in ids)
        for ids in found.ids.reshape(len(layer), -1).tolist()
    ]
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
    parts = [
        pd.DataFrame({"distance": d, "value": np.diagonal(share, offset=d)})
        for d in range(1, layers)
    ]
    return pd.concat(parts, ignore_index=True)


def study(name: str, label: str, options: argparse.Namespace) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The words of one model's directions, and how they are kept with distance."""
    model = matrices.load_model(name, options.untrained, options.dtype)
    size = {"rank": options.rank, "words": options.words}
    if options.results is None:
        token = -1 if options.token is None else options.token
        asked = of_texts(model, options.prompt or [PROMPT], token)
    else:
        asked = of_run(model, options.results, options.task, options.doc)
    found = [
        direction_words(model, prompt.tokens, position=prompt.position, **size) for prompt in asked
    ]
    about = {"model": label, "weights": "trained" if options.untrained is None else "untrained"}
    about |= {"fingerprint": model.fingerprint}
    words = pd.concat(
        [
            table(one, model.tokenizer).assign(
                prompt=i + 1, prompt_name=prompt.name, **prompt.about
            )
            for i, (prompt, one) in enumerate(zip(asked, found, strict=True))
        ],
        ignore_index=True,
    )
    kept = tables.summary(pd.concat(map(by_distance, found)).assign(**about), [*about, "distance"])
    return words.assign(**about), kept.assign(chance=chance_kept(model, **size))


def main(argv: list[str] | None = None) -> None:
    """Decode, draw, save, and print the first words of the first direction of every layer."""
    parser = command.arguments(__doc__, runs=False)
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="folders or names for transformers"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--prompt", nargs="+", metavar="TEXT", help=f"one or more (default: {PROMPT})"
    )
    source.add_argument(
        "--results",
        type=Path,
        metavar="OUT",
        help="a run's folder: its prompts of --task and --doc",
    )
    parser.add_argument("--task", metavar="T", help="of --results")
    parser.add_argument(
        "--doc",
        type=int,
        nargs="+",
        metavar="N",
        help="documents of --results, by lm-eval's numbers",
    )
    parser.add_argument(
        "--rank",
        type=int,
        default=10,
        metavar="K",
        help="singular vectors of a layer (%(default)s)",
    )
    parser.add_argument(
        "--words",
        type=int,
        default=10,
        metavar="N",
        help="of each side of a direction (%(default)s)",
    )
    parser.add_argument(
        "--token", type=int, metavar="t", help="negative: from the end (-1, or the measured one)"
    )
    parser.add_argument("--untrained", type=int, metavar="SEED", help="with fresh weights instead")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="of the weights (as stored)",
    )
    options = parser.parse_args(argv)
    _require_one_source(options)
    names = labels(options.models)
    words, kept = map(
        pd.concat, zip(*(study(name, names[name], options) for name in options.models), strict=True)
    )
    kept["line"] = kept["model"]
    kept["panel"] = kept["line"] + f": share of {options.words} words kept"
    title = f"Words of the top {options.rank} directions: median, quartiles over layers"
    figure = curves(kept, x="distance", x_label="layers later", columns=2, title=title)
    command.save_table(options.out, "words", words.drop(columns="prompt_name"))
    command.save(options.out, "words_kept", figure, kept.drop(columns=["line", "panel"]))
    first = words[(words["k"] == 1) & (words["prompt"] == 1)]
    for model, of in first.groupby("model", sort=False):
        print(f"\n{model}: {of['prompt_name'].iloc[0]}")
        print(of[["layer", "sign", "life", "words"]].to_string(index=False, max_colwidth=90))


def _require_one_source(options: argparse.Namespace) -> None:
    """A run's prompts, its documents' and its weights' and tokens, or texts."""
    of_run = {"--results": options.results, "--task": options.task, "--doc": options.doc}
    given = [name for name, value in of_run.items() if value is not None]
    if given and len(given) < len(of_run):
        lacking = next(name for name in of_run if name not in given)
        raise CouplingError(
            f"got {given[0]} without {lacking}, expected all of {', '.join(of_run)}, or --prompt"
        )
    own = {"--token": options.token, "--untrained": options.untrained}
    if given and (extra := [name for name, value in own.items() if value is not None]):
        raise CouplingError(
            f"got {extra[0]} with --results, whose weights and tokens are those measured; leave it out"
        )


if __name__ == "__main__":
    command.run(main)
