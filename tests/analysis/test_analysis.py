"""Studies of saved records: known numbers go through the scripts, and come out in their tables and pictures.

Pictures are drawn small here: what is in them does not depend on it.
"""

import importlib.util
import json
import math
import re
import runpy
from pathlib import Path

import command
import numpy as np
import pandas as pd
import pytest
import saved_runs
import tiny
import torch
from matplotlib.collections import LineCollection

from lm_eval_coupling import measure_coupling
from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.figures import canvas, coupling_matrices, graph, lines, trajectories
from lm_eval_coupling.measures.formulas.coupling import miscoupling
from lm_eval_coupling.measures.formulas.headline import chance_level
from lm_eval_coupling.measuring import matrices as measured
from lm_eval_coupling.saved.records import load_records
from lm_eval_coupling.saved.tables import require, write_tables
from lm_eval_coupling.studies import by_document, singular_values, tables, tokens, training

ANALYSIS = Path(__file__).parents[2] / "analysis"
CHANCE = 1 - math.sqrt(0.9)  # coupling of unrelated layers, K = 10
PAIRS = np.array([[0, 0.2, 0.4], [0.6, 0, 0.8], [1, 0.5, 0]], dtype=np.float32)
NOT_OURS = ("correlate", "controlled_family")


def script(name):
    spec = importlib.util.spec_from_file_location(f"analysis_{name}", ANALYSIS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def record(doc_id, *, task="arc", weights="trained", shift=0.0, **changes):
    """A record of three layers and two ranks; ``shift`` is added to everything of the coupling and the trajectory."""
    layers, n = 3, 6
    found = saved_runs.record(task, doc_id, layers=layers)
    miscoupling = np.stack([PAIRS + np.float32(shift), np.full((layers, layers), 0.9, np.float32)])
    pairs = np.arange(2 * layers * layers * 4, dtype=np.float32).reshape(2, layers, layers, 2, 2) / 100
    return (
        found
        | {
            "n_tokens": n,
            "tokens": tuple(range(n)),
            "position": n - 1,
            "normalized_miscoupling": miscoupling,
            "singular_values": np.array([[1 / (k + layer) for k in range(1, 31)] for layer in range(1, 4)], np.float32),
            "line_shape_score": 1.5 + shift,
            "expodistance": 0.5 + shift,
            "norms": np.array([1, 2, 4, 8], np.float32),
            "equidistance": 0.25 + shift,
            "step_lengths": np.array([1, 2, 4], np.float32),
            "windowed_line_shape": np.array([1.1, 1.2], np.float32),
            "windowed_expodistance": np.array([0.1, 0.2], np.float32),
            "window": 2,
            "entropy": np.array([4, 3, 2, 1], np.float32),
            "effective_rank": np.array([5, 6, 7], np.float32),
            "participation_ratio": np.array([2, 3, 4], np.float32),
            "depth_slope": np.full(30, 1, np.float32),
            "depth_r2": np.full(30, 0.9, np.float32),
            "frobenius_norms": np.array([[8, 1, 0, 2, 3, 4]] * layers, np.float32) + np.float32(shift),
            "spectral_norms": np.array([[4, 1, 0, 1, 1, 2]] * layers, np.float32),
            "self_tokens": (n - 2, n - 1),
            "self_layers": (0, 1, 2),
            "self_miscoupling": pairs + np.float32(shift),
            "context_tokens": (n - 2, n - 1),
            "context_layers": (0, 1, 2),
            "context_input_miscoupling": pairs,
            "context_output_miscoupling": pairs,
            "trajectories": np.arange(n * 4 * 3, dtype=np.float32).reshape(n, 4, 3),
            "trajectory_variance": np.array([0.6, 0.3, 0.1], np.float32),
            "weights": weights,
        }
        | changes
    )


def save(folder, rows, *, model="org/tiny", revision="main", date=saved_runs.DATE, fingerprint="f", seed=0):
    """The tables of one run; ``seed`` is that of its untrained twin."""
    about = {"model": model, "revision": revision, "fingerprint": fingerprint, "untrained": {"seed": seed, "tasks": {}}}
    write_tables(rows, folder / f"{model}-{revision}".replace("/", "__"), date, about)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Four documents with everything measured, and their untrained twin at chance."""
    at_chance = np.full((2, 3, 3), chance_level(10), np.float32)
    rows = [record(i, shift=i / 100) for i in range(4)]
    rows += [record(i, weights="untrained", normalized_miscoupling=at_chance, line_shape_score=2.0) for i in range(4)]
    return save(tmp_path_factory.mktemp("run"), rows)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run of depth coupling alone, from before there were twins."""
    depth = ("normalized_miscoupling", "singular_values", "certificate", "seconds")
    rows = [saved_runs.record("arc", i, layers=3) for i in range(2)]
    about = ("task", "doc_id", "doc_hash", "prompt_hash", "prompt_index", "kind", "text", "n_tokens", "position", "ranks")
    kept = [{name: row[name] for name in (*about, *depth) if name != "weights"} | {"measures": ("depth",)} for row in rows]
    return save(tmp_path_factory.mktemp("plain"), kept)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A script without --out leaves its pictures where it was called."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module", autouse=True)
def small_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canvas, "DPI", 40)
        yield


def table(out, name):
    for suffix, start in {"png": b"\x89PNG", "svg": b"<?xml"}.items():
        assert (out / f"{name}.{suffix}").read_bytes().startswith(start)
    return pd.read_csv(out / f"{name}.csv")


# Which records a study takes


def test_of_a_prompt_measured_twice_the_newer_counts(tmp_path):
    save(tmp_path / "a", [record(0)], date="2025-01-01T00-00-00")
    save(tmp_path / "b", [record(0, shift=0.1), record(1)], date="2025-02-01T00-00-00")
    found = tables.read([tmp_path / "b", tmp_path / "a"])
    assert found["doc_id"].tolist() == [0, 1]
    assert found["line_shape_score"].tolist() == pytest.approx([1.6, 1.5])


def test_tables_of_before_there_were_twins_are_trained(plain):
    assert tables.read([plain])["weights"].tolist() == ["trained", "trained"]
    with pytest.raises(CouplingError, match="none with untrained weights; measure again with coupling_untrained=0"):
        require(load_records(plain), [], weights="untrained")


@pytest.mark.parametrize(
    ("column", "option"),
    [
        ("line_shape_score", "measure again with coupling_measures=depth+regularity"),
        ("frobenius_norms", "measure again with coupling_measures=depth+regularity+spectra"),
        ("self_miscoupling", "coupling_measures=depth+regularity+self,coupling_tokens=last8"),
        ("context_input_miscoupling", "coupling_measures=depth+regularity+context,coupling_tokens=last8"),
        ("trajectories", "coupling_trajectories=1"),
    ],
)
def test_a_measure_that_was_not_recorded(plain, column, option):
    message = f"got 2 records of arc with the measures depth, none with {column}; "
    with pytest.raises(CouplingError, match=re.escape(message) + ".*" + re.escape(option) + "$"):
        require(load_records(plain), ["normalized_miscoupling", column])


def test_records_that_lack_a_measure_are_left_out(tmp_path):
    save(tmp_path, [record(0), record(1, entropy=None), record(2, line_shape_score=math.nan)])
    assert require(load_records(tmp_path), ["entropy", "line_shape_score"])["doc_id"].tolist() == [0]


def test_one_name_with_two_weights_is_refused(tmp_path):
    """Regression: documents measured before and after a training under the same name counted as one model's."""
    save(tmp_path / "a", [record(0), record(1, task="mmlu")], date="2025-01-01T00-00-00", fingerprint="before" * 5)
    save(tmp_path / "b", [record(1)], date="2025-02-01T00-00-00", fingerprint="after" * 6)
    message = (
        r"got tiny with .* \(fingerprints beforebe of 2025-01-01T00-00-00 and afteraft of 2025-02-01T00-00-00\), expected"
    )
    with pytest.raises(CouplingError, match=message):
        tables.read([tmp_path])
    assert tables.read([tmp_path / "b"])["doc_id"].tolist() == [1]
    assert tables.read([tmp_path], ["mmlu"])["fingerprint"].tolist() == ["before" * 5]


def test_one_name_with_two_twins_is_refused(tmp_path):
    for seed in (0, 1):
        save(tmp_path / str(seed), [record(seed), record(seed, weights="untrained")], seed=seed)
    with pytest.raises(CouplingError, match="got untrained twins of tiny of the seeds 0 and 1, expected one"):
        tables.read([tmp_path])
    assert tables.read([tmp_path / "1"])["untrained_seed"].tolist() == [None, 1]
    assert len(tables.read([tmp_path], weights="trained")) == 2


def test_revisions_and_old_tables_need_no_common_fingerprint(tmp_path):
    save(tmp_path, [record(0)], fingerprint="one", revision="step1")
    save(tmp_path, [record(0)], fingerprint="other", revision="step2")
    save(tmp_path, [record(0)], fingerprint="third")
    save(tmp_path / "old", [record(1)], fingerprint=None)
    assert len(tables.read([tmp_path])) == 4


def test_names_are_the_same_whatever_the_tasks(tmp_path):
    save(tmp_path, [record(0), record(0, task="gsm8k")], model="/x/a/tiny")
    save(tmp_path, [record(0)], model="/x/b/tiny")
    assert tables.read([tmp_path])["model"].unique().tolist() == ["a/tiny", "b/tiny"]
    assert tables.read([tmp_path], ["gsm8k"])["model"].unique().tolist() == ["a/tiny"]


@pytest.mark.parametrize("name", ["/elsewhere/b/tiny", "b/tiny/", "/home/b/tiny", "C:\\b\\tiny"])
def test_records_of_the_model_that_is_meant(tmp_path, name):
    """Regression: those of another model with the same last part of its name came along."""
    for model in ("/home/a/tiny", "/home/b/tiny", "org/other"):
        save(tmp_path, [record(0)], model=model)
    records = tables.read([tmp_path])
    assert tables.of_model(records, name)["model"].tolist() == ["b/tiny"]
    assert tables.of_model(records, "/moved/other")["model"].tolist() == ["other"]
    with pytest.raises(CouplingError, match="got tiny, which may be a/tiny or b/tiny; give more of its path"):
        tables.of_model(records, "tiny")
    with pytest.raises(CouplingError, match="got records of a/tiny, b/tiny, other, none of c/tiny; give"):
        tables.of_model(records, "c/tiny")


def test_what_was_not_measured_is_named(run):
    with pytest.raises(CouplingError, match="got task mmlu, which was not measured; choose among arc"):
        tables.read([run], ["mmlu"])
    with pytest.raises(CouplingError, match=r"got rank 7, expected one that all records have \(10, 30\)"):
        tables.choose_rank(tables.read([run]), 7)
    assert tables.choose_rank(tables.read([run])) == 10


# Numbers


def test_coupling_of_layers_by_hand(tmp_path):
    records = tables.read([save(tmp_path, [record(0)])])
    found = tables.long(records, ["coupling", "layer_coupling", "layer_coupling_as_basis"], 10)
    values = {name: of["value"].tolist() for name, of in found.groupby("measure")}
    assert values["coupling"] == pytest.approx([1 - 3.5 / 6])
    assert values["layer_coupling"] == pytest.approx([0.7, 0.3, 0.25])  # 1 − mean over a row
    assert values["layer_coupling_as_basis"] == pytest.approx([0.2, 0.65, 0.4])  # over a column
    assert found[found["measure"] == "layer_coupling"]["depth"].tolist() == [1, 2, 3]


def test_prompts_of_one_document_count_once(tmp_path):
    rows = [record(0), record(0, prompt_index=1, line_shape_score=2.5), record(1, line_shape_score=4.0)]
    found = tables.long(tables.read([save(tmp_path, rows)]), ["line_shape_score"], 10)
    assert found["value"].tolist() == [2.0, 4.0]
    (summary,) = tables.quartiles(found, tables.RUN).to_dict("records")
    assert (summary["mean"], summary["q25"], summary["median"], summary["q75"], summary["n"]) == (3, 2.5, 3, 3.5, 2)
    assert summary["stderr"] == pytest.approx(1.0)  # √2 / √2


def test_windows_stand_at_their_centres_and_points_before_blocks(run):
    found = tables.long(tables.read([run]), ["windowed_line_shape", "norms", "step_lengths"], 10)
    depths = {name: sorted(of["depth"].unique()) for name, of in found.groupby("measure")}
    assert depths == {"windowed_line_shape": [1, 2], "norms": [0, 1, 2, 3], "step_lengths": [1, 2, 3]}


def test_what_is_undefined_is_counted_and_left_out_of_means(tmp_path):
    holes = np.stack([PAIRS, PAIRS])
    holes[0, 0] = np.nan
    records = tables.read([save(tmp_path, [record(0), record(1, normalized_miscoupling=holes)])])
    rows = tables.quartiles(tables.long(records, ["layer_coupling"], 10), tables.RUN)
    assert rows["n"].tolist() == [1, 2, 2] and rows["undefined"].tolist() == [1, 0, 0]
    ((mean, n),) = tables.mean_matrices(records, 10).values()
    assert n == 2 and np.isnan(np.diag(mean)).all() and mean[0, 1] == pytest.approx(0.2)


def pair_rows(**tasks):
    about = {"model": "m", "revision": "main", "weights": "trained", "measure": "coupling", "depth": math.nan}
    return pd.DataFrame(
        about | {"task": task, "doc_hash": doc, "value": value}
        for task, values in tasks.items()
        for doc, value in values.items()
    )


def test_paired_differences_by_hand():
    rows = pair_rows(plain={"a": 0.1, "b": 0.2, "c": 0.9}, cot={"b": 0.5, "a": 0.2, "d": 0.0})
    pairs = by_document.paired(rows, "plain", "cot").set_index("doc_hash")
    assert pairs["difference"].to_dict() == pytest.approx({"a": 0.1, "b": 0.3})
    (mean,) = by_document.mean_differences(pairs.reset_index()).to_dict("records")
    assert mean["difference"] == pytest.approx(0.2) and mean["stderr"] == pytest.approx(0.1)
    assert mean["low"] == pytest.approx(0.2 - 12.7062 * 0.1, abs=1e-5)  # Student's t with one degree of freedom
    assert (mean["n"], mean["positive"]) == (2, 1.0)
    with pytest.raises(CouplingError, match=r"got no document in both of plain \(3\) and other \(1\)"):
        by_document.paired(pd.concat([rows, pair_rows(other={"z": 0.0})]), "plain", "other")


def test_bins_hold_equal_shares_and_correlations_know_their_sign():
    x = np.arange(12.0)
    about = {"model": "m", "revision": "main", "weights": "trained", "task": "t", "measure": "coupling"}
    rows = pd.DataFrame(about | {"doc_hash": f"{i}", "value": -v, "n_tokens": v} for i, v in enumerate(x))
    bins = by_document.bins(rows, "n_tokens", 3)
    assert bins["n"].tolist() == [4, 4, 4] and bins["n_tokens"].tolist() == [1.5, 5.5, 9.5]
    assert bins["median"].tolist() == [-1.5, -5.5, -9.5]
    assert len(by_document.bins(rows.assign(n_tokens=x // 6), "n_tokens", 3)) == 2, "a level is a bin"
    (found,) = by_document.correlations(rows, "n_tokens").to_dict("records")
    assert found["coefficient"] == pytest.approx(-1) and found["n"] == 12


def test_the_line_through_inverse_singular_values():
    depth = np.arange(1.0, 6.0)
    about = {"model": "m", "revision": "main", "weights": "trained", "k": 2}
    (fit,) = singular_values.inverse_fits(pd.DataFrame(about | {"depth": depth, "median": 1 / (3 + 0.5 * depth)})).to_dict(
        "records"
    )
    assert (fit["slope"], fit["intercept"], fit["r2"]) == pytest.approx((0.5, 3, 1))
    (fit,) = singular_values.inverse_fits(pd.DataFrame(about | {"depth": depth, "median": 0.0})).to_dict("records")
    assert math.isnan(fit["slope"])


def test_token_pairs_are_averaged_from_the_end_of_the_prompt(tmp_path):
    longer = {"n_tokens": 9, "tokens": tuple(range(9)), "position": 8, "self_tokens": (7, 8)}
    records = tables.read([save(tmp_path, [record(0), record(1, shift=0.1, **longer)])])
    found = tokens.token_pairs(records, "self", 10)
    assert (found.tokens, found.layers, found.n) == ([-2, -1], [1, 2, 3], 2)
    assert found.miscoupling[0, 1, 1, 0] == pytest.approx(0.06 + 0.05)  # entry 1·4 + 2 of the first rank, and half the shift
    assert found.by_layers()[0, 0] == pytest.approx((0.01 + 0.02) / 2 + 0.05)
    row = found.rows().query("jacobian_layer == 1 and basis_layer == 2 and jacobian_token == -1 and basis_token == -2")
    assert row["miscoupling"].item() == pytest.approx(0.11)
    three = record(2, self_tokens=(3, 4, 5), self_miscoupling=np.zeros((2, 3, 3, 3, 3), np.float32))
    with pytest.raises(CouplingError, match="got prompts with 2 to 3 tokens for self-coupling"):
        tokens.token_pairs(tables.read([save(tmp_path / "more", [record(0), three])]), "self", 10)


def test_coupling_matrices_are_those_of_the_measurement(tmp_path):
    model = measured.load(tiny.save_model(tmp_path))
    ids = model.encode("The sky is blue.")
    (expected,) = measure_coupling(model, [ids], ranks=[4], progress=False)
    found = measured.of_layers(model, ids, [1, 3], -1, 4)
    m = miscoupling(torch.as_tensor(found.A), normalized=True).numpy()
    np.testing.assert_allclose(coupling_matrices.normalized_miscoupling(found.A), m, atol=1e-6)
    assert m == pytest.approx(expected.normalized_miscoupling[0][np.ix_([0, 2], [0, 2])], abs=1e-4)
    assert np.diagonal(found.A[1, 1]) == pytest.approx(expected.singular_values[2], rel=1e-5)
    outputs = measured.of_tokens(model, ids, 2, [-3, -1], 4, "context_output")
    last = measured.of_tokens(model, ids, 2, [-1], 4, "self")
    assert outputs.names == ["token 14 → 16", "token 16 → 16"]
    assert np.abs(outputs.A[1, 1]) == pytest.approx(np.abs(last.A[0, 0]), abs=1e-5)
    with pytest.raises(CouplingError, match="got layer 9, expected 1 to 4"):
        measured.of_layers(model, ids, [9], -1, 4)
    with pytest.raises(CouplingError, match="which transformers cannot load"):
        measured.load(str(tmp_path / "absent"))


# Pictures


def quartile_rows(**changes):
    about = {"panel": "coupling", "line": "m", "weights": "trained", "n": 5, "undefined": 0, "chance": CHANCE}
    depth = np.arange(1, 5)
    return pd.DataFrame(about | {"depth": depth, "median": depth / 10, "q25": depth / 20, "q75": depth / 5} | changes)


def test_curves_show_medians_and_chance_and_dash_what_is_untrained():
    rows = pd.concat([quartile_rows(), quartile_rows(weights="untrained", median=0.05, undefined=2)])
    (ax,) = lines.curves(rows).axes
    trained, untrained, chance = ax.lines
    assert trained.get_ydata().tolist() == [0.1, 0.2, 0.3, 0.4] and trained.get_linestyle() == "-"
    assert untrained.get_linestyle() == "--" and untrained.get_color() == trained.get_color()
    assert set(chance.get_ydata()) == {CHANCE}
    assert chance.get_label() == "chance 0.051" and not ax.texts
    names = ["m, trained (n = 5)", "m, untrained (n = 5, 2 undefined)", "chance 0.051"]
    assert ax.get_legend_handles_labels()[1] == names


def test_a_zero_has_a_place_on_a_logarithmic_axis():
    rows = quartile_rows(level=[0, 0.01, 0.1, 1])
    (ax,) = lines.curves(rows, x="level", log_x=True).axes
    places = ax.transData.transform([(level, 0) for level in rows["level"]])[:, 0]
    assert (np.diff(places) > 0.15 * np.ptp(places)).all()
    assert ax.get_xlim()[0] > -0.01


def test_of_unrelated_layers_no_pair_is_beyond_chance_and_of_coupled_ones_all_are():
    """About half of all pairs of an untrained model had an edge: those that happened to lie above chance."""
    rng = np.random.default_rng(0)
    chance = chance_level(10)

    def records(mean):
        m = np.float32(mean + 0.01 * rng.normal(size=(12, 2, 8, 8)))
        rows = [record(i, normalized_miscoupling=m[i]) for i in range(12)]
        return pd.DataFrame(rows).assign(model="m", revision="main")

    (clear,) = tables.pairs_beyond_chance(records(chance), 10).values()
    assert clear.shape == (8, 8) and not clear.any()
    (clear,) = tables.pairs_beyond_chance(records(chance - 0.1), 10).values()
    assert clear[~np.eye(8, dtype=bool)].all() and not clear.diagonal().any()
    alone = records(chance - 0.1)
    (clear,) = tables.pairs_beyond_chance(alone[:1], 10).values()
    assert not clear.any()  # of one document there is no error


def test_edges_are_coupling_above_chance():
    weights = graph.edge_weights(PAIRS.astype(float), 10)
    assert weights[0, 1] == weights[1, 0] == pytest.approx(chance_level(10) - 0.4)
    assert np.isnan(np.diag(weights)).all()
    matrix = np.full((4, 4), 0.99)  # below chance
    matrix[0, 1] = matrix[1, 0] = 0.5
    matrix[2, 3] = np.nan
    ax = graph.layer_graph({"m": matrix}, rank=10).axes[0]
    (edges,) = [c for c in ax.collections if isinstance(c, LineCollection)]
    assert len(edges.get_segments()) == 1
    assert ax.get_title() == "m\n1 of 6 pairs above chance, 1 undefined"
    with pytest.raises(CouplingError, match="got no pair of layers"):
        graph.layer_graph({"m": np.full((3, 3), np.nan)}, rank=10)


def test_token_heat_maps_leave_out_what_is_undefined():
    matrix = np.array([[0, 0.3], [np.nan, 0]])
    ax = coupling_matrices.token_heatmaps({"m": matrix}, tokens={"m": [-2, -1]}, rank=10).axes[0]
    assert "1 undefined" in ax.get_title()
    assert [label.get_text() for label in ax.get_xticklabels()] == ["-2", "-1"]
    with pytest.raises(CouplingError, match="got no pair of tokens"):
        coupling_matrices.token_heatmaps({"m": np.full((2, 2), np.nan)}, tokens={"m": [1, 2]}, rank=10)


def test_coupling_matrices_each_fill_the_scale():
    A = np.zeros((2, 2, 2, 2))
    A[0, 1] = [[-4, 1], [0, 2]]
    axes = coupling_matrices.coupling_matrices(A, rows=["a", "b"], columns=["c", "d"]).axes
    assert axes[1].images[0].get_array().tolist() == [[1, 0.25], [0, 0.5]]
    assert axes[1].get_title() == f"m̃ = {1 / math.sqrt(21):.3f}"
    assert np.isnan(axes[0].images[0].get_array().filled(np.nan)).all(), "zeros have no scale"


def test_trajectories_are_split_at_half_depth():
    ways = np.arange(2 * 5 * 3.0).reshape(2, 5, 3)
    figure = trajectories.trajectories({"m": (ways, np.array([0.5, 0.25, 0.1]))}, token={"m": 1})
    parts = [
        [len(line.get_segments()) for line in ax.collections if isinstance(line, LineCollection)] for ax in figure.axes[:3]
    ]
    assert parts == [[4, 4], [2, 2], [2, 2]]
    assert "50%" in figure.axes[0].get_xlabel()
    with pytest.raises(CouplingError, match=r"got components \(1, 2\) without 0 tokens, but m has 1 components of 2 tokens"):
        trajectories.trajectories({"m": (ways[..., :1], np.array([1.0]))})
    figure = trajectories.trajectories({"m": (ways, np.array([0.5, 0.25, 0.1]))}, token={"m": 1}, skip=1, components=(2, 3))
    (line,) = [line for line in figure.axes[0].collections if isinstance(line, LineCollection)]
    assert line.get_segments()[0].tolist() == [[16, 17], [19, 20]] and line.get_linewidth() == [2.2]
    figure = trajectories.trajectories({"m": (ways, np.array([0.5, 0.25, 0.1]))}, token={"m": 0}, skip=1)
    (line,) = [line for line in figure.axes[0].collections if isinstance(line, LineCollection)]
    assert line.get_linewidth() == [0.7], "a measured token that is left out makes no other one thick"


# Scripts


@pytest.fixture
def two_models(tmp_path):
    """One document in the tokens of two models; the second run has no singular_values."""
    save(tmp_path, [record(0)], model="org/first")
    longer = {"n_tokens": 9, "tokens": tuple(range(9)), "position": 8, "self_tokens": (7, 8)}
    longer |= {"trajectories": np.arange(9 * 4 * 3, dtype=np.float32).reshape(9, 4, 3)}
    return save(tmp_path, [record(0, **longer, depth_slope=None, depth_r2=None)], model="org/second")


@pytest.fixture
def drawn(monkeypatch):
    """The figures that scripts made, as they are before they are saved."""
    figures = []
    monkeypatch.setattr(command, "save", lambda folder, name, figure, rows: figures.append(figure))
    return figures


def test_every_model_has_tokens_of_its_own(two_models, drawn):
    """Regression: all panels had the tokens of one model, the last one's or the first one's."""
    script("tokenwise")([str(two_models), "--layers", "1", "--doc", "0"])
    script("trajectories")([str(two_models)])
    tokenwise, ways = drawn
    assert [[text.get_text() for text in ax.get_xticklabels()] for ax in tokenwise.axes[:2]] == [["4", "5"], ["7", "8"]]
    widths = [[line.get_linewidth()[0] for line in ax.collections if isinstance(line, LineCollection)] for ax in ways.axes]
    assert widths[0] == [0.7] * 5 + [2.2] and widths[3] == [0.7] * 8 + [2.2]
    assert [ax.get_title() for ax in ways.axes[:6:3]] == ["first (6 tokens): all layers", "second (9 tokens): all layers"]


@pytest.fixture
def namesakes(tmp_path):
    """Two models whose folders have the same last name."""
    save(tmp_path, [record(0)], model="/some/where/a/tiny")
    return save(tmp_path, [record(0, shift=0.1)], model="/some/where/b/tiny")


@pytest.mark.parametrize(
    ("name", "panels"), [("layer_graph", 2), ("influence --last 3", 2), ("trajectories", 6), ("tokenwise --layers 1", 2)]
)
def test_models_of_one_last_name_have_panels_of_their_own(namesakes, drawn, name, panels):
    """Regression: they had one label, and the panel of one was drawn in the place of the other's."""
    name, *arguments = name.split()
    script(name)([str(namesakes), *arguments])
    titles = [ax.get_title() for ax in drawn[0].axes if ax.get_title()]
    assert len(titles) == panels
    assert all(title.startswith(("a/tiny", "b/tiny")[i >= panels / 2]) for i, title in enumerate(titles)), titles


def test_models_of_one_last_name_have_lines_of_their_own(namesakes, tmp_path):
    """Regression: they were drawn as one line, which went through the layers twice."""
    script("layer_coupling")([str(namesakes), "--out", str(tmp_path)])
    rows = table(tmp_path, "layer_coupling").query("measure == 'layer_coupling'")
    medians = {line: of["median"].tolist() for line, of in rows.groupby("line")}
    assert medians == {"a/tiny": pytest.approx([0.7, 0.3, 0.25]), "b/tiny": pytest.approx([0.6, 0.2, 0.15])}


def test_trainings_of_one_last_name_have_lines_of_their_own(tmp_path):
    """Regression: checkpoints of two trainings were drawn as those of one."""
    for training_of, steps in {"a": (1, 3), "b": (2, 4)}.items():
        for step in steps:
            save(tmp_path, [record(0)], model=f"/some/where/{training_of}/tiny/checkpoint-{step}")
    script("checkpoints")([str(tmp_path), "--out", str(tmp_path)])
    rows = table(tmp_path, "checkpoints").query("measure == 'coupling'")
    assert {line: of["step"].tolist() for line, of in rows.groupby("line")} == {"a/tiny": [1, 3], "b/tiny": [2, 4]}


def test_a_run_without_spectra_beside_one_with(two_models, tmp_path):
    """Regression: its lines were lost, and the picture with them."""
    script("singular_values")([str(two_models), "--indices", "2", "--out", str(tmp_path)])
    rows = table(tmp_path, "singular_values").groupby("line").first()
    assert rows["slope"].tolist() == pytest.approx([1, 1])
    assert rows.loc["first", "r2_documents"] == pytest.approx(0.9) and np.isnan(rows.loc["second", "r2_documents"])


def test_layer_coupling_without_a_defined_pair(tmp_path, capsys):
    """Regression: the most coupled of no layers was asked for."""
    undefined = np.full((2, 3, 3), np.nan, np.float32)
    run = save(tmp_path, [record(0, normalized_miscoupling=undefined)])
    script("layer_coupling")([str(run), "--out", str(tmp_path)])
    assert table(tmp_path, "layer_coupling")["undefined"].tolist() == [1] * 6
    assert "most coupled" not in capsys.readouterr().out


def test_layer_coupling(run, tmp_path, capsys):
    script("layer_coupling")([str(run), "--out", str(tmp_path)])
    rows = table(tmp_path, "layer_coupling").query("measure == 'layer_coupling'")
    trained = rows[rows["weights"] == "trained"]
    assert trained["median"].tolist() == pytest.approx([0.685, 0.285, 0.235], abs=1e-6)  # shifts 0 to 0.03
    assert trained["n"].tolist() == [4, 4, 4]
    assert rows[rows["weights"] == "untrained"]["median"].tolist() == pytest.approx([CHANCE] * 3, abs=1e-6)
    assert "tiny, trained: most coupled is layer 1, 0.685 (chance 0.051)" in capsys.readouterr().out


def test_layer_graph(run, tmp_path):
    script("layer_graph")([str(run), "--out", str(tmp_path)])
    rows = table(tmp_path, "layer_graph").set_index(["weights", "jacobian_layer", "basis_layer"])
    assert len(rows) == 12
    assert rows.loc[("trained", 1, 2), "miscoupling"] == pytest.approx(0.215)
    assert rows.loc[("trained", 1, 2), "edge"] == pytest.approx(chance_level(10) - 0.415)
    assert rows.loc["untrained", "edge"].abs().max() < 1e-6
    table(tmp_path, "layer_heatmap")


def test_regularity(run, tmp_path):
    script("regularity")([str(run), "--out", str(tmp_path)])
    rows = table(tmp_path, "regularity").set_index(["measure", "weights"])
    assert rows.loc[("line_shape_score", "trained"), ["q25", "median", "q75"]].tolist() == pytest.approx(
        [1.5075, 1.515, 1.5225]
    )
    assert rows.loc[("line_shape_score", "untrained"), "median"] == 2
    assert rows.loc[("equidistance", "trained"), "median"] == pytest.approx(0.265)


def test_depth_profiles(run, tmp_path):
    script("depth_profiles")([str(run), "--out", str(tmp_path)])
    rows = table(tmp_path, "depth_profiles").query("weights == 'trained'")
    medians = {name: of["median"].tolist() for name, of in rows.groupby("measure")}
    assert medians["norms"] == [1, 2, 4, 8] and medians["entropy"] == [4, 3, 2, 1]
    assert medians["effective_rank"] == [5, 6, 7] and len(medians) == 7


def test_singular_values(run, tmp_path):
    script("singular_values")([str(run), "--indices", "1", "3", "--out", str(tmp_path)])
    rows = table(tmp_path, "singular_values").query("weights == 'trained'").set_index(["k", "depth"])
    assert rows.loc[(3, 2), "median"] == pytest.approx(1 / 5)  # 1/σ_k = k + depth
    assert rows["slope"].tolist() == pytest.approx([1] * 6) and rows["r2"].tolist() == pytest.approx([1] * 6)
    assert rows.loc[(3, 1), "intercept"] == pytest.approx(3)
    assert rows["r2_documents"].tolist() == pytest.approx([0.9] * 6)
    with pytest.raises(CouplingError, match="got singular value 31, expected 1 to 30.*coupling_ranks=31"):
        script("singular_values")([str(run), "--indices", "31"])


def test_influence(run, tmp_path):
    script("influence")([str(run), "--last", "3", "--out", str(tmp_path)])
    rows = table(tmp_path, "influence").query("weights == 'trained' and depth == 2").set_index("token")
    assert rows["median"].to_dict() == pytest.approx({"first": 8.015, "-2": 2.015, "-1": 3.015, "0": 4.015})
    with pytest.raises(CouplingError, match="got prompts of at most 6 tokens .* expected more than 6"):
        script("influence")([str(run), "--last", "6"])


def test_trajectories(run, tmp_path):
    script("trajectories")([str(run), "--doc", "2", "--out", str(tmp_path)])
    rows = table(tmp_path, "trajectories")
    assert len(rows) == 2 * 6 * 4 and rows.loc[5, ["token", "layer", "component_2"]].tolist() == [1, 1, 16]
    with pytest.raises(CouplingError, match="got document 9, which has no such record; choose among 0, 1, 2, 3"):
        script("trajectories")([str(run), "--doc", "9"])


@pytest.mark.parametrize("kind", tokens.KINDS)
def test_tokenwise(run, tmp_path, kind):
    script("tokenwise")([str(run), "--kind", kind, "--layers", "2", "--out", str(tmp_path)])
    rows = table(tmp_path, f"tokenwise_{kind}").query("weights == 'trained'")
    cell = rows.query("jacobian_layer == 2 and basis_layer == 2 and jacobian_token == 4 and basis_token == 5")
    assert cell["miscoupling"].item() == pytest.approx(0.17 + (0.015 if kind == "self" else 0)) and len(rows) == 36
    with pytest.raises(CouplingError, match="got layer 8, expected one of 1, 2, 3"):
        script("tokenwise")([str(run), "--kind", kind, "--layers", "8"])


def test_chain_of_thought(tmp_path):
    step = np.array([0.02, 0.04, 0.06], np.float32)
    rows = [record(i, task="gsm8k") for i in range(3)]
    rows += [record(i, task="gsm8k_cot_zeroshot", shift=-step[i]) for i in range(3)]
    save(tmp_path, rows)
    script("chain_of_thought")([str(tmp_path), "--out", str(tmp_path)])
    means = table(tmp_path, "chain_of_thought").set_index(["measure", "depth"])
    whole = means.xs("coupling").iloc[0]
    assert whole["difference"] == pytest.approx(0.04, abs=1e-6) and whole["stderr"] == pytest.approx(0.02 / math.sqrt(3))
    assert whole["positive"] == 1 and whole["n"] == 3
    assert means.xs("layer_coupling")["difference"].tolist() == pytest.approx([0.04] * 3, abs=1e-6)
    assert len(pd.read_csv(tmp_path / "chain_of_thought_documents.csv")) == 3 * (3 + 3)


def test_prompt_length(tmp_path):
    rows = [record(i, shift=i / 100, n_tokens=10 * i + 10) for i in range(9)]
    save(tmp_path, rows)
    script("prompt_length")([str(tmp_path), "--out", str(tmp_path)])
    assert sorted(table(tmp_path, "prompt_length")["n_tokens"].unique()) == [10.0 * i for i in range(1, 10)]
    found = pd.read_csv(tmp_path / "prompt_length_correlations.csv").set_index("measure")["coefficient"]
    assert found.round(6).to_dict() == {"coupling": -1, "line_shape_score": 1, "expodistance": 1}


def test_difficulty(tmp_path):
    folder = save(tmp_path, [record(i, shift=i / 100) for i in range(9)]) / "org__tiny-main"
    levels = [
        {"doc_hash": f"d{i}", "doc": {"level": f"Level {i // 3}", "answer": "<<" * i, "text": "none"}} for i in range(9)
    ]
    samples = folder / f"samples_arc_{saved_runs.DATE}.jsonl"
    samples.write_text("".join(json.dumps(sample) + "\n" for sample in levels) + '{"cut o')
    main, out = script("difficulty"), ["--out", str(tmp_path)]
    main([str(tmp_path), "--column", "level", *out])
    assert table(tmp_path, "difficulty").query("measure == 'coupling'")["difficulty"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    main([str(tmp_path), "--column", "answer", "--count", "<<", *out])
    assert table(tmp_path, "difficulty").query("measure == 'coupling'")["difficulty"].tolist() == [*range(9)]
    (tmp_path / "known.csv").write_text("doc_hash,hard\nd1,5\nd2,7\nd99,1\n")
    main([str(tmp_path), "--csv", str(tmp_path / "known.csv"), "--column", "hard", *out])
    assert sorted(table(tmp_path, "difficulty")["difficulty"].unique()) == [5, 7]
    with pytest.raises(
        CouplingError, match="got column 'grade', which the documents do not have; choose among answer, level"
    ):
        main([str(tmp_path), "--column", "grade", *out])
    with pytest.raises(CouplingError, match="got difficulty = 0 for every measured document"):
        main([str(tmp_path), "--column", "answer", "--count", ">>", *out])
    with pytest.raises(CouplingError, match="got 'text' without numbers, such as 'none'"):
        main([str(tmp_path), "--column", "text", *out])
    samples.unlink()
    with pytest.raises(CouplingError, match="got no samples.*--log_samples"):
        main([str(tmp_path), "--column", "level", *out])


def test_checkpoints(tmp_path):
    for step in (512, 1, 64):
        save(tmp_path, [record(i, shift=-step / 4096) for i in range(2)], revision=f"step{step}")
    save(tmp_path, [record(0)], model="other")
    script("checkpoints")([str(tmp_path), "--out", str(tmp_path)])
    rows = table(tmp_path, "checkpoints").query("measure == 'coupling'")
    assert rows["step"].tolist() == [1, 64, 512] and set(rows["line"]) == {"tiny"}
    assert rows["median"].tolist() == pytest.approx([1 - 3.5 / 6 + step / 4096 for step in (1, 64, 512)], abs=1e-6)
    assert table(tmp_path, "checkpoints_layers")["line"].unique().tolist() == [f"tiny, step {s}" for s in (1, 64, 512)]
    with pytest.raises(CouplingError, match="got 1 checkpoints of a training, expected at least two"):
        training.with_steps(pd.DataFrame({"model": ["m", "n"], "revision": ["step1", "main"]}))


def test_coupling_matrices(tmp_path):
    arguments = [tiny.save_model(tmp_path / "model"), "--prompt", "The sky is blue.", "--rank", "4", "--out", str(tmp_path)]
    main = script("coupling_matrices")
    main([*arguments, "--layers", "1", "4"])
    rows = table(tmp_path, "coupling_matrices_layers")
    own = rows.query("jacobian == basis")
    assert len(rows) == 4 * 16 and own.query("i != j")["value"].abs().max() < 1e-4 * own["value"].max()
    main([*arguments, "--across", "self", "--tokens", "-2", "-1", "--untrained", "0"])
    assert set(table(tmp_path, "coupling_matrices_self_untrained")["jacobian"]) == {"token 15", "token 16"}


def test_all_results_that_the_records_allow(tmp_path, capsys, monkeypatch):
    main = script("make_results")
    assert all((ANALYSIS / f"{study.split()[0]}.py").exists() for study in main.__globals__["STUDIES"])
    some = ["layer_coupling", "influence", "tokenwise --kind context_input", "chain_of_thought"]
    monkeypatch.setitem(main.__globals__, "STUDIES", some)
    rows = [record(i, shift=i / 100, n_tokens=10 + i) for i in range(3)]
    here = save(tmp_path, [*rows, record(0, prompt_index=1, trajectories=None)], model="/some/where/tiny")
    out = tmp_path / "results"
    main([str(here), "--out", str(out)])
    lines = capsys.readouterr().out.splitlines()
    left = [line.split(": ")[0] for line in lines if line.startswith("left out")]
    assert left == ["left out influence", "left out chain_of_thought"]
    assert {file.suffix for file in out.iterdir()} == {".csv", ".png"}
    (run,) = pd.read_csv(out / "runs.csv").to_dict("records")
    assert (run["model"], run["weights"], run["documents"], run["prompts"]) == ("tiny", "trained", 3, 4)
    rows = pd.read_csv(out / "layer_coupling.csv").query("measure == 'layer_coupling'")
    assert rows["median"].tolist() == pytest.approx([0.69, 0.29, 0.24], abs=1e-6) and set(rows["model"]) == {"tiny"}
    assert "/some/where" not in "".join(file.read_text() for file in out.glob("*.csv"))
    assert {file.name for file in out.glob("*.png")} == {"layer_coupling.png", "tokenwise_context_input.png"}


def test_results_of_models_of_one_last_name(namesakes, tmp_path, monkeypatch):
    """Regression: both were committed under one name, the same in all columns that tell runs apart."""
    main = script("make_results")
    monkeypatch.setitem(main.__globals__, "STUDIES", ["layer_coupling"])
    main([str(namesakes), "--out", str(tmp_path / "results")])
    for name in ("runs", "layer_coupling"):
        rows = pd.read_csv(tmp_path / "results" / f"{name}.csv")
        assert rows["model"].unique().tolist() == ["a/tiny", "b/tiny"]


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("regularity", "line_shape_score"),
        ("depth_profiles", "norms"),
        ("trajectories", "trajectories"),
        ("tokenwise", "self_miscoupling"),
        ("influence", "frobenius_norms"),
    ],
)
def test_a_script_says_what_is_missing(plain, name, needed, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [f"{name}.py", str(plain)])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(ANALYSIS / f"{name}.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert error.startswith(f"{name}.py: got 2 records of arc with the measures depth, none with {needed}; ")


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CouplingError, match="which cannot be written"):
        command.save_table(tmp_path / "file", "name", pd.DataFrame())


def test_every_script_is_listed_with_its_command():
    readme = (ANALYSIS / "README.md").read_text(encoding="utf-8")
    names = {file.stem for file in ANALYSIS.glob("*.py")} - {"command"}  # what they have in common
    assert names >= {"layer_coupling", *NOT_OURS}
    for name in names:
        assert f"python analysis/{name}.py " in readme and f"[`{name}.py`]({name}.py)" in readme
