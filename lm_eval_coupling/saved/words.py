"""Words of coupled directions: the file that ``analysis/words.py`` writes of measured prompts."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.saved.csv_file import CsvFile, read_csv, to_number

# The same weights, document, prompt, tokens and measured token; others have other directions.
KEY = ("fingerprint", "doc_hash", "prompt_hash", "tokens_hash", "position")
_COLUMNS = (*KEY, "layer", "k", "sign", "singular_value", "words")


def tokens_hash(tokens: Iterable[int]) -> str:
    """Digest a prompt's token ids to 16 hex digits."""
    return hashlib.sha256(",".join(map(str, tokens)).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class SavedWords:
    """The words of the measured prompts in ``file``, by the values of ``KEY``, position from 0."""

    file: Path
    directions: Mapping[tuple[Any, ...], list[dict[str, Any]]]

    def of(self, fingerprint: str | None, row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        """Return the words of one row of a run's table, by layer and direction, or None.

        Args:
            fingerprint: of the weights that the run measured.
            row: with ``doc_hash, prompt_hash, tokens, position``.

        Returns:
            Dicts of ``layer`` and ``k`` (from 1), ``sigma``, ``words`` and ``opposite`` (None where
            the file has one side).
        """
        tokens = row.get("tokens")
        if tokens is None:
            return None
        digest = tokens_hash(tokens)
        key = (fingerprint, row["doc_hash"], row["prompt_hash"], digest, row["position"])
        return self.directions.get(key)


def read_words(file: Path | str) -> SavedWords:
    """Read a file of words; rows of prompts that belong to no document are left out.

    Returns:
        The words by prompt, in the order of layers and directions.

    Raises:
        CouplingError: if it is missing, has cells of a wrong type, or says two things of one
            direction.
    """
    table = read_csv(file, _COLUMNS, "words, which analysis/words.py writes")
    prompts: dict[tuple[Any, ...], dict[tuple[int, int], dict[str, Any]]] = {}
    for position, row in enumerate(table.rows):
        if not row["doc_hash"]:
            continue
        place, layer, k = (_whole(table, position, name) for name in ("position", "layer", "k"))
        sigma = to_number(row["singular_value"])
        if sigma is None or math.isnan(sigma):
            table.refuse(position, "singular_value", "a number")
        if row["sign"] not in ("+", "-"):
            table.refuse(position, "sign", "+ or -")
        directions = prompts.setdefault((*(row[name] for name in KEY[:-1]), place), {})
        unknown = {"layer": layer, "k": k, "sigma": sigma, "words": None, "opposite": None}
        direction = directions.setdefault((layer, k), unknown)
        side = "words" if row["sign"] == "+" else "opposite"
        if direction[side] not in (None, row["words"]) or direction["sigma"] != sigma:
            raise CouplingError(
                f"got {table.file} with layer {layer}, direction {k} of document {row['doc_hash']} "
                "more than once, expected each once; make it anew"
            )
        direction[side] = row["words"]
    ordered = {key: [own[at] for at in sorted(own)] for key, own in prompts.items()}
    return SavedWords(table.file, ordered)


def _whole(table: CsvFile, position: int, column: str) -> int:
    cell = table.rows[position][column]
    if not (cell.isascii() and cell.isdecimal() and len(cell) < 10):
        table.refuse(position, column, "a whole number")
    return int(cell)
