"""Saved runs in the terminal: coupling and score per task, coupling per layer and per document."""

from __future__ import annotations

import functools
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from rich.console import Console
from rich.text import Text

from lm_eval_coupling.console import terminal_console
from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.report.overview_rows import overview
from lm_eval_coupling.report.run_comparison import compare_runs
from lm_eval_coupling.report.terminal_columns import TextColumn, fit_columns
from lm_eval_coupling.report.terminal_layers import print_document, print_profile
from lm_eval_coupling.safe_text import frame_for_csv, one_line
from lm_eval_coupling.saved.prompting import readable
from lm_eval_coupling.saved.records import require_tables
from lm_eval_coupling.saved.saved_run import SavedRun, find_runs
from lm_eval_coupling.saved.saved_table import SavedTable
from lm_eval_coupling.saved.values import plain_readings

Tables = list[tuple[SavedRun, SavedTable]]
_PIPED_WIDTH = 250  # characters, where no terminal says how many there are
_LEGEND = (
    "coupling = 1 − mean miscoupling of different layers (↑) ± standard error; score: lm-eval's "
    "first metric; worst error: largest certificate"
)


def show(
    paths: Path | str | Iterable[Path | str],
    task: str | None = None,
    doc: int | None = None,
    console: Console | None = None,
    *,
    compare: bool = False,
    form: Literal["table", "csv", "json"] = "table",
    miscoupling: bool = False,
) -> None:
    """Print what runs measured.

    Args:
        paths: folders that lm-eval wrote, searched recursively, or coupling tables.
        task: only this task, with the mean coupling of every layer.
        doc: with ``task``, also the layer-by-layer matrix of the document with this ``doc_id``.
        console: where to print; stdout by default.
        compare: compare every run with the first, over the documents that both have.
        form: ``csv`` and ``json`` print the numbers of the tables for other programs.
        miscoupling: show layers by miscoupling, 1 − coupling, which is low where layers are
            coupled.

    Raises:
        CouplingError: if nothing was saved there, or there is no such task or document.
    """
    console = console or _stdout()
    roots = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    where = ", ".join(map(str, roots))
    if doc is not None and task is None:
        raise CouplingError(f"got document {doc} without a task; add the task's name (--task)")
    if doc is not None and form != "table":
        raise CouplingError(
            f"got a document with {form}, whose rows are tasks; leave out --doc or --{form}"
        )
    runs = find_runs(roots)
    # The tables of the first folder come first: `compare` takes the first run as the base.
    tables = _by_root(runs.newest_tables(), roots)
    require_tables(tables, runs.passed_over, where)
    if task is not None:
        _require(task, {table.task for _, table in tables}, "task", where)
        tables = [(run, table) for run, table in tables if table.task == task]
    if doc is not None:
        documents = {number for _, table in tables for number in table.read(["doc_id"])["doc_id"]}
        _require(doc, documents, "document", f"task {task}")
    problems: list[str] = []
    rows = (compare_runs if compare else overview)(tables, problems)
    require_tables(rows if problems else tables, problems, where)
    if compare and not len(rows):
        raise CouplingError(
            "got no two runs with a task in common, expected at least two; give their folders"
        )
    if form != "table":
        _print_for_programs(rows, form, console)
    elif compare:
        _print_comparison(console, rows)
    else:
        readable = set(rows["file"])
        tables = [pair for pair in tables if str(pair[1].file) in readable]
        _print_runs(console, rows, tables)
        for run, table in tables if task is not None else ():
            name = _name_table(rows, run, table) if len(tables) > 1 else table.task
            if doc is None:
                print_profile(console, table, name, miscoupling=miscoupling)
            else:
                print_document(console, table, doc, miscoupling=miscoupling)


def _by_root(tables: Tables, roots: Sequence[Path]) -> Tables:
    """Sort tables by the number of the given path that they lie under."""
    numbers = {path.resolve(): number for number, path in reversed([*enumerate(roots)])}

    @functools.cache
    def number_of_folder(folder: Path) -> int:
        real = folder.resolve()
        return min(numbers.get(path, len(roots)) for path in (real, *real.parents))

    def number(pair: tuple[SavedRun, SavedTable]) -> int:
        file = pair[1].file
        own = roots.index(file) if file in roots else len(roots)
        return min(own, number_of_folder(file.parent))

    return sorted(tables, key=number)


def _stdout() -> Console:
    """Return a console on stdout, wide enough for whole tables where it is piped."""
    is_piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return terminal_console(width=_PIPED_WIDTH if is_piped else None)


def _require(value: Any, choices: set[Any], what: str, where: str) -> None:
    if value not in choices:
        first, more = sorted(choices)[:30], len(choices) - 30
        listed = ", ".join(map(str, first)) + (f" and {more} more" if more > 0 else "")
        raise CouplingError(
            f"got {what} {value}, which {where} does not have; choose one of {listed}"
        )


def _print_for_programs(rows: pd.DataFrame, form: str, console: Console) -> None:
    """Write CSV or JSON, without columns that are empty in all rows."""
    rows = rows.drop(columns="file", errors="ignore")
    rows = rows.loc[:, (rows.notna() & (rows != "")).any()]
    if form == "csv":
        console.file.write(frame_for_csv(rows).to_csv(index=False))
        return
    records = rows.astype(object).where(rows.notna(), None).to_dict("records")
    console.file.write(json.dumps(records, indent=1, default=str) + "\n")


def _print_runs(console: Console, rows: pd.DataFrame, tables: Tables) -> None:
    has_namesake = rows.groupby("label")["folder"].nunique() > 1
    by_task = rows.groupby("task")["prompting"].unique()
    rows = rows.assign(prompts=list(map(readable, rows["prompting"], rows["task"].map(by_task))))
    shapes = {(str(table.file.parent), table.task): table.about for _, table in tables}
    console.print(_LEGEND, style="dim")
    for (folder, label), own in rows.groupby(["folder", "label"], sort=False):
        title = _title(own, shapes[folder, own["task"].iloc[0]])
        where = f", in {folder}" if has_namesake[label] else ""
        console.print(Text(one_line(title + where), style="bold"))
        _print_overview(console, own)
        if own["untrained"].notna().any():
            _print_untrained(console, own)
        _print_other_readings(console, own.drop_duplicates("task"))


def _name_table(rows: pd.DataFrame, run: SavedRun, table: SavedTable) -> str:
    is_table = rows["folder"] == str(table.file.parent)
    is_table &= rows["prompting"] == run.prompting(table.task)
    return f"{rows.loc[is_table, 'label'].iloc[0]}, {table.task}"


def _title(rows: pd.DataFrame, about: Mapping[str, Any]) -> str:
    label = rows["label"].iloc[0]
    prompts = f" ({'; '.join(dict.fromkeys(rows['prompts']))})"
    size = ""
    if "n_layers" in about:
        plural = "" if about["n_layers"] == 1 else "s"
        size = f", {about['n_layers']} layer{plural} of width {about['d_model']}"
    return f"{label}{size}{'' if label.endswith(prompts) else prompts}"


def _print_overview(console: Console, rows: pd.DataFrame) -> None:
    is_first = ~rows["task"].duplicated()
    coupling = _cells(_with_error, rows, "coupling", "coupling_stderr")
    worst = _cells(_short, rows, "worst_certificate")
    columns = [
        TextColumn("task", rows["task"].where(is_first, ""), name=True),
        TextColumn("docs", rows["documents"]),
        TextColumn("K", _cells(_integer, rows, "rank")),
        TextColumn("coupling", coupling),
        TextColumn("chance", _cells(_fixed, rows, "chance"), spare=3),
        TextColumn("excess", _cells(_signed, rows, "excess"), spare=1),
        TextColumn("worst error", worst.where(is_first, ""), spare=4),
    ]
    if "metric" in rows and rows["score"].notna().any():
        scores = _cells(_score, rows, "metric", "score", "score_stderr")
        columns.append(TextColumn("score", scores.where(is_first, ""), spare=2))
    fitted = fit_columns(columns, console.width, sections=rows["task"])
    console.print(fitted.table)
    if "chance" in fitted.left_out:
        ranks = rows.drop_duplicates("rank")[["rank", "chance"]].itertuples(index=False)
        levels = ", ".join(f"{chance:.4f} at K = {rank}" for rank, chance in ranks)
        console.print(f"Chance: {levels}.")
    if hidden := [name for name in fitted.left_out if name != "chance"]:
        console.print(f"Not shown at this width: {', '.join(hidden)}.")
    for task, missing in rows.loc[is_first, ["task", "missing"]].itertuples(index=False):
        if missing:
            console.print(Text(one_line(f"Missing of {task}: {missing}")))
    console.print()


def _print_untrained(console: Console, rows: pd.DataFrame) -> None:
    """Print coupling of untrained weights, and of trained less untrained, by task and K."""
    rows = rows[rows["untrained"].notna()]
    seeds = rows["seed"].dropna()
    seed = f" (seed {seeds.iloc[0]:.0f})" if len(seeds) else ""
    console.print(f"Coupling of the same documents with untrained weights{seed}", highlight=False)
    untrained = _cells(_with_error, rows, "untrained", "untrained_stderr")
    difference = _cells(_signed_with_error, rows, "difference", "difference_stderr")
    columns = [
        TextColumn("task", rows["task"].where(~rows["task"].duplicated(), ""), name=True),
        TextColumn("docs", rows["paired"]),
        TextColumn("K", _cells(_integer, rows, "rank")),
        TextColumn("untrained", untrained, spare=1),
        TextColumn("trained − untrained", difference),
    ]
    console.print(fit_columns(columns, console.width, sections=rows["task"]).table)
    console.print()


def _print_other_readings(console: Console, rows: pd.DataFrame) -> None:
    """Print every number of a prompt other than coupling, averaged over documents."""
    cells = [
        (row["task"], reading.label, _with_error(row[reading.name], row[f"{reading.name}_stderr"]))
        for row in rows.to_dict("records")
        for reading in plain_readings()
        if reading.name in row and not math.isnan(row[reading.name])
    ]
    if not cells:
        return
    tasks, labels, values = map(pd.Series, zip(*cells, strict=True))
    columns = [
        TextColumn("task", tasks.where(~tasks.duplicated(), ""), name=True),
        TextColumn("other numbers of a prompt", labels, name=True),
        TextColumn("mean", values),
    ]
    console.print(fit_columns(columns, console.width, sections=tasks).table)
    console.print()


def _print_comparison(console: Console, rows: pd.DataFrame) -> None:
    legend = "Document by document; from and to: 95 % interval of the mean difference"
    console.print(legend, style="dim")
    for (label, base), of in rows.groupby(["label", "base"], sort=False):
        console.print(Text(one_line(f"{label} less {base}"), style="bold"))
        columns = [
            TextColumn("task", of["task"].where(~of["task"].duplicated(), ""), name=True),
            TextColumn("docs", of["paired"]),
            TextColumn("K", of["rank"]),
            TextColumn("coupling", _cells(_fixed, of, "coupling"), spare=1),
            TextColumn("compared", _cells(_fixed, of, "base_coupling"), spare=2),
            *_difference_columns(of, ""),
        ]
        console.print(fit_columns(columns, console.width, sections=of["task"]).table)
        console.print()
        scored = of.drop_duplicates("task")
        scored = scored[scored["metric"].notna()] if "metric" in scored else scored[:0]
        if len(scored):
            _print_score_differences(console, scored)


def _print_score_differences(console: Console, rows: pd.DataFrame) -> None:
    columns = [
        TextColumn("task", rows["task"], name=True),
        TextColumn("docs", _cells(_integer, rows, "score_paired")),
        TextColumn("score", rows["metric"].map(_metric)),
        TextColumn("mean", _cells(_fixed, rows, "score"), spare=1),
        TextColumn("compared", _cells(_fixed, rows, "base_score"), spare=2),
        *_difference_columns(rows, "score_"),
    ]
    if rows["mcnemar_p"].notna().any():
        columns.append(TextColumn("McNemar p", _cells(_p_value, rows, "mcnemar_p")))
    console.print(fit_columns(columns, console.width).table)
    console.print()


def _difference_columns(rows: pd.DataFrame, prefix: str) -> list[TextColumn]:
    headers = {"difference": "difference", "from": "difference_low", "to": "difference_high"}
    return [
        TextColumn(header, _cells(_signed, rows, f"{prefix}{name}"))
        for header, name in headers.items()
    ]


def _cells(form: Callable[..., str], rows: pd.DataFrame, *columns: str) -> pd.Series:
    """Return the text of each row's cell, made of the values of these columns."""
    values = rows[list(columns)].to_numpy().tolist()
    return pd.Series([form(*cells) for cells in values], rows.index, dtype=object)


def _with_error(mean: float, error: float) -> str:
    return _join_error(_fixed(mean), mean, error)


def _signed_with_error(mean: float, error: float) -> str:
    return _join_error(_signed(mean), mean, error)


def _join_error(text: str, mean: float, error: float) -> str:
    """Add a standard error, which is never rounded to zero."""
    if math.isnan(mean) or math.isnan(error):
        return text
    return f"{text} ± {error:.4f}" if error >= 5e-5 or not error else f"{text} ± {error:.0e}"


def _score(metric: str | None, score: float, error: float) -> str:
    return f"{_metric(metric)} {_with_error(score, error)}" if metric else "–"


def _metric(name: str) -> str:
    return name.removesuffix(",none")


def _p_value(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}" if value >= 0.001 else "< 0.001"


def _fixed(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4f}"


def _signed(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:+.4f}".replace("-", "−")


def _short(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.1e}"


def _integer(value: float | int | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.0f}"
