"""A file of words, as ``analysis/words.py`` writes it: what the coupled directions of measured prompts say."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from lm_eval_coupling.errors import CouplingError, shown, why

# The same weights, document, prompt, tokens and measured token: anything else has other directions.
KEY = ("fingerprint", "doc_hash", "prompt_hash", "tokens_hash", "position")
_WHOLE = ("position", "layer", "k")
_COLUMNS = (*KEY, "layer", "k", "sign", "singular_value", "words")


def tokens_hash(tokens: Iterable[int]) -> str:
    """16 hex digits of a prompt's token ids."""
    return hashlib.sha256(",".join(map(str, tokens)).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class SavedWords:
    """The words of the measured prompts in ``file``, by the values of ``KEY``, the position from 0."""

    file: Path
    directions: Mapping[tuple[Any, ...], list[dict[str, Any]]]

    def of(self, fingerprint: str | None, row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        """Those of one row of a run's table, by layer and direction; None where there are none.

        Args:
            fingerprint: of the weights that the run measured.
            row: with ``doc_hash, prompt_hash, tokens, position``.

        Returns:
            Dicts of ``layer`` and ``k`` (from 1), ``sigma``, ``words`` and ``opposite`` (None where the file has one side).
        """
        tokens = row.get("tokens")
        if tokens is None:
            return None
        key = (
            fingerprint,
            row["doc_hash"],
            row["prompt_hash"],
            tokens_hash(tokens),
            row["position"],
        )
        return self.directions.get(key)


def read_words(file: Path | str) -> SavedWords:
    """Read a file of words; rows of prompts that belong to no document are left out.

    Returns:
        The words by prompt, in the order of layers and directions.

    Raises:
        CouplingError: if it is missing, no such file, or says two things of one direction.
    """
    file = Path(file)
    try:
        rows = pd.read_csv(file, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise CouplingError(
            f"got {file} for words, which is no readable CSV file ({why(error)}); give the words.csv of analysis/words.py"
        ) from None
    if lacking := [name for name in _COLUMNS if name not in rows]:
        raise CouplingError(
            f"got {file} without the column {lacking[0]}, expected the words.csv that analysis/words.py writes; make it anew"
        )
    rows = rows[list(_COLUMNS)]
    for name in _WHOLE:
        _require(file, name, rows[name], rows[name].str.fullmatch(r"[0-9]{1,9}"), "a whole number")
    sigma = pd.to_numeric(rows["singular_value"], errors="coerce")
    _require(file, "singular_value", rows["singular_value"], sigma.notna(), "a number")
    _require(file, "sign", rows["sign"], rows["sign"].isin(["+", "-"]), "+ or -")
    rows = rows.astype(dict.fromkeys(_WHOLE, int)).assign(singular_value=sigma)
    rows = rows[rows["doc_hash"] != ""].drop_duplicates()
    direction = [*KEY, "layer", "k", "sign"]
    if (twice := rows.duplicated(direction)).any():
        first = rows[twice].iloc[0]
        raise CouplingError(
            f"got {file} with layer {first['layer']}, direction {first['k']} of document {first['doc_hash']} more than "
            "once, expected each once; make it anew"
        )
    return SavedWords(file, _by_prompt(rows.sort_values(["layer", "k"], kind="stable")))


def _require(file: Path, name: str, values: pd.Series, good: pd.Series, expected: str) -> None:
    if not good.all():
        raise CouplingError(
            f"got {file} with {shown(values[~good].iloc[0])} in the column {name}, expected {expected}"
        )


def _by_prompt(rows: pd.DataFrame) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    found: dict[tuple[Any, ...], dict[tuple[int, int], dict[str, Any]]] = {}
    for row in rows.to_dict("records"):
        about = {
            "layer": row["layer"],
            "k": row["k"],
            "sigma": row["singular_value"],
            "words": None,
            "opposite": None,
        }
        directions = found.setdefault(tuple(row[name] for name in KEY), {})
        one = directions.setdefault((row["layer"], row["k"]), about)
        one["words" if row["sign"] == "+" else "opposite"] = row["words"]
    return {key: list(directions.values()) for key, directions in found.items()}
