"""Pictures show the numbers they were given, in the right place, and touch no global state."""

import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.figures.canvas import add_legend, make_grid
from lm_eval_coupling.figures.heatmaps import layer_heatmaps
from lm_eval_coupling.measures.formulas.headline import chance_coupling


def matrix(layers=5, low=0.6, seed=0):
    return np.random.default_rng(seed).uniform(low, 0.9, (layers, layers)).astype(np.float32)


def images(figure):
    """Return the panels' images; the color bar's own is not among an axes' images."""
    return [ax.images[0] for ax in figure.axes if ax.images]


def color_at(figure, ax, x, y):
    """Return the color on the canvas at a place in data coordinates."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())
    column, row = ax.transData.transform((x, y))
    return pixels[pixels.shape[0] - 1 - round(row), round(column)] / 255


@pytest.mark.parametrize("lines", [2, 24, 120])
def test_long_legends_take_no_room_of_the_panels(lines):
    """Regression: with four models and six tasks the legend was not drawn at all."""
    figure, axes = make_grid(3, title="many")
    for i in range(lines):
        axes[0].plot([0, 1], [i, i], label=f"some-model-{i}, some_task")
    add_legend(figure, axes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a layout that cannot be made
        figure.draw_without_rendering()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert 0 <= box.y0 and box.y1 < axes[0].get_window_extent().y0
    assert axes[0].get_window_extent().height > 1.5 * figure.dpi


@pytest.mark.parametrize("miscoupling", [False, True])
def test_values_are_those_given_and_the_diagonal_is_blank(miscoupling):
    """Regression: a picture called coupling showed miscoupling, where down is good."""
    given = {"trained": matrix(), "untrained": matrix(seed=1)}
    figure = layer_heatmaps(given, rank=10, miscoupling=miscoupling)
    drawn = images(figure)
    assert figure.axes[-1].get_ylabel().startswith("normalized misc" if miscoupling else "coupling")
    assert len(drawn) == 2
    for image, values in zip(drawn, given.values(), strict=True):
        data, off = image.get_array(), ~np.eye(5, dtype=bool)
        assert np.array_equal(data.mask, ~off)
        values = values[off].astype(np.float64)
        assert np.array_equal(data.data[off], values if miscoupling else 1 - values)


def test_rows_are_jacobians_and_columns_singular_vectors_counted_from_one():
    values = np.full((4, 4), 0.5)
    values[0, 3] = 0.9  # Jacobian of layer 1, singular vectors of layer 4
    figure = layer_heatmaps({"one": values}, rank=10)
    (image,) = images(figure)
    ax = image.axes
    assert ax.get_ylabel() == "Jacobian of layer" and ax.get_xlabel() == "singular vectors of layer"
    assert [*ax.get_xticks()] == [*ax.get_yticks()] == [1, 2, 3, 4]
    figure.canvas.draw()
    right, wrong = (image.cmap(image.norm(1 - value)) for value in (0.9, 0.5))
    assert np.allclose(color_at(figure, ax, 4, 1), right, atol=0.02)
    assert np.allclose(color_at(figure, ax, 1, 4), wrong, atol=0.02)
    assert np.allclose(color_at(figure, ax, 2, 2), 1), "the diagonal is blank"


def test_panels_share_one_scale_that_holds_the_chance_level():
    figure = layer_heatmaps({"low": matrix(low=0.2), "high": matrix(low=0.7)}, rank=10)
    scales = {image.get_clim() for image in images(figure)}
    ((low, high),) = scales
    chance = chance_coupling(10)
    assert low == pytest.approx(chance) and 0.6 < high <= 0.8
    (bar,) = [ax for ax in figure.axes if not ax.images]
    assert "K = 10" in bar.get_ylabel()
    (line,) = [line for line in bar.lines if np.allclose(line.get_ydata(), chance)]
    (label,) = [text.get_text() for text in bar.texts]
    assert line.get_visible() and label == "chance\n0.052"


def test_means_stand_above_the_panels():
    values = np.array([[0.0, 0.5], [0.7, np.nan]])
    (image,) = images(layer_heatmaps({"model": values}, rank=10))
    assert image.axes.get_title() == "model\nmean 0.400"


@pytest.mark.parametrize(
    ("layers", "labeled"),
    [
        (2, [1, 2]),
        (12, [1, 2, 4, 6, 8, 10, 12]),
        (30, [1, 5, 10, 15, 20, 25, 30]),
        (80, 9),
        (500, 2),
    ],
)
def test_few_layers_are_labeled(layers, labeled):
    (image,) = images(layer_heatmaps({"model": matrix(layers)}, rank=10))
    ticks = [*image.axes.get_xticks()]
    assert ticks == labeled if isinstance(labeled, list) else len(ticks) == labeled


def test_what_is_not_a_number_is_blank():
    values = matrix()
    values[1, 3] = np.nan
    (image,) = images(layer_heatmaps({"model": values}, rank=10))
    assert image.get_array().mask[1, 3] and image.get_array().mask.sum() == 6


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_saved(tmp_path, suffix):
    figure = layer_heatmaps(
        {"trained": matrix(30), "untrained": matrix(30)}, rank=10, title="Block coupling"
    )
    path = tmp_path / f"picture.{suffix}"
    figure.savefig(path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG") if suffix == "png" else b"</svg>" in content
    if suffix == "png":
        width, height = (int.from_bytes(content[i : i + 4]) for i in (16, 20))
        assert width > height > 500, "legible in print"


@pytest.mark.parametrize(
    ("panels", "message"),
    [
        ({}, "got no panel"),
        ({"a": np.full((3, 3), np.nan)}, "got no number off the diagonal of 'a'"),
        ({"a": np.zeros((1, 1))}, "got no number off the diagonal of 'a'"),
    ],
)
def test_nothing_to_draw_is_an_error(panels, message):
    with pytest.raises(CouplingError, match=re.escape(message)):
        layer_heatmaps(panels, rank=10)


@pytest.mark.slow
def test_pyplot_stays_out():
    module = "lm_eval_coupling.figures.heatmaps"
    code = f"import sys, {module}; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
