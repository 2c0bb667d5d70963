"""Findings on disk and in the terminal: CSV and JSON of every number, pictures, tables to read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from lm_eval_coupling.errors import CouplingError, why
from lm_eval_coupling.fit.findings import Findings
from lm_eval_coupling.report.terminal_columns import TextColumn, fit_columns
from lm_eval_coupling.saved.strict_json import strict
from lm_eval_coupling.saved.tables import safe_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SCATTERS = 7  # more scores than that are shown by their mean only
_ROWS = 60  # more than that are no picture
_INPUTS = ("observations", "documents", "checkpoints")


def save(found: Findings, out: Path | str) -> list[Path]:
    """Write ``<table>.csv``, ``fit.json``, ``finding.txt`` and the pictures as PNG and SVG.

    Returns:
        The files that were written.

    Raises:
        CouplingError: if the folder cannot be written.
    """
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        return [*_save_tables(found, out), *_save_figures(found, out)]
    except OSError as error:
        raise CouplingError(
            f"got {out} for the results, which cannot be written ({why(error)}); choose another folder"
        ) from None


def _save_tables(found: Findings, out: Path) -> Iterator[Path]:
    tables = {name: rows for name, rows in found.tables.items() if len(rows)}
    for name, rows in tables.items():
        rows.to_csv(out / f"{name}.csv", index=False)
        yield out / f"{name}.csv"
    about = {
        "predictor": found.observations.main.name,
        "finding": found.words,
        "notes": found.notes,
    }
    results = {
        name: rows.to_dict("records") for name, rows in tables.items() if name not in _INPUTS
    }
    (out / "fit.json").write_text(
        json.dumps(strict(about | {"tables": results}), indent=1), encoding="utf-8"
    )
    (out / "finding.txt").write_text(
        "\n\n".join([*found.words, *_noted(found)]) + "\n", encoding="utf-8"
    )
    yield from (out / "fit.json", out / "finding.txt")


def _noted(found: Findings) -> list[str]:
    return [f"Note: {note}." for note in found.notes]


def _save_figures(found: Findings, out: Path) -> Iterator[Path]:
    for name, draw in _figures(found):
        figure = draw()
        for suffix in ("png", "svg"):
            figure.savefig(out / f"{name}.{suffix}")
            yield out / f"{name}.{suffix}"


def _figures(found: Findings) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """The name of every picture there is something for, and what draws it."""
    from lm_eval_coupling.figures import scatter as draw  # here, because matplotlib is slow to load

    observed, tables, main = found.observations, found.tables, found.observations.main.name
    if found.fits:
        scores = observed.scores if len(observed.scores) <= _SCATTERS else observed.scores[-1:]
        for score in scores:
            name = score.replace("−", "minus_").replace(" ", "_")
            yield f"scatter_{safe_name(name)}", partial(_scatter, found, score)
        yield (
            "predictors",
            lambda: draw.intervals(
                _compared(found),
                x_label=f"Pearson correlation with {observed.scores[-1]}",
                chance=0.0,
            ),
        )
        swept = _swept(found)
        if swept["rank"].nunique() > 1:
            yield "ranks", lambda: draw.rank_sweep(swept)
    areas = _areas(tables.get("auroc", pd.DataFrame()))
    if 0 < len(areas) <= _ROWS:
        within = areas["predictor"].iloc[0]
        yield (
            "auroc",
            lambda: draw.intervals(
                areas, x_label=f"AUROC of {within} for right answers", chance=0.5
            ),
        )
        binned = tables["calibration"].merge(
            areas[["model", "task"]]
        )  # where there are right and wrong answers
        yield "calibration", lambda: draw.accuracy_curves(binned, x_label=within)
    if len(tables["checkpoints"]):
        yield (
            "training",
            lambda: draw.training_curves(
                tables["checkpoints"].assign(x=lambda t: t[main]), x_label=main
            ),
        )


def _scatter(found: Findings, score: str) -> Figure:
    from lm_eval_coupling.figures import scatter as draw

    main = found.observations.main
    rows = dict(found.observations.by_score())[score]
    points = rows.assign(
        x=rows[main.name],
        y=rows["score"],
        x_error=rows.get(main.error, math.nan),
        y_error=rows["score_error"],
    )
    curves = [found.fits[score, main.name, form, "none"] for form in ("line", "exponential")]
    lacking = points[["x", "y"]].isna().any(axis=1).sum()
    title = (
        f"{lacking} of {len(points)} models left out (no {main.name} or no score)"
        if lacking
        else None
    )
    return draw.score_scatter(points, curves, x_label=main.name, y_label=score, title=title)


def _compared(found: Findings) -> pd.DataFrame:
    """Pearson of every predictor with the last score."""
    rows = found.tables["correlations"].query("method == 'pearson'")
    rows = rows[rows["score"] == found.observations.scores[-1]]
    kinds = {predictor.name: predictor.kind for predictor in found.observations.predictors}
    return rows.assign(
        label=rows["predictor"], value=rows["coefficient"], kind=rows["predictor"].map(kinds)
    )


def _swept(found: Findings) -> pd.DataFrame:
    definition = found.observations.main.name.partition("@")[0]
    ranks = {
        p.name: p.rank
        for p in found.observations.predictors
        if p.rank and p.name.startswith(f"{definition}@")
    }
    rows = found.tables["correlations"].query("method == 'pearson'")
    return (
        rows.assign(rank=rows["predictor"].map(ranks))
        .dropna(subset=["rank", "coefficient"])
        .astype({"rank": int})
    )


def _areas(rows: pd.DataFrame) -> pd.DataFrame:
    """Of the first predictor, where there is one."""
    if not len(rows):
        return rows
    rows = rows[(rows["predictor"] == rows["predictor"].iloc[0]) & rows["auroc"].notna()]
    kind = rows["task"] if rows["model"].nunique() > 1 else "task"
    return rows.assign(label=rows["model"] + ": " + rows["task"], value=rows["auroc"], kind=kind)


def show(found: Findings, console: Console | None = None) -> None:
    """Print the tables to read and the finding."""
    console = console or Console()
    makers = (
        _score_table,
        _predictor_table,
        _rival_table,
        _subset_table,
        _nested_table,
        _document_table,
    )
    for make in makers:
        if table := make(found):
            _print(console, *table)
    for paragraph in found.words:
        console.print(escape(paragraph), end="\n\n")
    for note in _noted(found):
        console.print(escape(note), style="dim")


def _print(console: Console, title: str, shown: list[TextColumn]) -> None:
    fitted = fit_columns(shown, console.width)
    console.print(Text(title, style="bold"))
    console.print(fitted.table)
    if fitted.left_out:
        console.print(f"left out here, in the files: {', '.join(fitted.left_out)}", style="dim")
    console.print()


def _score_table(found: Findings) -> tuple[str, list[TextColumn]] | None:
    main = found.observations.main.name
    cells = []
    for score in found.observations.scores if found.fits else ():
        pearson, *ranks = (
            _correlation(found, score, main, method)
            for method in ("pearson", "spearman", "kendall")
        )
        r2 = [found.fits[score, main, form, "none"].r2 for form in ("line", "exponential")]
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


def _correlation(found: Findings, score: str, predictor: str, method: str) -> Mapping[str, Any]:
    rows = found.tables["correlations"].set_index(["score", "predictor", "method"])
    return rows.loc[score, predictor, method].to_dict()


def _predictor_table(found: Findings) -> tuple[str, list[TextColumn]] | None:
    if not found.fits:
        return None
    score = found.observations.scores[-1]
    alone = found.tables["alone"].query("score == @score").set_index("predictor")
    cells = []
    for predictor in [p.name for p in found.observations.predictors]:
        pearson, spearman = (
            _correlation(found, score, predictor, method) for method in ("pearson", "spearman")
        )
        corrected = found.tables["corrected"].query("score == @score and predictor == @predictor")[
            "coefficient"
        ]
        numbers = (
            spearman["coefficient"],
            alone["r2_left_out"][predictor],
            alone["r2_left_out_family"][predictor],
        )
        noiseless = corrected.iloc[0] if len(corrected) else math.nan
        ps = _p(pearson["p_bh"]), _p(pearson["p_simultaneous"])
        cells.append(
            (
                predictor,
                _estimate(pearson, "coefficient"),
                *ps,
                *map(_number, (noiseless, *numbers)),
            )
        )
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


def _rival_table(found: Findings) -> tuple[str, list[TextColumn]] | None:
    rows = found.tables.get("comparisons", pd.DataFrame())
    if not len(rows):
        return None
    rows = rows[(rows["score"] == found.observations.scores[-1]) & rows["p"].notna()].sort_values(
        "second", ascending=False
    )
    cells = [
        (
            row["other"],
            *map(_number, (row["first"], row["second"])),
            _estimate(row, "difference"),
            _p(row["p_holm"]),
        )
        for row in rows.to_dict("records")
    ]
    main = found.observations.main.name
    return _table(
        f"{main} against each rival", ("rival", main, "rival's r", "difference", "p Holm"), cells
    )


def _subset_table(found: Findings) -> tuple[str, list[TextColumn]] | None:
    rows = found.tables.get("subsets", pd.DataFrame())
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
        for row in rows[rows["score"] == found.observations.scores[-1]].to_dict("records")
    ]
    title = f"Subsets: {found.observations.main.name} and {found.observations.scores[-1]}"
    return _table(title, ("models", "number", "Pearson", "p", "R² line"), cells)


def _nested_table(found: Findings) -> tuple[str, list[TextColumn]] | None:
    cells = [
        (
            row["score"],
            row["given"],
            *map(_number, _pair(row, "r2")),
            _p(row["p"]),
            *map(_number, _pair(row, "r2_left_out")),
        )
        for row in found.tables.get("nested", pd.DataFrame()).to_dict("records")
        if not row["reason"]
    ]
    headers = ("score", "held fixed", "R²", "R² with", "p of F", "left out", "with")
    title = f"What {found.observations.main.name} says beyond size (R² without and with it; also of models left out)"
    return _table(title, headers, cells)


def _pair(row: Mapping[str, Any], name: str) -> tuple[float, float]:
    return row[f"without_{name}"], row[f"with_predictor_{name}"]


def _document_table(found: Findings) -> tuple[str, list[TextColumn]] | None:
    rows = found.tables.get("auroc", pd.DataFrame())
    if not len(rows):
        return None
    rows = rows[rows["predictor"] == rows["predictor"].iloc[0]]
    odds = found.tables["logistic"].query("given != ''").set_index(["model", "task", "predictor"])
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
    """Title and columns; the last columns are left out first where the terminal is narrow."""
    if not cells:
        return None
    spare = {header: number for number, header in enumerate(headers) if number > 2}
    by_column = list(map(list, zip(*cells, strict=True)))
    return title, [
        TextColumn(header, column, name=number == 0, spare=spare.get(header, 0))
        for number, (header, column) in enumerate(zip(headers, by_column, strict=True))
    ]


def _estimate(row: Mapping[str, Any], name: str, spec: str = ".2f") -> str:
    """The number with its interval; its bounds are ``<name>_low`` or ``low``."""
    low, high = (row.get(f"{name}_{side}", row.get(side, math.nan)) for side in ("low", "high"))
    interval = "" if math.isnan(low) else f" [{low:{spec}}, {high:{spec}}]"
    return _number(row.get(name, math.nan), spec) + interval


def _number(value: float, spec: str = ".2f") -> str:
    return "–" if math.isnan(value) else f"{value:{spec}}"


def _p(value: float) -> str:
    return "–" if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.2g}"
