"""The pictures of studies show their numbers."""

import math
import warnings

import numpy as np
import pandas as pd
import pytest
from coupling_analysis import (
    graph_figures,
    line_figures,
    matrix_figures,
    study_tables,
    trajectory_figures,
)
from matplotlib.collections import LineCollection
from studied import CHANCE, PAIRS, quartile_rows, record

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.measures.formulas.headline import chance_level

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_curves_show_medians_and_chance_and_dash_what_is_untrained():
    rows = pd.concat(
        [quartile_rows(), quartile_rows(weights="untrained", median=0.05, undefined=2)]
    )
    (ax,) = line_figures.curves(rows).axes
    trained, untrained, chance = ax.lines
    assert trained.get_ydata().tolist() == [0.1, 0.2, 0.3, 0.4] and trained.get_linestyle() == "-"
    assert untrained.get_linestyle() == "--" and untrained.get_color() == trained.get_color()
    assert set(chance.get_ydata()) == {CHANCE}
    assert chance.get_label() == "chance 0.052" and not ax.texts
    names = ["m, trained (n = 5)", "m, untrained (n = 5, 2 undefined)", "chance 0.052"]
    assert ax.get_legend_handles_labels()[1] == names


def test_what_is_undefined_everywhere_has_no_axes():
    """Regression: its panel was there, empty, with an axis from 0 to 1."""
    rows = pd.concat([quartile_rows(), quartile_rows(panel="entropy", median=math.nan)])
    for figure in (
        line_figures.curves(rows, title="t"),
        line_figures.quartile_bars(rows[rows["depth"] == 1], title="t"),
    ):
        assert [ax.get_ylabel() for ax in figure.axes] == ["coupling"]
        assert (
            figure.get_suptitle().split()
            == "t entropy: undefined in all documents, not drawn".split()
        )  # in lines of its width
    with pytest.raises(
        CouplingError, match="a document in which coupling, entropy is defined, got none"
    ):
        line_figures.curves(rows.assign(median=math.nan))
    matrices = {"first": np.array([[0, 0.3], [0.2, 0]]), "second": np.full((2, 2), np.nan)}
    figure = matrix_figures.token_heatmaps(
        matrices, tokens=dict.fromkeys(matrices, [1, 2]), rank=10
    )
    assert [ax.get_title() for ax in figure.axes if ax.images] == ["first"]
    assert figure.get_suptitle() == "second: all undefined, not drawn"


def test_a_zero_has_a_place_on_a_logarithmic_axis():
    rows = quartile_rows(level=[0, 0.01, 0.1, 1])
    (ax,) = line_figures.curves(rows, x="level", log_x=True).axes
    places = ax.transData.transform([(level, 0) for level in rows["level"]])[:, 0]
    assert (np.diff(places) > 0.15 * np.ptp(places)).all()
    assert ax.get_xlim()[0] > -0.01


def test_of_unrelated_layers_no_pair_is_beyond_chance_and_of_coupled_ones_all_are():
    """Regression: half of an untrained model's pairs, above chance by accident, had an edge."""
    rng = np.random.default_rng(0)
    chance = chance_level(10)

    def records(mean):
        m = np.float32(mean + 0.01 * rng.normal(size=(12, 2, 8, 8)))
        rows = [record(i, normalized_miscoupling=m[i]) for i in range(12)]
        return pd.DataFrame(rows).assign(model="m", revision="main")

    (clear,) = study_tables.pairs_beyond_chance(records(chance), 10).values()
    assert clear.shape == (8, 8) and not clear.any()
    (clear,) = study_tables.pairs_beyond_chance(records(chance - 0.1), 10).values()
    assert clear[~np.eye(8, dtype=bool)].all() and not clear.diagonal().any()
    alone = records(chance - 0.1)
    (clear,) = study_tables.pairs_beyond_chance(alone[:1], 10).values()
    assert not clear.any()  # of one document there is no error


def test_edges_are_coupling_above_chance():
    weights = graph_figures.edge_weights(PAIRS.astype(float), 10)
    assert weights[0, 1] == weights[1, 0] == pytest.approx(chance_level(10) - 0.4)
    assert np.isnan(np.diag(weights)).all()
    matrix = np.full((4, 4), 0.99)  # below chance
    matrix[0, 1] = matrix[1, 0] = 0.5
    matrix[2, 3] = np.nan
    ax = graph_figures.layer_graph({"m": matrix}, rank=10).axes[0]
    (edges,) = [c for c in ax.collections if isinstance(c, LineCollection)]
    assert len(edges.get_segments()) == 1
    assert ax.get_title() == "m\n1 of 6 pairs above chance, 1 undefined"
    with pytest.raises(CouplingError, match="got no pair of layers"):
        graph_figures.layer_graph({"m": np.full((3, 3), np.nan)}, rank=10)


def test_token_heat_maps_leave_out_what_is_undefined():
    matrix = np.array([[0, 0.3], [np.nan, 0]])
    ax = matrix_figures.token_heatmaps({"m": matrix}, tokens={"m": [-2, -1]}, rank=10).axes[0]
    assert "1 undefined" in ax.get_title()
    assert [label.get_text() for label in ax.get_xticklabels()] == ["-2", "-1"]
    with pytest.raises(CouplingError, match="got no pair of tokens"):
        matrix_figures.token_heatmaps({"m": np.full((2, 2), np.nan)}, tokens={"m": [1, 2]}, rank=10)


def test_coupling_matrices_each_fill_the_scale():
    A = np.zeros((2, 2, 2, 2))
    A[0, 1] = [[-4, 1], [0, 2]]
    axes = matrix_figures.coupling_matrices(A, rows=["a", "b"], columns=["c", "d"]).axes
    assert axes[1].images[0].get_array().tolist() == [[1, 0.25], [0, 0.5]]
    assert axes[1].get_title() == f"coupling {1 - 1 / math.sqrt(21):.3f}"
    assert np.isnan(axes[0].images[0].get_array().filled(np.nan)).all(), "zeros have no scale"


def test_trajectories_are_split_at_half_depth():
    ways = np.arange(2 * 5 * 3.0).reshape(2, 5, 3)
    figure = trajectory_figures.token_trajectories(
        {"m": (ways, np.array([0.5, 0.25, 0.1]))}, token={"m": 1}
    )
    parts = [
        [len(line.get_segments()) for line in ax.collections if isinstance(line, LineCollection)]
        for ax in figure.axes[:3]
    ]
    assert parts == [[4, 4], [2, 2], [2, 2]]
    assert "50%" in figure.axes[0].get_xlabel()
    with pytest.raises(
        CouplingError,
        match=r"got components \(1, 2\) without 0 tokens, but m has 1 components of 2 tokens",
    ):
        trajectory_figures.token_trajectories({"m": (ways[..., :1], np.array([1.0]))})
    figure = trajectory_figures.token_trajectories(
        {"m": (ways, np.array([0.5, 0.25, 0.1]))}, token={"m": 1}, skip=1, components=(2, 3)
    )
    (line,) = [line for line in figure.axes[0].collections if isinstance(line, LineCollection)]
    assert line.get_segments()[0].tolist() == [[16, 17], [19, 20]] and line.get_linewidth() == [2.2]
    figure = trajectory_figures.token_trajectories(
        {"m": (ways, np.array([0.5, 0.25, 0.1]))}, token={"m": 0}, skip=1
    )
    (line,) = [line for line in figure.axes[0].collections if isinstance(line, LineCollection)]
    assert line.get_linewidth() == [0.7], (
        "a measured token that is left out makes no other one thick"
    )


def test_one_token_far_away_does_not_crush_the_others():
    """Regression: an attention sink at 17,500 left all other paths of a trained model as a dot."""
    paths = np.random.default_rng(0).normal(size=(12, 5, 3))
    paths[0] *= 5000
    given = {"m": (paths, np.array([0.5, 0.25, 0.1]))}
    figure = trajectory_figures.token_trajectories(given)
    lines = [c for c in figure.axes[0].collections if isinstance(c, LineCollection)]
    assert len(lines) == 11 and np.ptp(figure.axes[0].get_xlim()) < 20
    assert "m: token 1 left out" in figure.get_suptitle()
    complete = trajectory_figures.token_trajectories(given, skip=0)
    lines = [c for c in complete.axes[0].collections if isinstance(c, LineCollection)]
    assert len(lines) == 12 and not complete.get_suptitle()


def test_models_of_different_depth_are_drawn_over_relative_depth():
    """Regression: layer 24 of 24 stood beside layer 24 of 30."""
    rows = pd.concat([quartile_rows(), quartile_rows(depth=[1, 2, 3, 8]).assign(line="other")])
    (ax,) = line_figures.curves(rows).axes
    assert ax.get_xlabel() == "layer / number of layers"
    assert [line.get_xdata()[-1] for line in ax.lines[:2]] == [1, 1]
    assert line_figures.curves(quartile_rows()).axes[0].get_xlabel() == "layer"


def test_panels_can_share_one_scale():
    low, high = quartile_rows(), quartile_rows(panel="other", median=0.9)
    figure = line_figures.curves(pd.concat([low, high]), share_y=True)
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()


@pytest.mark.parametrize("name", ["a" * 300, "_ablation", "a$b$ ^{", "b\x1b[31m\n"])
def test_names_of_others_leave_the_panels_their_room(name):
    """Regression: a name of 180 letters left no panel, one that begins with _ no legend entry."""
    rows = quartile_rows().assign(line=name, panel=name)
    for figure in (line_figures.curves(rows, title=name), line_figures.quartile_bars(rows)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            figure.draw_without_rendering()
        ax, (legend,) = figure.axes[0], figure.legends
        assert len(legend.get_texts()) == 2 and ax.get_window_extent().height > figure.dpi
