"""Pictures of a finding: which of them have something to show, and how each is drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import pandas as pd

from lm_eval_coupling.fit.findings import Findings
from lm_eval_coupling.saved.tables import safe_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SCATTERS = 7  # with more scores, only the main one is drawn
_ROWS = 60  # more rows than that make no picture


def figures(findings: Findings) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """Yield the name of every picture that has something to show, and a function to draw it."""
    from lm_eval_coupling.figures import scatter as draw  # here, because matplotlib is slow to load

    observations, tables = findings.observations, findings.tables
    main = observations.main.name
    if findings.fits:
        yield from _figures_across(findings)
    areas = _areas(tables.get("auroc", pd.DataFrame()))
    if 0 < len(areas) <= _ROWS:
        within = areas["predictor"].iloc[0]
        label = f"AUROC of {within} for right answers"
        yield "auroc", lambda: draw.intervals(areas, x_label=label, chance=0.5)
        # Only tasks with right and wrong answers have an area.
        binned = tables["calibration"].merge(areas[["model", "task"]])
        yield "calibration", lambda: draw.accuracy_curves(binned, x_label=within)
    if len(tables["checkpoints"]):
        points = tables["checkpoints"].assign(x=lambda rows: rows[main])
        yield "training", lambda: draw.training_curves(points, x_label=main)


def _figures_across(findings: Findings) -> Iterator[tuple[str, Callable[[], Figure]]]:
    from lm_eval_coupling.figures import scatter as draw

    observations = findings.observations
    scores = [score for score, _ in observations.compared()]
    for score in scores if len(scores) <= _SCATTERS else [observations.main_score]:
        name = score.replace("−", "minus_").replace(" ", "_")
        yield f"scatter_{safe_name(name)}", partial(_scatter, findings, score)
    compared = _compared(findings)
    label = f"Pearson correlation with {observations.main_score}"
    yield "predictors", lambda: draw.intervals(compared, x_label=label, chance=0.0)
    swept = _swept(findings)
    if swept["rank"].nunique() > 1:
        yield "ranks", lambda: draw.rank_sweep(swept)
    left_out = _left_out(findings)
    if 0 < len(left_out) <= _ROWS:
        value = left_out["all_models"].iloc[0]
        label = f"Pearson correlation without each member (line: all, {value:.2f})"
        yield "influence", lambda: draw.intervals(left_out, x_label=label, chance=value)


def _scatter(findings: Findings, score: str) -> Figure:
    from lm_eval_coupling.figures import scatter as draw

    main = findings.observations.main
    rows = dict(findings.observations.by_score())[score]
    points = rows.assign(
        x=rows[main.name],
        y=rows["score"],
        x_error=rows.get(main.error, math.nan),
        y_error=rows["score_error"],
    )
    curves = [findings.fits[score, main.name, form, "none"] for form in ("line", "exponential")]
    incomplete = points[["x", "y"]].isna().any(axis=1).sum()
    title = None
    if incomplete:
        title = f"{incomplete} of {len(points)} models left out (no {main.name} or no score)"
    return draw.score_scatter(points, curves, x_label=main.name, y_label=score, title=title)


def _compared(findings: Findings) -> pd.DataFrame:
    """Return Pearson's correlation of every distinct predictor with the main score."""
    observations = findings.observations
    rows = findings.tables["correlations"].query("method == 'pearson' and same_as == ''")
    rows = rows[rows["score"] == observations.main_score]
    kinds = {predictor.name: predictor.kind for predictor in observations.predictors}
    return rows.assign(
        label=rows["predictor"], value=rows["coefficient"], kind=rows["predictor"].map(kinds)
    )


def _left_out(findings: Findings) -> pd.DataFrame:
    """Return the influence of each member on the main score's correlation, strongest first."""
    rows = findings.tables["influence"]
    if not len(rows):
        return rows
    rows = rows[rows["score"] == findings.observations.main_score].dropna(subset="coefficient")
    change = (rows["coefficient"] - rows["all_models"]).abs()
    rows = rows.assign(
        label=rows["without"], value=rows["coefficient"], low=math.nan, high=math.nan
    )
    return rows.loc[change.sort_values(ascending=False).index]


def _swept(findings: Findings) -> pd.DataFrame:
    definition = findings.observations.main.name.partition("@")[0]
    ranks = {
        p.name: p.rank
        for p in findings.observations.predictors
        if p.rank and p.name.startswith(f"{definition}@")
    }
    rows = findings.tables["correlations"].query("method == 'pearson'")
    rows = rows.assign(rank=rows["predictor"].map(ranks))
    return rows.dropna(subset=["rank", "coefficient"]).astype({"rank": int})


def _areas(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the areas of the first predictor that are defined."""
    if not len(rows):
        return rows
    rows = rows[(rows["predictor"] == rows["predictor"].iloc[0]) & rows["auroc"].notna()]
    kind = rows["task"] if rows["model"].nunique() > 1 else "task"
    return rows.assign(label=rows["model"] + ": " + rows["task"], value=rows["auroc"], kind=kind)
