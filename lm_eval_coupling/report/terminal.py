"""A saved run in the terminal: coupling per task, its profile over layers, one document's matrix."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.saved.tables import find_tables, load_records

# Viridis, dark where layers are coupled.
_COLOURS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
_PROMPT_TAIL = 400
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # prompts are other people's text: keep the terminal safe


def show(folder: Path | str, task: str | None = None, doc: int | None = None, console: Console | None = None) -> None:
    """Print what a run measured.

    Args:
        folder: folder that lm-eval wrote, searched recursively, or one coupling table.
        task: only this task, with the mean miscoupling of every layer.
        doc: with ``task``, also the layer-by-layer matrix of the document with this ``doc_id``.
        console: where to print; stdout by default.

    Raises:
        CouplingError: if nothing was saved there, or no such task or document; the message names what there is.
    """
    console = console or Console()
    if doc is not None and task is None:
        raise CouplingError(f"got document {doc} without a task; add the task's name (--task)")
    runs = _runs(folder)
    if task is not None:
        _require(task, {name for tasks in runs.values() for name in tasks}, "task", str(folder))
        runs = {run: {task: tasks[task]} for run, tasks in runs.items() if task in tasks}
    if doc is not None:
        there = {found for tasks in runs.values() for found in tasks[task].rows["doc_id"]}
        _require(doc, there, "document", f"task {task}")
    for tasks in runs.values():
        console.print(_overview(tasks))
        if task is not None and doc is None:
            console.print(_profile(tasks[task]))
        if doc is not None:
            _print_document(console, tasks[task], doc)


@dataclass(frozen=True)
class _Saved:
    """One table."""

    task: str
    rows: pd.DataFrame
    about: dict[str, Any]

    @property
    def ranks(self) -> tuple[int, ...]:
        return self.rows["ranks"].iloc[0]

    @property
    def headline(self) -> int:
        rank = self.about.get("headline_rank")
        return rank if rank in self.ranks else min(self.ranks)

    def chance(self, rank: int) -> float:
        """Coupling of unrelated layers: 1 − √(1 − 1/K)."""
        return 1 - float(self.about.get("chance", {}).get(str(rank), math.sqrt(1 - 1 / rank)))


def _runs(folder: Path | str) -> dict[Any, dict[str, _Saved]]:
    """Tables by folder and model, then by task: runs in different folders are never added up."""
    runs: dict[Any, dict[str, _Saved]] = {}
    for file, about in find_tables(folder):
        run = (file.parent, str(about.get("model")), str(about.get("revision")))
        runs.setdefault(run, {})[about["task"]] = _Saved(about["task"], load_records(file), about)
    return {run: dict(sorted(tasks.items())) for run, tasks in runs.items()}


def _require(wanted: Any, there: set[Any], what: str, where: str) -> None:
    known = sorted(there)
    if wanted not in known:
        listed = ", ".join(map(str, known[:30])) + (f" and {len(known) - 30} more" if len(known) > 30 else "")
        raise CouplingError(f"got {what} {wanted}, which {where} does not have; choose one of {listed}")


def _overview(tasks: dict[str, _Saved]) -> Table:
    about = next(iter(tasks.values())).about
    size = f"{about['n_layers']} layers of width {about['d_model']}, " if "n_layers" in about else ""
    title = f"{about.get('model')} ({size}coupling = 1 − mean miscoupling of different layers, ↑; worst error: certificate)"
    table = Table(title=escape(title), title_justify="left")
    table.add_column("task", overflow="fold", ratio=2)
    table.add_column("docs", justify="right", no_wrap=True)
    table.add_column("K", justify="right", no_wrap=True)
    table.add_column("coupling", justify="right", no_wrap=True)
    table.add_column("chance", justify="right", no_wrap=True)
    table.add_column("excess", justify="right", no_wrap=True)
    table.add_column("worst error", justify="right", no_wrap=True)
    table.add_column("missing", overflow="fold", ratio=2)
    for name, saved in tasks.items():
        for rank in saved.ranks:
            mean, error, n = coupling_of_documents(saved.rows, rank)
            chance, first = saved.chance(rank), rank == saved.ranks[0]
            table.add_row(
                escape(name) if first else "",
                str(n),
                str(rank),
                _with_error(mean, error),
                f"{chance:.4f}",
                "–" if math.isnan(mean) else f"{mean - chance:+.4f}",
                _worst_certificate(saved.rows) if first else "",
                escape(_failures(saved.rows)) if first else "",
                end_section=rank == saved.ranks[-1],
            )
    return table


def _with_error(mean: float, error: float) -> str:
    if math.isnan(mean):
        return "–"
    return f"{mean:.4f}" if math.isnan(error) else f"{mean:.4f} ± {error:.4f}"


def coupling_of_documents(rows: pd.DataFrame, rank: int) -> tuple[float, float, int]:
    """Mean coupling of the documents in ``rows``, its standard error and their number, as lm-eval's table has it."""
    values = rows.assign(value=[_coupling(row, rank) for _, row in rows.iterrows()])
    documents = values.groupby(["doc_hash", "prompt_hash"])["value"].mean().dropna()
    n = len(documents)
    return documents.mean() if n else math.nan, documents.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan, n


def _coupling(row: pd.Series, rank: int) -> float:
    matrix = _matrix(row, rank)
    return math.nan if matrix is None else 1 - _mean(matrix[~np.eye(len(matrix), dtype=bool)])


def _matrix(row: pd.Series, rank: int) -> np.ndarray | None:
    if row["normalized_miscoupling"] is None or rank not in row["ranks"]:
        return None
    return row["normalized_miscoupling"][row["ranks"].index(rank)]


def _mean(values: np.ndarray) -> float:
    """Mean of what is defined; NaN, without a warning, if nothing is."""
    known = values[~np.isnan(values)].astype(np.float64)
    return float(known.mean()) if known.size else math.nan


def _worst_certificate(rows: pd.DataFrame) -> str:
    worst = [np.nanmax(c) for c in rows["certificate"] if c is not None and not np.isnan(c).all()]
    return f"{max(worst):.1e}" if worst else "–"


def _failures(rows: pd.DataFrame) -> str:
    missing = rows[[m is None for m in rows["normalized_miscoupling"]]]
    reasons = Counter(reason or "not asked for" for reason in missing["reason"])
    return "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common()) or "–"


def _profile(saved: _Saved) -> Table:
    """Mean miscoupling of every layer's Jacobian with the bases of the others, over all measured prompts."""
    rank = saved.headline
    matrices = [m for m in (_matrix(row, rank) for _, row in saved.rows.iterrows()) if m is not None]
    table = Table(title=escape(f"{saved.task}: mean miscoupling per layer, K = {rank}"), title_justify="left")
    table.add_column("layer", justify="right")
    table.add_column("its Jacobian, others' bases", justify="right")
    table.add_column("its basis, others' Jacobians", justify="right")
    table.add_column("")
    if not matrices:
        return table
    layers = len(matrices[0])
    pairs = np.stack([np.where(np.eye(layers, dtype=bool), np.nan, m) for m in matrices])
    for layer in range(layers):
        own, others = _mean(pairs[:, layer, :]), _mean(pairs[:, :, layer])
        bar = "" if math.isnan(own) else "█" * round(40 * own)
        table.add_row(str(layer + 1), f"{own:.4f}", f"{others:.4f}", Text(bar, style=_colour(own)))
    return table


def _print_document(console: Console, saved: _Saved, doc: int) -> None:
    for _, row in saved.rows[saved.rows["doc_id"] == doc].iterrows():
        _print_prompt(console, row, saved)


def _print_prompt(console: Console, row: pd.Series, saved: _Saved) -> None:
    rank = saved.headline
    text = row["text"] if len(row["text"]) <= _PROMPT_TAIL else "…" + row["text"][-_PROMPT_TAIL:]
    where = f"token {row['position']} of {row['n_tokens']}"
    console.print(f"[bold]Document {row['doc_id']}, {escape(row['kind'])} {row['prompt_index']}[/bold], measured at {where}")
    console.print(Text(_CONTROL.sub("�", text), style="italic"))
    if row["reason"]:
        console.print(Text(f"Note: {row['reason']}"))
    matrix = _matrix(row, rank)
    if matrix is None:
        console.print("No layer-by-layer matrix was measured.")
        return
    console.print(
        f"\nMiscoupling in hundredths (cut off), K = {rank}; row = layer of the Jacobian, column = layer of the bases"
        f"; coupling {_coupling(row, rank):.4f}, chance {saved.chance(rank):.4f}"
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
            line.append(_cell(float(value)), style=_cell_style((float(value) - low) / max(high - low, 1e-6)))
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
    if math.isnan(value):
        return "default"
    place = min(max(value, 0.0), 1.0) * (len(_COLOURS) - 1)
    low = min(int(place), len(_COLOURS) - 2)
    share = place - low
    mixed = [round(a + (b - a) * share) for a, b in zip(_COLOURS[low], _COLOURS[low + 1], strict=True)]
    return f"rgb({mixed[0]},{mixed[1]},{mixed[2]})"
