"""Saved runs in the terminal: coupling per task, its profile over layers, one document's matrix."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from rich.console import Console
from rich.text import Text

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.report import overview_rows, terminal_layers
from lm_eval_coupling.report.terminal_columns import TextColumn, fit_columns
from lm_eval_coupling.saved.prompting import readable
from lm_eval_coupling.saved.records import require_tables
from lm_eval_coupling.saved.saved_run import SavedRun, SavedTable, find_runs
from lm_eval_coupling.saved.values import plain_readings

Tables = list[tuple[SavedRun, SavedTable]]
_PIPED = 250  # columns, where no terminal says how many there are


def show(
    paths: Path | str | Iterable[Path | str],
    task: str | None = None,
    doc: int | None = None,
    console: Console | None = None,
    *,
    compare: bool = False,
    form: Literal["table", "csv", "json"] = "table",
) -> None:
    """Print what runs measured.

    Args:
        paths: folders that lm-eval wrote, searched recursively, or coupling tables.
        task: only this task, with the mean miscoupling of every layer.
        doc: with ``task``, also the layer-by-layer matrix of the document with this ``doc_id``.
        console: where to print; stdout by default.
        compare: every run against the first, over the documents that both have.
        form: ``csv`` and ``json`` print the numbers of the tables for other programs.

    Raises:
        CouplingError: if nothing was saved there, or no such task or document; the message names what there is.
    """
    console = console or _stdout()
    roots = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    if doc is not None and task is None:
        raise CouplingError(f"got document {doc} without a task; add the task's name (--task)")
    runs = find_runs(roots)
    tables = sorted(
        runs.newest_tables(), key=lambda pair: _place(pair[1].file, roots)
    )  # the first folder's first
    require_tables(tables, runs, ", ".join(map(str, roots)))
    if task is not None:
        _require(task, {table.task for _, table in tables}, "task", ", ".join(map(str, roots)))
        tables = [(run, table) for run, table in tables if table.task == task]
    if doc is not None:
        there = {found for _, table in tables for found in table.read(["doc_id"])["doc_id"]}
        _require(doc, there, "document", f"task {task}")
    rows = overview_rows.comparison(tables) if compare else overview_rows.overview(tables)
    if compare and not len(rows):
        raise CouplingError(
            "got no two runs with a task in common, expected at least two; give their folders"
        )
    if form != "table":
        _print_for_programs(rows, form, console)
    elif compare:
        _print_comparison(console, rows)
    else:
        _print_runs(console, rows, tables, task, doc)


def _place(file: Path, roots: Sequence[Path]) -> int:
    """Number of the path that a file was found under."""
    real = file.resolve()
    under = (number for number, path in enumerate(roots) if path.resolve() in (real, *real.parents))
    return next(under, len(roots))


def _stdout() -> Console:
    """Tables keep their width where they are piped into a file or another program."""
    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=_PIPED if piped else None)


def _require(wanted: Any, there: set[Any], what: str, where: str) -> None:
    known = sorted(there)
    if wanted not in known:
        listed = ", ".join(map(str, known[:30])) + (
            f" and {len(known) - 30} more" if len(known) > 30 else ""
        )
        raise CouplingError(
            f"got {what} {wanted}, which {where} does not have; choose one of {listed}"
        )


def _print_for_programs(rows: pd.DataFrame, form: str, console: Console) -> None:
    if form == "csv":
        console.file.write(rows.to_csv(index=False))
        return
    plain = rows.astype(object).where(rows.notna(), None).to_dict("records")
    console.file.write(json.dumps(plain, indent=1, ensure_ascii=False, default=str) + "\n")


def _print_runs(
    console: Console, rows: pd.DataFrame, tables: Tables, task: str | None, doc: int | None
) -> None:
    several = rows.groupby("label")["folder"].nunique() > 1
    rows = rows.assign(prompts=_prompts(rows))
    for (folder, label), own in rows.groupby(["folder", "label"], sort=False):
        _print_overview(console, own, _title(own, tables, folder if several[label] else None))
    for run, table in tables if task is not None else ():
        told = rows[
            (rows["folder"] == str(table.file.parent))
            & (rows["prompting"] == run.prompting(table.task))
        ]
        name = f"{told['label'].iloc[0]}, {table.task}" if len(tables) > 1 else table.task
        if doc is None:
            terminal_layers.print_profile(console, table, name)
        else:
            terminal_layers.print_document(console, table, doc)


def _prompts(rows: pd.DataFrame) -> list[str]:
    """How the prompts of each row were made, in words; digests only where other rows of its task differ in them."""
    of_task = rows.groupby("task")["prompting"].unique()
    return [
        readable(words, of_task[task])
        for words, task in zip(rows["prompting"], rows["task"], strict=True)
    ]


def _title(rows: pd.DataFrame, tables: Tables, folder: str | None) -> str:
    first = rows.iloc[0]
    about = next(
        t.about for run, t in tables if (run.model, t.task) == (first["model"], first["task"])
    )
    size = (
        f", {about['n_layers']} layers of width {about['d_model']}" if "n_layers" in about else ""
    )
    prompts = f" ({'; '.join(dict.fromkeys(rows['prompts']))})"
    where = f", in {folder}" if folder else ""
    return f"{first['label']}{size}{where}{'' if first['label'].endswith(prompts) else prompts}"


def _print_overview(console: Console, rows: pd.DataFrame, title: str) -> None:
    """Coupling, and where there are any the untrained weights beside it and the regularity of trajectories."""
    ranks = rows.drop_duplicates("rank")
    console.print(Text(title, style="bold"))
    console.print(
        "coupling = 1 − mean miscoupling of different layers (↑) ± standard error; worst error: largest certificate",
        style="dim",
    )
    found = fit_columns(
        [
            TextColumn("task", rows["task"].where(~rows["task"].duplicated(), ""), name=True),
            TextColumn("docs", rows["documents"]),
            TextColumn("K", rows["rank"].map(_whole)),
            TextColumn("coupling", map(_with_error, rows["coupling"], rows["coupling_stderr"])),
            TextColumn("chance", rows["chance"].map(_fixed), spare=2),
            TextColumn("excess", rows["excess"].map(_signed), spare=1),
            TextColumn(
                "worst error",
                rows["worst_certificate"].map(_short).where(~rows["task"].duplicated(), ""),
                spare=3,
            ),
        ],
        console.width,
        sections=rows["task"],
    )
    console.print(found.table)
    if "chance" in found.left_out:
        levels = ", ".join(
            f"{chance:.4f} at K = {rank}"
            for rank, chance in zip(ranks["rank"], ranks["chance"], strict=True)
        )
        console.print(f"Chance: {levels}.")
    for name, missing in rows.drop_duplicates("task")[["task", "missing"]].itertuples(index=False):
        if missing:
            console.print(Text(f"Missing of {name}: {missing}"))
    console.print()
    if rows["untrained"].notna().any():
        _print_untrained(console, rows)
    _print_other_readings(console, rows.drop_duplicates("task"))


def _print_untrained(console: Console, rows: pd.DataFrame) -> None:
    rows = rows[rows["untrained"].notna()]
    seed = rows["seed"].dropna()
    console.print(
        Text(
            f"The same documents with untrained weights{f' (seed {seed.iloc[0]:.0f})' if len(seed) else ''}"
        )
    )
    shown = [
        TextColumn("task", rows["task"].where(~rows["task"].duplicated(), ""), name=True),
        TextColumn("docs", rows["paired"]),
        TextColumn("K", rows["rank"].map(_whole)),
        TextColumn(
            "untrained", map(_with_error, rows["untrained"], rows["untrained_stderr"]), spare=1
        ),
        TextColumn(
            "trained − untrained",
            map(_with_error, rows["difference"], rows["difference_stderr"], [True] * len(rows)),
        ),
    ]
    console.print(fit_columns(shown, console.width, sections=rows["task"]).table)
    console.print()


def _print_other_readings(console: Console, rows: pd.DataFrame) -> None:
    """Every number of a prompt that is no coupling, mean over documents."""
    known = [
        reading
        for reading in plain_readings()
        if reading.name in rows and rows[reading.name].notna().any()
    ]
    found = [
        (task, reading.label, _with_error(row[reading.name], row[f"{reading.name}_stderr"]))
        for task, row in rows.set_index("task").iterrows()
        for reading in known
        if not math.isnan(row[reading.name])
    ]
    if not found:
        return
    tasks, labels, values = map(list, zip(*found, strict=True))
    shown = [
        TextColumn(
            "task",
            [task if not i or tasks[i - 1] != task else "" for i, task in enumerate(tasks)],
            name=True,
        ),
        TextColumn("other numbers of a prompt", labels, name=True),
        TextColumn("mean", values),
    ]
    console.print(fit_columns(shown, console.width, sections=tasks).table)
    console.print()


def _print_comparison(console: Console, rows: pd.DataFrame) -> None:
    console.print(
        "Document by document; from and to: 95 % interval of the mean difference", style="dim"
    )
    for (label, base), of in rows.groupby(["label", "base"], sort=False):
        console.print(Text(f"{label} less {base}", style="bold"))
        shown = [
            TextColumn("task", of["task"].where(~of["task"].duplicated(), ""), name=True),
            TextColumn("docs", of["paired"]),
            TextColumn("K", of["rank"]),
            TextColumn("coupling", of["coupling"].map(_fixed), spare=1),
            TextColumn("compared", of["base_coupling"].map(_fixed), spare=2),
            TextColumn("difference", of["difference"].map(_signed)),
            TextColumn("from", of["difference_low"].map(_signed)),
            TextColumn("to", of["difference_high"].map(_signed)),
        ]
        console.print(fit_columns(shown, console.width, sections=of["task"]).table)
        console.print()


def _with_error(mean: float, error: float, signed: bool = False) -> str:
    if math.isnan(mean):
        return "–"
    value = _signed(mean) if signed else f"{mean:.4f}"
    if math.isnan(error):
        return value
    return f"{value} ± {error:.4f}" if error >= 5e-5 or not error else f"{value} ± {error:.0e}"


def _fixed(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4f}"


def _signed(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:+.4f}".replace("-", "−")


def _short(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.1e}"


def _whole(value: float | int | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.0f}"
