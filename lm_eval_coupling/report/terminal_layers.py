"""Layers in the terminal: a task's profile over them, and one document's matrix."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lm_eval_coupling.figures.palette import on_scale
from lm_eval_coupling.measures.formulas.headline import chance_coupling, coupling_of, headline_rank
from lm_eval_coupling.saved.saved_run import SavedTable

_PROMPT_TAIL = 400
_CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)  # prompts are other people's text: keep the terminal safe


def print_profile(console: Console, table: SavedTable, name: str) -> None:
    """Mean miscoupling of every layer's Jacobian with the bases of the others, over all measured prompts."""
    rank: int | None = None
    total: Any = 0.0
    count: Any = 0
    for rows in table.batches(["ranks", "normalized_miscoupling"]):
        for ranks, matrices in zip(rows["ranks"], rows["normalized_miscoupling"], strict=True):
            rank = rank or headline_rank(ranks)
            if matrices is not None and rank in ranks:
                pairs = np.where(
                    np.eye(matrices.shape[-1], dtype=bool),
                    np.nan,
                    matrices[list(ranks).index(rank)],
                )
                total, count = (
                    total + np.nan_to_num(pairs.astype(np.float64)),
                    count + np.isfinite(pairs),
                )
    console.print(Text(f"{name}: mean miscoupling per layer, K = {rank}", style="bold"))
    console.print(
        "its Jacobian in the others' bases, and the others' Jacobians in its basis", style="dim"
    )
    shown = Table(box=None, pad_edge=False)
    for header in ("layer", "its Jacobian", "its basis"):
        shown.add_column(header, justify="right")
    shown.add_column("")
    if np.any(count):
        own, others = (_ratio(np.sum(total, axis), np.sum(count, axis)) for axis in (1, 0))
        low, high = np.nanmin(own), np.nanmax(own)
        shown.columns[3].header = f"bars from {low:.3f} to {high:.3f}"
        for layer, (a, b) in enumerate(zip(own, others, strict=True)):
            share = 0.0 if math.isnan(a) else (a - low) / max(high - low, 1e-6)
            bar = "" if math.isnan(a) else "█" * max(1, round(min(60, console.width - 34) * share))
            shown.add_row(
                str(layer + 1),
                f"{a:.4f}",
                f"{b:.4f}",
                Text(bar, style=_colour(share), no_wrap=True),
            )
    console.print(shown)


def _ratio(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def print_document(console: Console, table: SavedTable, doc: int) -> None:
    """Every measured prompt of a document: its end, what was measured of it, and its matrix."""
    wanted = [
        "doc_id",
        "kind",
        "prompt_index",
        "position",
        "n_tokens",
        "text",
        "reason",
        "ranks",
        "normalized_miscoupling",
    ]
    for rows in table.batches(wanted):
        for _, row in rows[rows["doc_id"] == doc].iterrows():
            _print_prompt(console, row, table)


def token_in_words(position: int, n_tokens: int) -> str:
    """Which token of how many, counted from 1."""
    return f"token {position + 1} of {n_tokens}"


def _print_prompt(console: Console, row: pd.Series, table: SavedTable) -> None:
    rank = headline_rank(row["ranks"])
    text = row["text"] if len(row["text"]) <= _PROMPT_TAIL else "…" + row["text"][-_PROMPT_TAIL:]
    where = token_in_words(row["position"], row["n_tokens"])
    console.print(
        f"[bold]Document {row['doc_id']}, {escape(row['kind'])} {row['prompt_index']}[/bold], measured at {where}"
    )
    console.print(Text(_CONTROL.sub("�", text), style="italic"))
    if row["reason"]:
        console.print(Text(f"Note: {row['reason']}"))
    if row["normalized_miscoupling"] is None:
        console.print("No layer-by-layer matrix was measured.")
        return
    matrix = row["normalized_miscoupling"][list(row["ranks"]).index(rank)]
    console.print(
        f"\nMiscoupling in hundredths (cut off), K = {rank}; row = layer of the Jacobian, column = layer of the bases"
        f"; coupling {coupling_of(matrix):.4f}, chance {chance_coupling(rank):.4f}"
    )
    for first in range(0, len(matrix), columns := _columns_that_fit(console.width)):
        for line in _heat_map(matrix, range(first, min(first + columns, len(matrix)))):
            console.print(line, no_wrap=True, crop=True)
        console.print()


def _columns_that_fit(width: int) -> int:
    """Three characters a cell beside four for the layer's number: 30 layers need 94."""
    return max(1, (width - 4) // 3)


def _heat_map(matrix: np.ndarray, columns: range) -> list[Text]:
    """Colours span what occurs between different layers: real matrices use only the upper part of 0 to 1."""
    known = matrix[~np.eye(len(matrix), dtype=bool) & ~np.isnan(matrix)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    header = Text("    " + "".join(f"{column + 1:>3}" for column in columns), style="dim")
    lines = [header]
    for number, values in enumerate(matrix[:, columns.start : columns.stop]):
        line = Text().append(f"{number + 1:>3} ", style="dim")
        for value in values:
            line.append(
                _cell(float(value)), style=_cell_style((float(value) - low) / max(high - low, 1e-6))
            )
        lines.append(line)
    return lines


def _cell(value: float) -> str:
    """Never three digits, which would touch their neighbours."""
    return "  ?" if math.isnan(value) else f"{min(int(100 * value), 99):>3}"


def _cell_style(value: float) -> str:
    if math.isnan(value):
        return "default on default"
    return f"{'black' if value > 0.5 else 'white'} on {_colour(value)}"


def _colour(value: float) -> str:
    return "default" if math.isnan(value) else "rgb({},{},{})".format(*on_scale(value))
