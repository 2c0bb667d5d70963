"""Findings on disk and in the terminal: CSV and JSON of every number, pictures, tables to read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from lm_eval_coupling.console import terminal_console
from lm_eval_coupling.errors import CouplingError, why
from lm_eval_coupling.fit.across_models import METHODS
from lm_eval_coupling.fit.finding_pictures import figures
from lm_eval_coupling.fit.findings import Findings
from lm_eval_coupling.report.terminal_columns import TextColumn, fit_columns
from lm_eval_coupling.safe_text import for_terminal, frame_for_csv
from lm_eval_coupling.saved.atomic import write_text, writing, writing_together
from lm_eval_coupling.saved.bounded import read_json
from lm_eval_coupling.saved.strict_json import strict

_INPUTS = ("observations", "documents", "checkpoints")


def save(findings: Findings, out: Path | str) -> list[Path]:
    """Write ``<table>.csv``, ``fit.json``, ``finding.txt`` and the pictures as PNG and SVG.

    All of them or none. Files of an earlier fit in the same folder are replaced or removed.

    Returns:
        The files that were written.

    Raises:
        CouplingError: If the folder cannot be written.
    """
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with writing_together(out, former=_files_of_an_earlier_fit(out)) as folder:
            files = [*_save_tables(findings, folder), *_save_figures(findings, folder)]
            files += _save_finding(findings, folder, files)
    except OSError as error:
        raise CouplingError(_unwritable(out, error)) from None
    except CouplingError as error:  # it names a file of the temporary folder
        if isinstance(error.__cause__, OSError):
            raise CouplingError(_unwritable(out, error.__cause__)) from None
        raise
    return [out / file.name for file in files]


def _unwritable(out: Path, error: OSError) -> str:
    return (
        f"got {out} for the results, which cannot be written ({why(error)}); choose another folder"
    )


def _files_of_an_earlier_fit(out: Path) -> list[str]:
    """Return the names that ``fit.json`` lists: what they show would be taken for this fit's."""
    try:
        earlier = read_json(out / "fit.json")
    except (OSError, ValueError):
        return []
    names = earlier.get("files") if isinstance(earlier, dict) else None
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _save_tables(findings: Findings, folder: Path) -> Iterator[Path]:
    for name, rows in _tables(findings).items():
        with writing(folder / f"{name}.csv") as file:
            frame_for_csv(rows).to_csv(file, index=False)
        yield folder / f"{name}.csv"


def _tables(findings: Findings) -> dict[str, pd.DataFrame]:
    return {name: rows for name, rows in findings.tables.items() if len(rows)}


def _save_finding(findings: Findings, folder: Path, files: Sequence[Path]) -> Iterator[Path]:
    """Write the finding as JSON, with the names of all files, and as text."""
    about = {
        "predictor": findings.observations.main.name,
        "finding": findings.words,
        "notes": findings.notes,
        "files": [*(file.name for file in files), "fit.json", "finding.txt"],
        "tables": {
            name: rows.to_dict("records")
            for name, rows in _tables(findings).items()
            if name not in _INPUTS
        },
    }
    yield write_text(folder / "fit.json", json.dumps(strict(about), indent=1))
    paragraphs = [*findings.words, *_note_lines(findings)]
    yield write_text(folder / "finding.txt", for_terminal("\n\n".join(paragraphs)) + "\n")


def _note_lines(findings: Findings) -> list[str]:
    return [f"Note: {note}." for note in findings.notes]


def _save_figures(findings: Findings, out: Path) -> Iterator[Path]:
    from lm_eval_coupling.figures.saving import save_figure

    for name, draw in figures(findings):
        yield from save_figure(draw(), out, name)


def show(findings: Findings, console: Console | None = None) -> None:
    """Print the tables to read, the finding and the notes."""
    console = console or terminal_console()
    makers = (
        _score_table,
        _predictor_table,
        _rival_table,
        _subset_table,
        _nested_table,
        _document_table,
    )
    for make in makers:
        if table := make(findings):
            _print(console, *table)
    for paragraph in findings.words:
        console.print(escape(for_terminal(paragraph)), end="\n\n")
    for note in _note_lines(findings):
        console.print(escape(for_terminal(note)), style="dim")


def _print(console: Console, title: str, shown: list[TextColumn]) -> None:
    fitted = fit_columns(shown, console.width)
    console.print(Text(for_terminal(title), style="bold"))
    console.print(fitted.table)
    if fitted.left_out:
        console.print(f"left out here, in the files: {', '.join(fitted.left_out)}", style="dim")
    console.print()


def _score_table(findings: Findings) -> tuple[str, list[TextColumn]] | None:
    main = findings.observations.main.name
    cells = []
    for score in [s for s, _ in findings.observations.compared()] if findings.fits else ():
        pearson, *ranks = (_correlation(findings, score, main, method) for method in METHODS)
        r2 = [findings.fits[score, main, form, "none"].r2 for form in ("line", "exponential")]
        numbers = map(_number, [*(rank["coefficient"] for rank in ranks), *r2])
        cells.append(
            (
                score,
                str(pearson["n"]),
                _estimate(pearson, "coefficient"),
                _p(pearson["p_holm"]),
                *numbers,
            )
        )
    headers = ("score", "models", "Pearson r", "p Holm", "Spearman", "Kendall", "R² line", "R² exp")
    return _table(f"{main} and the score, across models", headers, cells)


def _correlation(findings: Findings, score: str, predictor: str, method: str) -> Mapping[str, Any]:
    rows = findings.tables["correlations"].set_index(["score", "predictor", "method"])
    return rows.loc[score, predictor, method].to_dict()


def _predictor_table(findings: Findings) -> tuple[str, list[TextColumn]] | None:
    if not findings.fits:
        return None
    score = findings.observations.main_score
    alone = findings.tables["alone"].query("score == @score").set_index("predictor")
    corrected = {
        row["predictor"]: row["coefficient"]
        for row in findings.tables["corrected"].to_dict("records")
        if row["score"] == score
    }
    cells = []
    for predictor in [p.name for p in findings.observations.predictors]:
        pearson, spearman = (
            _correlation(findings, score, predictor, method) for method in ("pearson", "spearman")
        )
        numbers = (
            corrected.get(predictor, math.nan),
            spearman["coefficient"],
            alone["r2_left_out"][predictor],
            alone["r2_left_out_family"][predictor],
        )
        ps = (_p(pearson["p_bh"]), _p(pearson["p_simultaneous"]))
        cells.append((predictor, _estimate(pearson, "coefficient"), *ps, *map(_number, numbers)))
    headers = (
        "predictor",
        "Pearson r",
        "p BH",
        "p all",
        "without noise",
        "Spearman",
        "R² left out",
        "R² family left out",
    )
    return _table(f"Every predictor and {score}", headers, cells)


def _rival_table(findings: Findings) -> tuple[str, list[TextColumn]] | None:
    rows = findings.tables.get("comparisons", pd.DataFrame())
    if not len(rows):
        return None
    rows = rows[
        (rows["score"] == findings.observations.main_score) & rows["p"].notna()
    ].sort_values("second", key=abs, ascending=False)
    cells = [
        (
            row["other"],
            *map(_number, (row["first"], row["second"])),
            _estimate(row, "difference"),
            _p(row["p_holm"]),
        )
        for row in rows.to_dict("records")
    ]
    main = findings.observations.main.name
    return _table(
        f"{main} against each rival",
        ("rival", f"r of {main}", "rival's r", "|r| − |rival's r|", "p Holm"),
        cells,
    )


def _subset_table(findings: Findings) -> tuple[str, list[TextColumn]] | None:
    rows = findings.tables.get("subsets", pd.DataFrame())
    if not len(rows) or rows["subset"].nunique() == 1:
        return None
    cells = [
        (
            row["subset"],
            str(row["n"]),
            _estimate(row, "coefficient"),
            _p(row["p"]),
            _number(row["line_r2"]),
        )
        for row in rows[rows["score"] == findings.observations.main_score].to_dict("records")
    ]
    title = f"Subsets: {findings.observations.main.name} and {findings.observations.main_score}"
    return _table(title, ("models", "number", "Pearson", "p", "R² line"), cells)


def _nested_table(findings: Findings) -> tuple[str, list[TextColumn]] | None:
    cells = [
        (
            row["score"],
            row["given"],
            *map(_number, _pair(row, "r2")),
            _p(row["p"]),
            *map(_number, _pair(row, "r2_left_out")),
        )
        for row in findings.tables.get("nested", pd.DataFrame()).to_dict("records")
        if not row["reason"]
    ]
    headers = ("score", "held fixed", "R²", "R² with", "p", "left out", "with")
    title = (
        f"What {findings.observations.main.name} says beyond size (R² without and with it; also of "
        "models left out)"
    )
    return _table(title, headers, cells)


def _pair(row: Mapping[str, Any], name: str) -> tuple[float, float]:
    return row[f"without_{name}"], row[f"with_predictor_{name}"]


def _document_table(findings: Findings) -> tuple[str, list[TextColumn]] | None:
    rows = findings.tables.get("auroc", pd.DataFrame())
    if not len(rows):
        return None
    rows = rows[rows["predictor"] == rows["predictor"].iloc[0]]
    odds = (
        findings.tables["logistic"].query("given != ''").set_index(["model", "task", "predictor"])
    )
    cells = []
    for row in rows.to_dict("records"):
        key = row["model"], row["task"], row["predictor"]
        effect = odds.loc[key].to_dict() if key in odds.index else {}
        # Without two of each in any task there is no area; the odds are of all answers together.
        answers = f"{row['right']}/{row['wrong']}" if row["right"] + row["wrong"] else "–"
        area, times = _estimate(row, "auroc"), _estimate(effect, "odds_ratio") if effect else "–"
        cells.append((row["model"], row["task"], answers, area, _p(row["p_holm"]), times))
    headers = ("model", "task", "right/wrong", "AUROC", "p Holm", "odds ratio, controlled")
    return _table(
        f"{rows['predictor'].iloc[0]} and right answers, within each model", headers, cells
    )


def _table(
    title: str, headers: Sequence[str], cells: Sequence[tuple[Any, ...]]
) -> tuple[str, list[TextColumn]] | None:
    """Return title and columns; a narrow terminal leaves out the last columns first."""
    if not cells:
        return None
    spare = {header: number for number, header in enumerate(headers) if number > 2}
    by_column = list(map(list, zip(*cells, strict=True)))
    return title, [
        TextColumn(header, column, name=number == 0, spare=spare.get(header, 0))
        for number, (header, column) in enumerate(zip(headers, by_column, strict=True))
    ]


def _estimate(row: Mapping[str, Any], name: str) -> str:
    """Return the number with its interval, whose bounds are ``<name>_low`` or ``low``."""
    low, high = (row.get(f"{name}_{side}", row.get(side, math.nan)) for side in ("low", "high"))
    interval = "" if math.isnan(low) else f" [{low:.2f}, {high:.2f}]"
    return _number(row.get(name, math.nan)) + interval


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"


def _p(value: float) -> str:
    return "–" if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.2g}"
