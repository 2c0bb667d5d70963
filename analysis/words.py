r"""What do the coupled directions say, and how long do they keep their words from layer to layer?

    python analysis/words.py MODEL [MODEL …] --prompt "The capital of France is" --out figures
    python analysis/words.py MODEL --results OUT --task arc_easy --doc 3 7 --out figures

Needs the models, transformers folders or names: saved records hold no singular vectors. words.csv
has the vocabulary nearest to W_U·norm(u) and to its opposite, for every prompt, layer and top left
singular vector u. words_kept.csv and the picture have the share of a direction's words that a later
layer's most similar direction has, beside that of random directions.

With --results, the prompts are those that a run measured of these documents, and
`lm-eval-coupling report OUT --words figures/words.csv` shows the words with the documents.
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
from coupling_analysis import prompt_matrices, selection, study_tables
from coupling_analysis.direction_words import DirectionWords, chance_kept, direction_words
from coupling_analysis.line_figures import curves
from coupling_matrices import PROMPT

from lm_eval_coupling.errors import CouplingError, resolve_token
from lm_eval_coupling.saved.names import labels
from lm_eval_coupling.saved.words import tokens_hash

DOCUMENT = ("task", "doc_id", "doc_hash", "prompt_hash")
PRINTED = ["layer", "sign", "life", "words"]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Token ids, the position to decode at, a name, and the document, whose fields may be empty."""

    tokens: tuple[int, ...]
    position: int
    name: str
    document: dict[str, Any]

    @property
    def columns(self) -> dict[str, Any]:
        """Columns of the prompt's rows."""
        return self.document | {"tokens_hash": tokens_hash(self.tokens), "position": self.position}


def encode_texts(model: Any, texts: Sequence[str], token: int) -> list[Prompt]:
    """Encode texts that belong to no document."""
    encoded = [(text, tuple(model.encode(text))) for text in texts]
    empty = dict.fromkeys(DOCUMENT, "")
    return [Prompt(ids, resolve_token(token, len(ids)), text, empty) for text, ids in encoded]


def read_prompts(model: Any, results: Path, task: str, docs: Sequence[int]) -> list[Prompt]:
    """Read the prompts that a run measured of these documents, with these very weights.

    Raises:
        CouplingError: if the run measured other weights, or no such document.
    """
    records = study_tables.read([results], [task], weights="trained", columns=["tokens"])
    own = records[records["fingerprint"] == model.fingerprint]
    if own.empty:
        names = records["model"] + " (" + records["fingerprint"].fillna("unknown") + ")"
        raise CouplingError(
            f"got weights of the fingerprint {model.fingerprint}, expected those that {results} "
            f"measured: {', '.join(sorted(set(names)))}; give that model, with --dtype as the run "
            "loaded it"
        )
    rows = pd.concat([selection.select_document(own, doc) for doc in docs])
    return [
        Prompt(
            row["tokens"],
            row["position"],
            f"{row['task']}, document {row['doc_id']}",
            {key: row[key] for key in DOCUMENT},
        )
        for row in rows.to_dict("records")
    ]


def word_rows(words: DirectionWords, tokenizer) -> pd.DataFrame:
    """Return one row per layer, direction and sign, counted from 1.

    ``kept_next`` is the share of words that the next layer keeps, ``life`` the number of layers in
    a row that keep half of them.
    """
    layers = len(words.ids)
    kept_next = np.full(words.ids.shape[:3], np.nan)
    kept_next[:-1] = words.kept[np.arange(layers - 1), np.arange(1, layers)]
    layer, k, sign = (index.ravel() for index in np.indices(words.ids.shape[:3]))
    texts = [
        " ".join(repr(tokenizer.decode([i])) for i in ids)
        for ids in words.ids.reshape(len(layer), -1).tolist()
    ]
    return pd.DataFrame(
        {
            "layer": layer + 1,
            "k": k + 1,
            "sign": np.array(["+", "-"])[sign],
            "singular_value": words.singular_values[layer, k],
            "kept_next": kept_next.ravel(),
            "life": words.life.ravel(),
            "layers_after": layers - 1 - layer,
            "words": texts,
        }
    )


def kept_by_distance(words: DirectionWords) -> pd.DataFrame:
    """Return the mean share of words kept, one row per layer and distance to a later layer."""
    layers = len(words.kept)
    share = words.kept.mean(axis=(2, 3))
    parts = [
        pd.DataFrame({"distance": d, "value": np.diagonal(share, offset=d)})
        for d in range(1, layers)
    ]
    return pd.concat(parts, ignore_index=True)


def study(name: str, label: str, options: argparse.Namespace) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the words of one model's directions, and the shares kept by distance."""
    model = prompt_matrices.load_model(name, options.untrained, options.dtype)
    size = {"rank": options.rank, "words": options.words}
    if options.results is None:
        token = -1 if options.token is None else options.token
        prompts = encode_texts(model, options.prompt or [PROMPT], token)
    else:
        prompts = read_prompts(model, options.results, options.task, options.doc)
    decoded = [
        direction_words(model, prompt.tokens, position=prompt.position, **size)
        for prompt in prompts
    ]
    run = {
        "model": label,
        "weights": "trained" if options.untrained is None else "untrained",
        "fingerprint": model.fingerprint,
    }
    parts = [
        word_rows(words, model.tokenizer).assign(
            prompt=number, prompt_name=prompt.name, **prompt.columns
        )
        for number, (prompt, words) in enumerate(zip(prompts, decoded, strict=True), start=1)
    ]
    kept = pd.concat(map(kept_by_distance, decoded)).assign(**run)
    summary = study_tables.summarize(kept, [*run, "distance"])
    rows = pd.concat(parts, ignore_index=True).assign(**run)
    return rows, summary.assign(chance=chance_kept(model, **size))


def main(argv: list[str] | None = None) -> None:
    """Decode, draw, save, and print the first words of the first direction of every layer."""
    options = parse_options(argv)
    names = labels(options.models)
    studies = [study(name, names[name], options) for name in options.models]
    words, kept = map(pd.concat, zip(*studies, strict=True))
    kept["line"] = kept["model"]
    kept["panel"] = kept["line"] + f": share of {options.words} words kept"
    title = f"Words of the top {options.rank} directions: median, quartiles over layers"
    figure = curves(kept, x="distance", x_label="layers later", columns=2, title=title)
    command.save_table(options.out, "words", words.drop(columns="prompt_name"))
    command.save(options.out, "words_kept", figure, kept.drop(columns=["line", "panel"]))
    first = words[(words["k"] == 1) & (words["prompt"] == 1)]
    for model, of in first.groupby("model", sort=False):
        command.say(f"{model}: {of['prompt_name'].iloc[0]}")
        command.print_table(of[PRINTED], max_colwidth=90)


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        CouplingError: if the prompts are given in two ways, or by half of one.
    """
    parser = command.build_parser(__doc__, runs=False)
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="folders or names for transformers")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", nargs="+", metavar="TEXT", help=f"(default: {PROMPT})")
    help_results = "a run's folder, for its prompts of --task and --doc"
    source.add_argument("--results", type=Path, metavar="OUT", help=help_results)
    add("--task", metavar="T", help="task of --results")
    add("--doc", type=int, nargs="+", metavar="N", help="documents of --results, by their doc_id")
    add("--rank", type=int, default=10, metavar="K", help="singular vectors of each layer (10)")
    add("--words", type=int, default=10, metavar="N", help="words of each side (10)")
    help_token = "position to decode at; negative counts from the end (-1)"
    add("--token", type=int, metavar="t", help=help_token)
    add("--untrained", type=int, metavar="SEED", help="draw fresh weights with this seed")
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    add("--dtype", choices=dtypes, default="auto", help="dtype of the weights (as stored)")
    options = parser.parse_args(argv)
    of_run = {"--results": options.results, "--task": options.task, "--doc": options.doc}
    given = [name for name, value in of_run.items() if value is not None]
    if given and len(given) < len(of_run):
        lacking = next(name for name in of_run if name not in given)
        raise CouplingError(
            f"got {given[0]} without {lacking}, expected all of {', '.join(of_run)}, or --prompt"
        )
    of_texts = {"--token": options.token, "--untrained": options.untrained}
    if given and (extra := [name for name, value in of_texts.items() if value is not None]):
        raise CouplingError(
            f"got {extra[0]} with --results, whose weights and tokens are those measured; leave it "
            "out"
        )
    return options


if __name__ == "__main__":
    command.run(main)
