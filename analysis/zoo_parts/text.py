"""Text of the zoo: tokenizer, corpus as tokens, kept-out documents, and spoiled text."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from small_training import END, learn_tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from zoo_parts.recipes import Recipe

from lm_eval_coupling.errors import CouplingError, why

VOCABULARY = 4096
CONTEXT = 128
BYTES = 480  # of a kept-out document at most, about one context
SUBSET_SEED = 20_000  # one order of the corpus, so that smaller shares are part of larger ones


def prepare(corpus: Path, blimp: Path, data: Path) -> None:
    """Write what training and evaluation need into the folder ``data``, unless it exists.

    Args:
        corpus: folder with train.parquet and validation.parquet, each with a column ``text``.
        blimp: folder with one folder of Parquet for each paradigm of BLiMP.
        data: gets the tokenizer, tokens.npz (uint16), kept_out.jsonl and nyu-mll/blimp.

    Raises:
        CouplingError: if the corpus cannot be read.
    """
    if (data / "tokens.npz").exists():
        return
    try:
        train, validation = (
            pd.read_parquet(corpus / f"{part}.parquet")["text"].tolist()
            for part in ("train", "validation")
        )
    except (OSError, KeyError) as error:
        raise CouplingError(
            f"got {corpus}, expected train.parquet and validation.parquet with a column text: "
            f"{why(error)}"
        ) from None
    data.mkdir(parents=True, exist_ok=True)
    documents = dict.fromkeys(filter(None, map(opening, validation)))
    (data / "kept_out.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in documents)
    )
    shutil.copytree(blimp, data / "nyu-mll" / "blimp", dirs_exist_ok=True)
    tokenizer = learn_tokenizer(train, VOCABULARY)
    tokenizer.save_pretrained(data / "tokenizer")
    tokens = [
        token for ids in tokenizer(train).input_ids for token in (*ids, tokenizer.eos_token_id)
    ]
    unfinished = data / "unfinished.npz"
    np.savez_compressed(unfinished, tokens=np.array(tokens, dtype=np.uint16))
    unfinished.rename(data / "tokens.npz")
    print(
        f"{data}: {len(tokens):,} tokens of text, {len(documents)} kept-out documents", flush=True
    )


def opening(text: str, size: int = BYTES) -> str:
    """Return the sentences at the start of a text that fit into ``size`` bytes, or ""."""
    if len(text.encode()) <= size:
        return text.strip()
    start = text.encode()[:size].decode(errors="ignore")
    ends = [match.end() for match in re.finditer(r"[.!?][\"')]*(?=\s)", start)]
    return start[: ends[-1]].strip() if ends else ""


def windows_of(recipe: Recipe, data: Path, most: int) -> Tensor:
    """Return the windows that a member reads, spoiled as its recipe says: Int[window CONTEXT].

    They are the recipe's share of the ``most`` windows that it has time for.
    """
    tokens = torch.from_numpy(np.load(data / "tokens.npz")["tokens"].astype(np.int64))
    windows = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(SUBSET_SEED))
    windows = windows[order[: max(1, round(recipe.text * min(most, len(windows))))]]
    draws = torch.Generator().manual_seed(recipe.seed)
    if recipe.shuffled:
        chosen = torch.rand(len(windows), generator=draws) < recipe.shuffled
        windows[chosen] = with_shuffled_words(windows[chosen], word_starts(data), draws)
    if recipe.noise:
        noisy = torch.rand(windows.shape, generator=draws) < recipe.noise
        windows[noisy] = torch.randint(VOCABULARY, (int(noisy.sum()),), generator=draws)
    return windows


def word_starts(data: Path) -> Tensor:
    """Mark the tokens that begin a word, a line or a document: Bool[vocabulary]."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(data / "tokenizer")
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return torch.tensor([piece.startswith(("Ġ", "Ċ", END)) for piece in pieces])


def with_shuffled_words(windows: Tensor, starts: Tensor, draws: torch.Generator) -> Tensor:
    """Put the words of each window in random order; the tokens of a word stay together.

    Args:
        windows: Int[window token].
        starts: Bool[vocabulary], from :func:`word_starts`.
        draws: decides the order.
    """
    word = starts[windows].long().cumsum(dim=1)
    keys = torch.rand(word.shape[0], word.shape[1] + 1, generator=draws).gather(1, word)
    return windows.gather(1, keys.argsort(dim=1, stable=True))
