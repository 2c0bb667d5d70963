"""Layers in the terminal: a task's mean coupling per layer, and one document's matrix."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pandas as pd
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lm_eval_coupling.figures.palette import scale_color
from lm_eval_coupling.measures.formulas.headline import chance_coupling, coupling_of, headline_rank
from lm_eval_coupling.report.layer_means import LAYERS, LayerMeans
from lm_eval_coupling.safe_text import for_terminal, one_line
from lm_eval_coupling.saved.saved_table import SavedTable

_PROMPT_TAIL = 400  # characters of a prompt that are shown
_BAR = 60  # characters of the longest bar
_DOCUMENT = (
    "doc_id",
    "kind",
    "prompt_index",
    "position",
    "n_tokens",
    "text",
    "reason",
    "ranks",
    "normalized_miscoupling",
)


def print_profile(
    console: Console, table: SavedTable, name: str, *, miscoupling: bool = False
) -> None:
    """Print the mean coupling of every layer with the others, over all measured documents."""
    rank, own, others = _mean_profile(table, miscoupling)
    chance = "" if rank is None else f" (chance {_chance(rank, miscoupling):.4f})"
    title = f"{name}: mean {_quantity(miscoupling)} per layer, K = {rank}{chance}"
    console.print(Text(one_line(title), style="bold"))
    about = "its Jacobian in the others' bases, and the others' Jacobians in its basis"
    console.print(about, style="dim")
    shown = Table(box=None, pad_edge=False)
    for header in ("layer", "its Jacobian", "its basis"):
        shown.add_column(header, justify="right")
    shown.add_column("")
    low, high = (np.nanmin(own), np.nanmax(own)) if np.isfinite(own).any() else (0.0, 1.0)
    if len(own):
        shown.columns[3].header = f"bars from {low:.3f} to {high:.3f}"
    longest = min(_BAR, console.width - 34)
    for layer, (a, b) in enumerate(zip(own, others, strict=True), start=1):
        share = 0.0 if math.isnan(a) else (a - low) / max(high - low, 1e-6)
        bar = "" if math.isnan(a) else "█" * max(1, round(longest * share))
        colored = Text(bar, style=_color(share), no_wrap=True)
        values = ("–" if math.isnan(value) else f"{value:.4f}" for value in (a, b))
        shown.add_row(str(layer), *values, colored)
    console.print(shown)


def _mean_profile(
    table: SavedTable, miscoupling: bool
) -> tuple[int | None, Float[np.ndarray, " layer"], Float[np.ndarray, " layer"]]:
    """Return K and each layer's mean as Jacobian and as basis; empty if nothing was measured."""
    names = table.read(["doc_hash", "prompt_hash", "ranks"])
    every = {int(rank) for ranks in names["ranks"] for rank in ranks}
    if not every:
        return None, np.empty(0), np.empty(0)
    rank = headline_rank(sorted(every))
    means = LayerMeans([rank], Counter(zip(names["doc_hash"], names["prompt_hash"], strict=True)))
    for row in table.records(LAYERS):
        means.add(row)
    profile = means.summary(matrices=False)["profile"].get(rank)
    if profile is None:
        return rank, np.empty(0), np.empty(0)
    own, others = (np.asarray(profile[side]) for side in ("jacobian", "basis"))
    return (rank, own, others) if miscoupling else (rank, 1 - own, 1 - others)


def _quantity(miscoupling: bool) -> str:
    return "miscoupling" if miscoupling else "coupling"


def _chance(rank: int, miscoupling: bool) -> float:
    return 1 - chance_coupling(rank) if miscoupling else chance_coupling(rank)


def print_document(
    console: Console, table: SavedTable, doc: int, *, miscoupling: bool = False
) -> None:
    """Print every measured prompt of a document: its end, where it was measured, its matrix."""
    for rows in table.batches(_DOCUMENT):
        for _, row in rows[rows["doc_id"] == doc].iterrows():
            _print_prompt(console, row, miscoupling)


def describe_token(position: int, n_tokens: int) -> str:
    """Name a token, counted from 1."""
    return f"token {position + 1} of {n_tokens}"


def describe_prompt(index: int, kind: str) -> str:
    """Name a document's prompt, counted from 1."""
    return f"prompt {index + 1} ({kind})"


def _print_prompt(console: Console, row: pd.Series, miscoupling: bool) -> None:
    rank = headline_rank(row["ranks"])
    text = row["text"] if len(row["text"]) <= _PROMPT_TAIL else "…" + row["text"][-_PROMPT_TAIL:]
    prompt = one_line(describe_prompt(row["prompt_index"], row["kind"]))
    token = describe_token(row["position"], row["n_tokens"])
    title = Text(f"Document {row['doc_id']}, {prompt}", style="bold")
    console.print(title.append(f", measured at {token}", style="not bold"))
    console.print(Text(for_terminal(text), style="italic"))
    if row["reason"]:
        console.print(Text(f"Note: {one_line(row['reason'])}"))
    if row["normalized_miscoupling"] is None:
        console.print("No layer-by-layer matrix was measured.")
        return
    matrix = row["normalized_miscoupling"][list(row["ranks"]).index(rank)]
    console.print(
        f"\n{_quantity(miscoupling).capitalize()} in hundredths (cut off), K = {rank}; "
        "row = layer of the Jacobian, column = layer of the bases; "
        f"coupling {coupling_of(matrix):.4f}, chance {chance_coupling(rank):.4f}"
    )
    matrix = matrix.astype(np.float64)
    matrix = matrix if miscoupling else 1 - matrix
    for first in range(0, len(matrix), columns := _columns_that_fit(console.width)):
        for line in _heat_map(matrix, range(first, min(first + columns, len(matrix)))):
            console.print(line, no_wrap=True, crop=True)
        console.print()


def _columns_that_fit(width: int) -> int:
    """Return how many cells of three characters fit beside the four of the layer's number."""
    return max(1, (width - 4) // 3)


def _heat_map(matrix: Float[np.ndarray, "layer layer"], columns: range) -> list[Text]:
    """Return lines of colored cells; colors span the values of different layers."""
    is_pair = ~np.eye(len(matrix), dtype=bool) & ~np.isnan(matrix)
    low, high = (matrix[is_pair].min(), matrix[is_pair].max()) if is_pair.any() else (0.0, 1.0)
    lines = [Text("    " + "".join(f"{column + 1:>3}" for column in columns), style="dim")]
    for row, values in enumerate(matrix):
        line = Text().append(f"{row + 1:>3} ", style="dim")
        for column in columns:
            value = float(values[column])
            if row == column:  # 1 by definition
                line.append("  ·", style="dim")
            else:
                place = (value - low) / max(high - low, 1e-6)
                line.append(_cell(value), style=_cell_style(place))
        lines.append(line)
    return lines


def _cell(value: float) -> str:
    """Return hundredths, never of three digits, which would touch their neighbors."""
    return "  ?" if math.isnan(value) else f"{min(int(100 * value), 99):>3}"


def _cell_style(place: float) -> str:
    if math.isnan(place):
        return "default on default"
    return f"{'black' if place > 0.5 else 'white'} on {_color(place)}"


def _color(place: float) -> str:
    return "default" if math.isnan(place) else "rgb({},{},{})".format(*scale_color(place))
