"""Across models: the right numbers go into the statistics, and truth is found."""

import re

import numpy as np
import pytest
from fitted_runs import QUICK, observations, save_model
from scipy import stats

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.fit import across_models, output
from lm_eval_coupling.fit.findings import fit_runs
from lm_eval_coupling.statistics import adjust_p_values, correlation


class TestAcross:
    def test_correlations_are_those_of_the_saved_numbers(self, series, found):
        truth, rows = (
            series[1],
            found.tables["correlations"].set_index(["score", "predictor", "method"]),
        )
        for method, expected in (
            ("pearson", stats.pearsonr(truth["coupling"], truth["arc"])[0]),
            ("spearman", stats.spearmanr(truth["coupling"], truth["arc"])[0]),
            ("kendall", stats.kendalltau(truth["coupling"], truth["arc"])[0]),
        ):
            assert rows.loc[("arc acc", "coupling@10", method), "coefficient"] == pytest.approx(
                expected
            )
        size = stats.pearsonr(truth["size"], truth["gsm"])[0]
        assert rows.loc[("gsm acc", "log10_params", "pearson"), "coefficient"] == pytest.approx(
            size
        )

    def test_p_values_are_adjusted_for_the_many_scores(self, found):
        rows = found.tables["correlations"].query(
            "predictor == 'log10_params' and method == 'pearson'"
        )
        p = np.sort(rows["p"].to_numpy())
        by_hand = np.maximum.accumulate(np.minimum(1, p * [3, 2, 1]))
        np.testing.assert_allclose(np.sort(rows["p_holm"]), by_hand)
        pearson = found.tables["correlations"].query("method == 'pearson'")
        # Coupling at two ranks is one number here: it counts once.
        same = pearson.set_index("predictor")["same_as"]
        assert (same["coupling@30"] == "coupling@10").all() and (same["log10_params"] == "").all()
        # The mean of all scores has no other tasks, hence no correlation with their scores.
        distinct = pearson[(pearson["same_as"] == "") & pearson["p"].notna()]
        np.testing.assert_allclose(
            distinct["p_bh"], stats.false_discovery_control(distinct["p"], method="bh")
        )
        assert pearson.loc[pearson["same_as"] != "", "p_bh"].isna().all()

    def test_lines_with_and_without_errors(self, series, found):
        truth, fits = series[1], found.fits
        plain = fits["arc acc", "coupling@10", "line", "none"]
        expected = stats.linregress(truth["coupling"], truth["arc"])
        assert plain.coefficients["slope"].value == pytest.approx(expected.slope)
        assert plain.r2 == pytest.approx(expected.rvalue**2)
        weights = np.sqrt(49 / (truth["arc"] * (1 - truth["arc"])))
        slope = np.polyfit(truth["coupling"], truth["arc"], 1, w=weights)[0]
        assert fits["arc acc", "coupling@10", "line", "y"].coefficients[
            "slope"
        ].value == pytest.approx(slope)
        assert fits["arc acc", "coupling@10", "line", "x and y"].reason is None
        assert ("arc acc", "log10_params", "line", "x and y") not in fits  # sizes are known exactly

    def test_subsets(self, series, found):
        truth, rows = series[1], found.tables["subsets"].set_index(["score", "subset"])
        assert list(rows.loc["arc acc"].index) == [
            "all",
            "base",
            "tuned",
            "family a",
            "family b",
            "family c",
            "family d",
            "family e",
            "family f",
        ]
        base = truth[[not name.endswith("-chat") for name in truth.index]]
        expected = stats.pearsonr(base["coupling"], base["arc"])[0]
        assert rows.loc[("arc acc", "base"), "coefficient"] == pytest.approx(expected)
        assert rows.loc[("arc acc", "family a"), "n"] == 3

    def test_nested_models(self, series, found):
        truth = series[1]
        row = found.tables["nested"].set_index(["score", "given"]).loc[("arc acc", "log10_params")]
        assert row["without_r2"] == pytest.approx(
            stats.pearsonr(truth["size"], truth["arc"])[0] ** 2
        )
        X = np.column_stack([np.ones(18), truth["size"], truth["coupling"]])
        residual = truth["arc"] - X @ np.linalg.lstsq(X, truth["arc"], rcond=None)[0]
        assert row["with_predictor_r2"] == pytest.approx(1 - residual.var() / truth["arc"].var())
        assert row["families"] == 6

    def test_strengths_do_not_depend_on_directions(self, series):
        plain = across_models.comparisons(observations(series[0]))[
            "arc acc", "coupling@10", "log10_params"
        ]
        turned = across_models.comparisons(observations(series[0], x=["miscoupling@10"]))[
            "arc acc", "miscoupling@10", "log10_params"
        ]
        # In these runs every measure of a model is the same number; expected signs play no part.
        assert (turned.difference, turned.p) == pytest.approx((plain.difference, plain.p))

    def test_truth_is_found_and_size_is_not_given_the_credit(self, found):
        words = " ".join(found.words)
        assert words.startswith("18 models of 6 families and 3 scores.")
        assert "Higher coupling@10 goes with higher arc acc across models." in words
        assert "coupling@10 goes with mean of 2 scores more strongly than log10_params" in words
        assert "coupling@10 says something of mean of 2 scores beyond log10_params." in words
        assert "18 models of 6 families" in words and "within families" in words
        assert found.notes == ("the same for all models: line_shape_score, n_layers, d_model",)

    def test_no_relation_is_claimed_of_noise(self):
        """Holm promises that at most 5% of families of tests have a false claim; of 60 families of
        three scores.
        """
        rng, claims, n = np.random.default_rng(1), 0, 10
        for _ in range(60):
            p = [
                correlation(rng.normal(size=n), rng.normal(size=n), resamples=199).p
                for _ in range(3)
            ]
            claims += (adjust_p_values(p) < 0.05).any()
        assert claims <= stats.binom.ppf(0.9999, 60, 0.05)

    def test_few_models_conclude_nothing(self, tmp_path):
        for i in range(4):
            save_model(
                tmp_path,
                f"org/a-{i}b",
                0.1 + i / 20,
                {"arc": 0.3 + i / 10},
                n_params=10.0 ** (8 + i),
            )
        words = " ".join(fit_runs(tmp_path, x=["coupling@10"], resamples=QUICK).words)
        assert "Fewer than 8 models: whatever the numbers, no conclusion can be drawn." in words
        assert "They are relatives, not a sample of models" in words
        assert "too few to conclude anything" in words and "goes with higher" not in words

    def test_collinear_predictors_are_told(self, tmp_path):
        rng = np.random.default_rng(3)
        for i in range(10):
            coupling = 0.1 + i / 50
            noisy = 10 ** (8 + 10 * coupling + rng.normal(0, 0.01))
            save_model(
                tmp_path,
                f"org/{'xyz'[i % 3]}-{i}b",
                coupling,
                {"arc": 0.3 + rng.uniform(0, 0.4)},
                n_params=noisy,
            )
        assert re.search(
            r"the covariates explain (9\d\.\d|more than 99.9)% of coupling@10",
            " ".join(fit_runs(tmp_path, resamples=QUICK).words),
        )


class TestCopies:
    @pytest.mark.parametrize("x", [None, ["coupling@10"], ["log10_params"]])
    def test_a_copy_under_another_name_and_fingerprint_counts_once(self, tmp_path, x):
        for i in range(10):
            for folder, name in (("a", f"org/m{i}-{i + 1}b"), ("b", f"org/copy{i}")):
                save_model(tmp_path / folder, name, 0.2 + i / 50, {"arc": 0.3 + i / 100})
        told = observations(tmp_path, x=x)
        assert told.models == 10
        (note,) = [note for note in told.notes if "counted once" in note]
        assert "the same numbers to the last digit" in note and "(as copy0)" in note

    @pytest.mark.parametrize("x", [None, ["log10_params"], ["n_layers"], ["line_shape_score"]])
    def test_a_score_and_sizes_make_no_copy(self, tmp_path, x):
        """With a size in question, models of one size and score counted as one."""
        models = {"base-7b": 0.30, "other-7b": 0.41, "x-1b": 0.2, "y-3b": 0.25}
        for name, coupling in models.items():
            size = int(name[-2]) * 10**9
            save_model(tmp_path, name, coupling, {"arc": 0.25}, n_params=size)
        told = observations(tmp_path, x=x)
        assert told.models == 4 and "counted once" not in " ".join(told.notes)

    def test_models_without_a_measured_number_are_no_copies(self, tmp_path):
        def forget(run):
            summary = run["config"]["coupling"]["tasks"]["arc"]
            summary["measures"] = {}

        for number in range(4):
            change = forget if number < 2 else None
            save_model(tmp_path, f"m{number}", 0.2 + number / 10, {"arc": 0.25}, change=change)
        assert observations(tmp_path).models == 4


class TestPredictorInQuestion:
    def save(self, folder, *, tasks=("arc", "gsm"), models=8):
        rng = np.random.default_rng(0)
        for i in range(models):
            scores = {task: rng.uniform(0.3, 0.7) for task in tasks}
            size = 10 ** rng.uniform(8, 10)
            save_model(folder, f"m{i}", rng.uniform(0.1, 0.4), scores, n_params=size)

    @pytest.mark.parametrize(
        "x", ["other_tasks_mean", "other_tasks_component", "log10_params", "n_layers", "n_total"]
    )
    def test_each_one_has_tables_words_and_files(self, tmp_path, x):
        """Scores of the other tasks ended in a KeyError, and so did showing those of a size."""
        self.save(tmp_path / "runs")
        told = fit_runs(tmp_path / "runs", x=[x], resamples=QUICK)
        assert told.observations.main.name == x
        if x in ("other_tasks_mean", "log10_params"):  # drawing takes long
            output.save(told, tmp_path / "out")
        output.show(told)
        # Neither is measured on documents, of its own task or of another.
        assert told.tables["swapped_tasks"].empty

    def test_the_other_tasks_have_no_part_in_the_mean(self, tmp_path):
        self.save(tmp_path)
        told = fit_runs(tmp_path, x=["other_tasks_mean"], resamples=QUICK)
        assert told.observations.main_score == "arc acc"
        rows = told.tables["correlations"].set_index(["score", "predictor", "method"])
        assert np.isfinite(rows.loc[("arc acc", "other_tasks_mean", "pearson"), "coefficient"])
        assert "mean of 2 scores" in told.observations.scores

    def test_the_other_tasks_have_no_curve_over_checkpoints(self, tmp_path):
        rng = np.random.default_rng(0)
        for model in "abcd":
            for step in (1, 10):
                name = f"out/{model}/checkpoint-{step}"
                scores = {task: rng.uniform(0.3, 0.7) for task in ("arc", "gsm")}
                save_model(tmp_path, name, rng.uniform(0.1, 0.4), scores)
        told = fit_runs(tmp_path, x=["other_tasks_mean"], resamples=QUICK)
        assert told.tables["checkpoints"].empty
        assert "no curves over checkpoints, as other_tasks_mean compares models" in told.notes

    @pytest.mark.parametrize(
        ("x", "tasks", "models"),
        [
            ("other_tasks_mean", ("arc",), 8),  # no other task
            ("other_tasks_mean", ("arc", "gsm"), 3),  # too few models to be seen from
            ("n_heads", ("arc",), 3),  # of no model
            ("tuned", ("arc",), 3),  # true or false
            ("score", ("arc", "gsm"), 3),
            ("score_error", ("arc", "gsm"), 3),
            ("n_samples", ("arc", "gsm"), 3),
        ],
    )
    def test_what_is_no_number_of_models_is_refused(self, tmp_path, x, tasks, models):
        """These ended in tracebacks."""
        self.save(tmp_path, tasks=tasks, models=models)
        with pytest.raises(CouplingError, match=f"got no predictor '{x}', expected one of coup"):
            fit_runs(tmp_path, x=[x], resamples=QUICK)

    def test_copies_are_dropped_before_the_other_tasks_count(self, tmp_path):
        """Of four models one was a copy: the other three have no summary of the other tasks."""
        self.save(tmp_path, models=3)
        save_model(tmp_path, "copy", 0.2, {"arc": 0.4, "gsm": 0.6})
        save_model(tmp_path, "copied", 0.2, {"arc": 0.4, "gsm": 0.6})
        assert "other_tasks_mean" in [p.name for p in observations(tmp_path).predictors]
        (tmp_path / "m0").rename(tmp_path.parent / f"{tmp_path.name}_m0")
        with pytest.raises(CouplingError, match="got no predictor 'other_tasks_mean'"):
            observations(tmp_path, x=["other_tasks_mean"])

    def test_without_any_number_it_is_said(self, tmp_path):
        def forget(run):
            run["config"]["coupling"]["tasks"]["arc"]["measures"] = {}
            for name in ("n_params", "n_layers", "d_model"):
                del run["config"]["coupling"][name]
            del run["config"]["model_num_parameters"]

        for i in range(3):
            save_model(tmp_path, f"m{i}", 0.2, {"arc": 0.3 + i / 10}, change=forget)
        with pytest.raises(CouplingError, match="got no number that could predict a score; measu"):
            observations(tmp_path)
        with pytest.raises(CouplingError, match="no predictor 'speed', expected a number of the f"):
            observations(tmp_path, x=["speed"])

    def test_no_name_is_the_default(self, tmp_path):
        self.save(tmp_path, models=3)
        assert observations(tmp_path, x=[]).main.name == "coupling@10"
