"""Pictures of regressions show the numbers they were given, where they belong."""

import math
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from matplotlib.container import ErrorbarContainer

from lm_eval_coupling.figures import scatter
from lm_eval_coupling.statistics import exponential_fit, line_fit


def drawn(ax):
    """Points and ends of their bars of every series, by its label."""
    series = {}
    for container in ax.containers:
        if isinstance(container, ErrorbarContainer):
            line, _, bars = container
            ends = [np.array(bar.get_segments()) for bar in bars]
            series[container.get_label()] = (line.get_xydata(), ends)
    return series


@pytest.fixture
def points():
    x = np.array([0.1, 0.2, 0.3, 0.4, 0.5, math.nan])
    return pd.DataFrame(
        {
            "x": x,
            "y": 0.2 + x + [0.01, -0.02, 0.01, 0.02, -0.01, 0],
            "x_error": [0.01, math.nan, 0.01, 0.01, 0.01, 0.01],
            "y_error": 0.05,
            "label": list("abcdef"),
            "family": ["m", "n", "m", "n", "m", "n"],
        }
    )


def test_scatter(points):
    fits = [
        line_fit(points["x"], points["y"]),
        exponential_fit(points["x"], points["y"], resamples=99),
    ]
    figure = scatter.score_scatter(points, fits, x_label="coupling", y_label="score", title="t")
    (ax,) = figure.axes
    series = drawn(ax)
    assert set(series) == {"m", "n"} and (ax.get_xlabel(), ax.get_ylabel()) == ("coupling", "score")
    at, (across, up) = series["m"]
    defined = points.dropna(subset=["x"])
    np.testing.assert_allclose(at, defined[defined["family"] == "m"][["x", "y"]])
    np.testing.assert_allclose(np.ptp(across[:, :, 0], axis=1), 0.02)
    np.testing.assert_allclose(np.ptp(up[:, :, 1], axis=1), 0.1)
    assert sorted(text.get_text() for text in ax.texts) == list("abcde")
    curves = [line for line in ax.lines if line.get_label().startswith(("line", "exponential"))]
    for curve, fit in zip(curves, fits, strict=True):
        np.testing.assert_allclose(curve.get_ydata(), fit.predict(curve.get_xdata()))
        assert f"R² = {fit.r2:.2f}" in curve.get_label()


def test_names_stay_within_the_axes_and_no_bar_of_their_own_strikes_them_through(points):
    """Regression: names stood in their horizontal bars, and on the right outside of the axes."""
    points["label"] = [f"a-longer-name-{i}" for i in range(6)]
    figure = scatter.score_scatter(points, [], x_label="x", y_label="y")
    figure.canvas.draw()
    (ax,) = figure.axes
    frame, defined = ax.get_window_extent(), points.set_index("label")
    for text in ax.texts:
        box, at = (
            text.get_window_extent(),
            ax.transData.transform(defined.loc[text.get_text(), ["x", "y"]].astype(float)),
        )
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1
        assert box.y0 > at[1] or box.y1 < at[1], "the horizontal bar goes above or below"
        assert box.x0 > at[0] or box.x1 < at[0], "the vertical one beside it"


def test_a_fit_without_a_solution_is_left_out(points):
    constant = line_fit(points["x"], [0.5] * 6)
    (ax,) = scatter.score_scatter(points, [constant], x_label="x", y_label="y").axes
    assert constant.reason and not [
        line for line in ax.lines if line.get_label().startswith("line")
    ]


def test_many_names_are_not_written(points):
    many = pd.concat([points.assign(label=f"{i}") for i in range(10)])
    (ax,) = scatter.score_scatter(many, [], x_label="x", y_label="y").axes
    assert not ax.texts


def test_intervals_from_top_to_bottom():
    rows = pd.DataFrame(
        {
            "label": ["first", "second", "none", "third"],
            "value": [0.6, 0.4, math.nan, 0.9],
            "low": [0.5, math.nan, math.nan, 0.8],
            "high": [0.8, math.nan, math.nan, 0.95],
            "kind": ["a", "b", "a", "a"],
        }
    )
    (ax,) = scatter.intervals(rows, x_label="AUROC", chance=0.5).axes
    assert [text.get_text() for text in ax.get_yticklabels()] == [
        "first",
        "second",
        "third",
    ] and ax.yaxis_inverted()
    series = drawn(ax)
    np.testing.assert_allclose(series["a"][0], [[0.6, 0], [0.9, 2]])
    np.testing.assert_allclose(series["a"][1][0][:, :, 0], [[0.5, 0.8], [0.8, 0.95]])
    assert 0.5 in [line.get_xdata()[0] for line in ax.lines if len(set(line.get_xdata())) == 1]


def test_ranks():
    rows = pd.DataFrame({"score": ["s"] * 3, "rank": [30, 10, 50], "coefficient": [0.2, 0.1, 0.3]})
    (ax,) = scatter.rank_sweep(
        rows.assign(low=rows["coefficient"] - 0.1, high=rows["coefficient"] + 0.2)
    ).axes
    at, (bars,) = drawn(ax)["s"]
    np.testing.assert_allclose(at, [[0, 0.1], [1, 0.2], [2, 0.3]])
    np.testing.assert_allclose(bars[:, :, 1], [[0, 0.3], [0.1, 0.4], [0.2, 0.5]], atol=1e-12)
    assert [text.get_text() for text in ax.get_xticklabels()] == ["10", "30", "50"]


def test_a_panel_per_task_and_a_line_per_model():
    rows = pd.DataFrame(
        {
            "model": ["a", "a", "b"],
            "task": ["s", "t", "t"],
            "mean": [0.1, 0.2, 0.3],
            "accuracy": 0.5,
        }
    )
    figure = scatter.accuracy_curves(rows.assign(low=0.4, high=0.8), x_label="coupling")
    assert [ax.get_title() for ax in figure.axes] == ["s", "t"]
    assert set(drawn(figure.axes[0])) == {"a"} and set(drawn(figure.axes[1])) == {"a", "b"}
    np.testing.assert_allclose(drawn(figure.axes[1])["b"][1][0][0][:, 1], [0.4, 0.8])
    assert {text.get_text() for legend in figure.legends for text in legend.get_texts()} == {
        "a",
        "b",
    }


def test_training_curves():
    rows = pd.DataFrame(
        {
            "lineage": "l",
            "score_of": "arc acc",
            "step": [1.0, 1000.0],
            "x": [0.1, 0.2],
            "score": [0.3, 0.4],
        }
    )
    above, below = scatter.training_curves(rows, x_label="coupling").axes
    np.testing.assert_allclose(drawn(above)["l: arc acc"][0], [[1, 0.1], [1000, 0.2]])
    np.testing.assert_allclose(drawn(below)["l: arc acc"][0], [[1, 0.3], [1000, 0.4]])
    assert below.get_xscale() == "log"


def test_of_many_families_none_is_told_apart(points):
    many = pd.concat([points.assign(family=f"{i}") for i in range(20)])
    (ax,) = scatter.score_scatter(many, [], x_label="x", y_label="y").axes
    assert set(drawn(ax)) == {"models"} and len(drawn(ax)["models"][0]) == 100


def test_chance_is_marked_and_no_legend_covers_a_bar(points):
    """Regression: nothing told chance, and the legend stood over the error bars."""
    figure = scatter.score_scatter(points, [], x_label="coupling@10", y_label="acc")
    (ax,) = figure.axes
    (line,) = [line for line in ax.lines if str(line.get_label()).startswith("chance")]
    assert list(line.get_xdata()) == pytest.approx([0.0515802] * 2, abs=1e-6)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert legend.get_window_extent().y1 < ax.get_window_extent().y0
    (ax,) = scatter.score_scatter(points, [], x_label="log10_params", y_label="acc").axes
    assert not [line for line in ax.lines if str(line.get_label()).startswith("chance")]


def test_names_of_others_are_drawn_as_they_are(points, tmp_path):
    """Regression: a dollar sign or an underscore in a name ended the picture or the legend."""
    names = ["_ablation", "a$b_c^{$", "c\x1b[31m", "d", "e", "f"]
    figure = scatter.score_scatter(
        points.assign(label=names, family=names), [], x_label="x$", y_label="_y$_$"
    )
    assert len(figure.legends[0].get_texts()) == 5  # one point is undefined
    for suffix in ("png", "svg"):
        figure.savefig(tmp_path / f"picture.{suffix}")
    ElementTree.parse(tmp_path / "picture.svg")
