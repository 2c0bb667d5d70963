"""From saved runs to findings: the right numbers go into the statistics, and what comes out is said, saved and drawn.

The statistics themselves are tested in test_statistics.py; here is their assembly, on runs made of known numbers.
"""

import json
import math
import re
import warnings

import numpy as np
import pandas as pd
import pytest
from saved_runs import DATE, record, sample, save, task_summary, write_samples
from scipy import stats

from lm_eval_coupling import cli
from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.fit import across, output
from lm_eval_coupling.fit.findings import fit_runs
from lm_eval_coupling.fit.observations import observe
from lm_eval_coupling.fit.scores import scored_rows
from lm_eval_coupling.fit.training import along_training, checkpoints
from lm_eval_coupling.fit.within import POOLED, load_documents
from lm_eval_coupling.saved.results import load_runs
from lm_eval_coupling.saved.run import find_runs
from lm_eval_coupling.statistics import correlation

QUICK = 199  # resamples


def save_model(folder, model, coupling, scores, *, date=DATE, rows=(), change=None, **about):
    """A run with this coupling@10 and this accuracy on every task (of 50 documents); the folder it is in."""
    summaries = {task: task_summary(coupling + 0.01) for task in scores}
    about = {"fingerprint": model, "run_id": model} | about
    where = save(folder, summaries, model=model, date=date, rows=rows, **about)
    file = where / f"results_{date}.json"
    run = json.loads(file.read_text())
    for task, accuracy in scores.items():
        run["results"][task] |= {"acc,none": accuracy, "acc_stderr,none": math.sqrt(accuracy * (1 - accuracy) / 49)}
    if change:
        change(run)
    file.write_text(json.dumps(run))
    return where


def observations(folder, *, x=None, **kwargs):
    notes = []
    return observe(scored_rows(load_runs(folder), notes, **kwargs), notes, x=x)


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """Twelve models of three families whose accuracy depends on coupling, not on size."""
    folder, rng = tmp_path_factory.mktemp("series"), np.random.default_rng(0)
    truth = []
    for i in range(12):
        coupling, size = rng.uniform(0.1, 0.3), 10 ** rng.uniform(8, 10)
        scores = {"arc": 0.2 + 1.5 * coupling + rng.normal(0, 0.03), "gsm": 0.1 + 2 * coupling + rng.normal(0, 0.05)}
        model = f"org/{'abc'[i % 3]}-{i + 1}b{'-chat' if i % 2 else ''}"
        save_model(folder, model, coupling, scores, n_params=size)
        truth.append({"label": model[4:], "coupling": coupling, "size": math.log10(size)} | scores)
    return folder, pd.DataFrame(truth).set_index("label")


@pytest.fixture(scope="module")
def found(series):
    return fit_runs(series[0], x=["coupling@10", "coupling@30", "line_shape_score"], resamples=QUICK)


class TestObservations:
    def test_one_row_per_model_and_score_and_the_mean(self, series):
        truth = series[1]
        frame = observations(series[0]).frame
        assert list(dict.fromkeys(frame["score_of"])) == ["arc acc", "gsm acc", "mean of 2 scores"]
        rows = {score: of.set_index("label").loc[truth.index] for score, of in frame.groupby("score_of")}
        np.testing.assert_allclose(rows["arc acc"]["score"], truth["arc"])
        np.testing.assert_allclose(rows["mean of 2 scores"]["score"], (truth["arc"] + truth["gsm"]) / 2)
        np.testing.assert_allclose(rows["mean of 2 scores"]["coupling@10"], truth["coupling"])
        np.testing.assert_allclose(rows["gsm acc"]["log10_params"], truth["size"])
        errors = [np.sqrt(truth[task] * (1 - truth[task]) / 49) for task in ("arc", "gsm")]
        np.testing.assert_allclose(rows["mean of 2 scores"]["score_error"], np.hypot(*errors) / 2)
        np.testing.assert_allclose(rows["mean of 2 scores"]["coupling_stderr@10"], math.hypot(0.01, 0.01) / 2)
        assert set(frame["family"]) == {"a", "b", "c"} and frame["tuned"].sum() == 6 * 3

    def test_the_predictor_in_question_comes_first(self, series):
        assert observations(series[0]).main.name == "coupling@10"
        found = observations(series[0], x=["line_shape_score", "coupling@30"])
        assert [p.name for p in found.predictors] == ["line_shape_score", "coupling@30", "log10_params"]
        assert found.main.error == "line_shape_score_stderr" and found.predictors[1].error == "coupling_stderr@30"
        with pytest.raises(CouplingError, match="no predictor 'coupling@7', expected one of coupling@10"):
            observations(series[0], x=["coupling@7"])

    def test_numbers_of_the_facts_are_predictors(self, series, tmp_path):
        (tmp_path / "facts.csv").write_text("model,loss\n" + "".join(f"{m},{i}\n" for i, m in enumerate(series[1].index)))
        found = fit_runs(series[0], x=["loss"], facts=tmp_path / "facts.csv", resamples=QUICK)
        correlated = found.tables["correlations"].query("predictor == 'loss' and method == 'pearson' and score == 'arc acc'")
        expected = stats.pearsonr(np.arange(12), series[1]["arc"])[0]
        assert correlated["coefficient"].item() == pytest.approx(expected)

    def test_models_without_coupling_stay_out(self, tmp_path):
        save_model(tmp_path, "org/a", 0.1, {"arc": 0.3})
        save(tmp_path, {"arc": task_summary()}, model="org/plain", coupling=False)
        found = observations(tmp_path)
        assert list(found.frame["label"]) == ["a"] and "without coupling and left out: plain" in found.notes
        with pytest.raises(CouplingError, match="without coupling only; evaluate .* --model coupling-hf"):
            observations(tmp_path / "org__plain")

    def test_the_same_weights_under_two_names_count_once(self, tmp_path):
        save_model(tmp_path, "org/a", 0.1, {"arc": 0.3}, fingerprint="same")
        save_model(tmp_path, "/local/copy", 0.2, {"arc": 0.4}, fingerprint="same", date="2025-07-01T00-00-00")
        found = observations(tmp_path)
        assert list(found.frame["label"]) == ["copy"]
        assert "the same weights under another name, counted once: a" in found.notes

    def test_of_checkpoints_the_last_counts(self, tmp_path):
        for step in (1, 10, 100):
            model = f"out/a/checkpoint-{step}"
            save_model(tmp_path, model, step / 1000, {"arc": 0.3})
        found = observations(tmp_path)
        assert list(found.frame["label"]) == ["a/checkpoint-100"]
        assert "of 1 models the last checkpoint counts, 2 rows do not" in found.notes

    def test_labels_tell_models_apart_and_no_more(self, tmp_path):
        """Regression: of two folders with one last name the labels were the whole paths, and in notes they had one name."""
        for i, model in enumerate(("/home/me/a/base", "/home/me/b/base", "org/other")):
            save_model(tmp_path, model, i / 10 + 0.1, {"arc": 0.3})
        save(tmp_path, {"arc": task_summary()}, model="/home/me/c/base", coupling=False)
        found = observations(tmp_path)
        assert list(found.frame["label"]) == ["a/base", "b/base", "other"]
        assert "without coupling and left out: c/base" in found.notes

    def test_tasks_measured_with_other_weights_are_of_another_model(self, tmp_path):
        """Regression: a mean over tasks took them for one model's."""
        save_model(tmp_path, "org/a", 0.1, {"arc": 0.3}, fingerprint="before")
        save_model(tmp_path, "org/a", 0.1, {"gsm": 0.3}, fingerprint="after", date="2025-07-01T00-00-00")
        save_model(tmp_path, "org/b", 0.1, {"arc": 0.3, "gsm": 0.4})
        found = observations(tmp_path)
        assert set(found.frame["label"]) == {"a #before", "a #after", "b"}
        assert "not in the mean, as a score is missing: a #after, a #before" in found.notes

    @pytest.mark.parametrize(
        ("key", "what"), [("n-shot", "0 and 5 few-shot examples"), ("versions", "0 and 5 as version of the task")]
    )
    def test_scores_that_do_not_compare_are_refused(self, tmp_path, key, what):
        for model, count in (("a", 0), ("b", 5)):
            save_model(tmp_path, model, 0.1, {"arc": 0.3}, change=lambda run, n=count: run.update({key: {"arc": n}}))
        with pytest.raises(CouplingError, match=rf"got arc with {what} \(.*a.results.*b.results.*--mixed keep"):
            observations(tmp_path)
        assert len(observations(tmp_path, mixed="keep").frame) == 2

    def test_what_may_make_scores_differ_is_noted(self, tmp_path):
        for model, count in (("a", 50), ("b", 20)):
            about = {"n-samples": {"arc": {"original": 100, "effective": count}}, "lm_eval_version": f"0.4.{count}"}
            save_model(tmp_path, model, 0.1, {"arc": 0.3}, change=lambda run, about=about: run.update(about))
        notes = observations(tmp_path).notes
        assert "models differ in the numbers of documents of arc" in notes
        assert "the runs are of lm-eval 0.4.20, 0.4.50" in notes

    def test_groups_stand_for_their_tasks_unless_named(self, tmp_path):
        def add_group(run):
            run["results"]["both"] = {"acc,none": 0.4, "acc_stderr,none": 0.01}
            run["group_subtasks"] = {"both": ["arc", "gsm"]}

        save_model(tmp_path, "a", 0.1, {"arc": 0.3, "gsm": 0.5}, change=add_group)
        assert list(observations(tmp_path).frame["score_of"]) == ["both acc"]
        assert observations(tmp_path, tasks=["arc", "gsm"]).scores == ["arc acc", "gsm acc", "mean of 2 scores"]
        with pytest.raises(CouplingError, match="no task 'nothing', expected one of arc, both, gsm"):
            observations(tmp_path, tasks=["nothing"])

    def test_tasks_of_a_group_without_a_score_stand_for_themselves(self, tmp_path):
        def add_groups(run):
            run["results"] |= {"all": {"alias": "all"}, "some": {"acc,none": 0.4}}
            run["group_subtasks"] = {"all": ["arc", "some"], "some": ["gsm"]}

        save_model(tmp_path, "a", 0.1, {"arc": 0.3, "gsm": 0.5, "alone": 0.7}, change=add_groups)
        scores = ["alone acc", "arc acc", "some acc", "mean of 3 scores"]
        assert observations(tmp_path).scores == scores

    def test_metrics_by_name_and_losses_with_their_sign_changed(self, tmp_path):
        def add_loss(run):
            run["results"]["arc"] |= {"word_perplexity,none": 12.0, "word_perplexity_stderr,none": "N/A"}

        save_model(tmp_path, "a", 0.1, {"arc": 0.3}, change=add_loss)
        assert observations(tmp_path, score="f1").frame["score"].tolist() == [0.4]
        row = observations(tmp_path, score="word_perplexity").frame.iloc[0]
        assert row["score"] == -12 and row["score_of"] == "arc −word_perplexity" and math.isnan(row["score_error"])
        with pytest.raises(CouplingError, match="no score 'bleu' in these runs, expected one of acc,none, f1,strict, word"):
            observations(tmp_path, score="bleu")

    def test_a_perfect_score_has_an_error_too(self, tmp_path):
        save_model(tmp_path, "a", 0.1, {"arc": 1.0})
        shrunk = 52 / 54  # two right and two wrong answers added
        expected = math.sqrt(shrunk * (1 - shrunk) / 54)
        assert observations(tmp_path).frame["score_error"].tolist() == pytest.approx([expected])

    def test_a_model_that_lacks_a_task_is_not_in_the_mean(self, tmp_path):
        save_model(tmp_path, "a", 0.1, {"arc": 0.3, "gsm": 0.2})
        save_model(tmp_path, "b", 0.2, {"arc": 0.4})
        found = observations(tmp_path)
        assert list(found.frame["label"]) == ["a", "b", "a", "a"]
        assert "not in the mean, as a score is missing: b" in found.notes


class TestAcross:
    def test_correlations_are_those_of_the_saved_numbers(self, series, found):
        truth, rows = series[1], found.tables["correlations"].set_index(["score", "predictor", "method"])
        for method, expected in (
            ("pearson", stats.pearsonr(truth["coupling"], truth["arc"])[0]),
            ("spearman", stats.spearmanr(truth["coupling"], truth["arc"])[0]),
            ("kendall", stats.kendalltau(truth["coupling"], truth["arc"])[0]),
        ):
            assert rows.loc[("arc acc", "coupling@10", method), "coefficient"] == pytest.approx(expected)
        size = stats.pearsonr(truth["size"], truth["gsm"])[0]
        assert rows.loc[("gsm acc", "log10_params", "pearson"), "coefficient"] == pytest.approx(size)

    def test_p_values_are_adjusted_for_the_many_scores(self, found):
        rows = found.tables["correlations"].query("predictor == 'log10_params' and method == 'pearson'")
        p = np.sort(rows["p"].to_numpy())
        by_hand = np.maximum.accumulate(np.minimum(1, p * [3, 2, 1]))
        np.testing.assert_allclose(np.sort(rows["p_holm"]), by_hand)
        pearson = found.tables["correlations"].query("method == 'pearson'")
        np.testing.assert_allclose(pearson["p_bh"], stats.false_discovery_control(pearson["p"], method="bh"))

    def test_lines_with_and_without_errors(self, series, found):
        truth, fits = series[1], found.fits
        plain = fits["arc acc", "coupling@10", "line", "none"]
        expected = stats.linregress(truth["coupling"], truth["arc"])
        assert plain.coefficients["slope"].value == pytest.approx(expected.slope)
        assert plain.r2 == pytest.approx(expected.rvalue**2)
        weights = np.sqrt(49 / (truth["arc"] * (1 - truth["arc"])))
        slope = np.polyfit(truth["coupling"], truth["arc"], 1, w=weights)[0]
        assert fits["arc acc", "coupling@10", "line", "y"].coefficients["slope"].value == pytest.approx(slope)
        assert fits["arc acc", "coupling@10", "line", "x and y"].reason is None
        assert ("arc acc", "log10_params", "line", "x and y") not in fits  # sizes are known exactly

    def test_subsets(self, series, found):
        truth, rows = series[1], found.tables["subsets"].set_index(["score", "subset"])
        assert list(rows.loc["arc acc"].index) == ["all", "base", "tuned", "family a", "family b", "family c"]
        base = truth[[not name.endswith("-chat") for name in truth.index]]
        expected = stats.pearsonr(base["coupling"], base["arc"])[0]
        assert rows.loc[("arc acc", "base"), "coefficient"] == pytest.approx(expected)
        assert rows.loc[("arc acc", "family a"), "n"] == 4

    def test_nested_models(self, series, found):
        truth = series[1]
        row = found.tables["nested"].set_index(["score", "given"]).loc[("arc acc", "log10_params")]
        assert row["without_r2"] == pytest.approx(stats.pearsonr(truth["size"], truth["arc"])[0] ** 2)
        X = np.column_stack([np.ones(12), truth["size"], truth["coupling"]])
        residual = truth["arc"] - X @ np.linalg.lstsq(X, truth["arc"], rcond=None)[0]
        assert row["with_predictor_r2"] == pytest.approx(1 - residual.var() / truth["arc"].var())
        assert row["families"] == 3

    def test_what_is_expected_to_go_against_the_score_is_turned_around(self, series):
        plain = across.comparisons(observations(series[0]))["arc acc", "coupling@10", "log10_params"]
        turned = across.comparisons(observations(series[0], x=["miscoupling@10"]))[
            "arc acc", "miscoupling@10", "log10_params"
        ]
        # In these runs every measure of a model is the same number, so that only the sign tells them apart.
        assert turned.first == pytest.approx(-plain.first) and turned.second == pytest.approx(plain.second)

    def test_truth_is_found_and_size_is_not_given_the_credit(self, found):
        words = " ".join(found.words)
        assert words.startswith("12 models of 3 families and 3 scores.")
        assert "Higher coupling@10 goes with higher arc acc." in words
        assert "That of coupling@10 is larger than that of log10_params." in words
        assert "coupling@10 says something of mean of 2 scores beyond log10_params." in words
        assert "3 families are few" in words
        assert found.notes == ("the same for all models: line_shape_score, n_layers, d_model",)

    def test_no_relation_is_claimed_of_noise(self):
        """Holm promises that at most 5% of families of tests have a false claim; of 60 families of three scores."""
        rng, claims, n = np.random.default_rng(1), 0, 10
        for _ in range(60):
            results = {
                (name, "x", "pearson"): correlation(rng.normal(size=n), rng.normal(size=n), resamples=199) for name in "abc"
            }
            claims += (across.correlation_table(results)["p_holm"] < 0.05).any()
        assert claims <= stats.binom.ppf(0.9999, 60, 0.05)

    def test_few_models_conclude_nothing(self, tmp_path):
        for i in range(4):
            save_model(tmp_path, f"org/a-{i}b", 0.1 + i / 20, {"arc": 0.3 + i / 10}, n_params=10.0 ** (8 + i))
        words = " ".join(fit_runs(tmp_path, x=["coupling@10"], resamples=QUICK).words)
        assert "Fewer than 8 models: whatever the numbers, no conclusion can be drawn." in words
        assert "They are relatives, not a sample of models" in words
        assert "too few to conclude anything" in words and "goes with higher" not in words

    def test_collinear_predictors_are_told(self, tmp_path):
        rng = np.random.default_rng(3)
        for i in range(10):
            coupling = 0.1 + i / 50
            noisy = 10 ** (8 + 10 * coupling + rng.normal(0, 0.01))
            save_model(tmp_path, f"org/{'xyz'[i % 3]}-{i}b", coupling, {"arc": 0.3 + rng.uniform(0, 0.4)}, n_params=noisy)
        assert re.search(
            r"the covariates explain (9\d\.\d|more than 99.9)% of coupling@10",
            " ".join(fit_runs(tmp_path, resamples=QUICK).words),
        )


def save_documents(folder, model, values, right, task="arc", likelihoods=None, **about):
    """A run whose documents have this coupling@10 and these answers; samples are in another order than records."""
    rows = [record(task, i) | {"n_tokens": 10 + i} for i in range(len(values))]
    for row, coupling in zip(rows, values, strict=True):
        row["normalized_miscoupling"] = np.full_like(row["normalized_miscoupling"], 1 - coupling)
    where = save_model(folder, model, float(np.mean(values)), {task: float(np.mean(right))}, rows=rows, **about)
    samples = []
    for i, correct in enumerate(right):
        chances = (likelihoods or {}).get(i, (-1.0, -2.0) if not correct else (-2.0, -1.0))  # the second choice is right
        given = [[str(chance), "False"] for chance in chances]
        samples.append(sample(f"d{i}", acc=float(correct), doc_id=99 - i, filtered_resps=given))
    write_samples(where, task, samples[::-1])
    return where


class TestDocuments:
    VALUES, RIGHT = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8], [0, 0, 1, 0, 1, 0, 1, 1]

    def documents(self, folder):
        runs = load_runs(folder)
        return load_documents(find_runs(folder).runs, runs.assign(label=runs["model"]))

    def test_records_meet_their_answers(self, tmp_path):
        save_documents(tmp_path, "a", self.VALUES, self.RIGHT, likelihoods={1: (-0.5, -4.0), 2: (-9.0, -1.0)})
        found = self.documents(tmp_path).set_index("doc_hash")
        order = [f"d{i}" for i in range(8)]
        np.testing.assert_allclose(found.loc[order, "coupling@10"], self.VALUES, atol=1e-6)
        assert found.loc[order, "right"].tolist() == self.RIGHT
        assert found.loc[order, "prompt_tokens"].tolist() == list(range(10, 18))
        assert found.loc["d1", ["confidence", "margin"]].tolist() == [3.5, -3.5]
        assert found.loc["d2", ["confidence", "margin"]].tolist() == [8.0, 8.0]

    def test_auroc_by_hand(self, tmp_path):
        save_documents(tmp_path, "a", self.VALUES, self.RIGHT)
        found = fit_runs(tmp_path, resamples=QUICK)
        row = found.tables["auroc"].set_index("predictor").loc["coupling@10"]
        # Of 16 pairs of a right and a wrong answer, 13 have the higher coupling right.
        assert row["auroc"] == 13 / 16 and (row["right"], row["wrong"]) == (4, 4)
        assert found.words[0] == "One model only: nothing to compare across models."
        assert "4 answers of one kind are too few to conclude anything" in found.words[1]

    def test_several_tasks_are_pooled_within(self, tmp_path):
        where = save_documents(tmp_path, "a", self.VALUES, self.RIGHT)
        # A second, easier task of lower coupling, in which it says the opposite.
        save_documents(tmp_path / "other", "a", [v / 10 for v in self.VALUES], self.RIGHT[::-1], task="easy")
        found = fit_runs([where.parent], resamples=QUICK).tables["auroc"]
        areas = found[found["predictor"] == "coupling@10"].set_index("task")["auroc"]
        assert areas["arc"] == 13 / 16 and areas["easy"] == pytest.approx(3 / 16) and areas[POOLED] == 0.5

    def test_coupling_that_decides_is_found_with_length_and_confidence_fixed(self, tmp_path):
        rng = np.random.default_rng(0)
        values = rng.uniform(0.1, 0.5, 200)
        right = (rng.uniform(size=200) < 1 / (1 + np.exp(-12 * (values - 0.3)))).astype(int)
        likelihoods = {i: tuple(rng.normal(size=2)) for i in range(200)}
        save_documents(tmp_path, "a", values, right, likelihoods=likelihoods)
        found = fit_runs(tmp_path, resamples=QUICK)
        logistic = found.tables["logistic"].set_index(["predictor", "given"])
        row = logistic.loc[("coupling@10", "prompt_tokens + confidence")]
        true = 12 * values.std(ddof=1)
        assert abs(row["log_odds"] - true) < 3 * row["log_odds_stderr"] and row["p"] < 0.001
        assert "Higher coupling@10 goes with higher odds of a right answer." in found.words[-1]
        assert logistic.loc[("line_shape_score", ""), "p"] > 0.01

    def test_answers_that_are_neither_right_nor_wrong(self, tmp_path):
        where = save_documents(tmp_path, "a", self.VALUES, self.RIGHT)
        share = [0.1 * i for i in range(8)]
        write_samples(where, "arc", [sample(f"d{i}", acc=share[i]) for i in range(7)] + [sample("d7", acc=1.0)])
        found = self.documents(tmp_path)
        assert found["right"].isna().all() and found["margin"].isna().all() and found["score"].notna().all()
        assert "it needs lm-eval's --log_samples" in fit_runs(tmp_path, resamples=QUICK).words[-1]

    def test_an_untrained_twin_answers_nothing(self, tmp_path):
        rows = [record("arc", i) | {"weights": "trained"} for i in range(2)]
        twins = [record("arc", i, seed=5) | {"weights": "untrained"} for i in range(2)]
        where = save_model(tmp_path, "a", 0.2, {"arc": 0.5}, rows=[*rows, *twins])
        write_samples(where, "arc", [sample("d0", acc=1.0), sample("d1")])
        found = self.documents(tmp_path)
        assert len(found) == 2
        assert found["line_shape_score"].tolist() == pytest.approx([row["line_shape_score"] for row in rows])

    def test_tables_of_other_runs_are_left_alone(self, tmp_path):
        save_documents(tmp_path, "a", self.VALUES, self.RIGHT, run_id="old")
        save_documents(tmp_path, "a", self.VALUES[::-1], self.RIGHT, run_id="new", date="2025-07-01T00-00-00")
        assert len(self.documents(tmp_path)) == 8


class TestTraining:
    def test_levels_and_changes(self, tmp_path):
        couplings, scores = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.2, 0.5, 0.4, 0.7, 0.6, 0.9]
        for i, (coupling, score) in enumerate(zip(couplings, scores, strict=True)):
            save_model(tmp_path / str(i), f"out/a/checkpoint-{10**i}", coupling, {"arc": score})
        rows = checkpoints(scored_rows(load_runs(tmp_path), []), "coupling@10")
        assert rows["step"].tolist() == [1, 10, 100, 1000, 10_000, 100_000]
        found = along_training(rows, "coupling@10", resamples=QUICK)
        levels = found["a", "arc acc", "coupling@10", "levels"]
        assert levels.coefficient == pytest.approx(stats.spearmanr(couplings, scores)[0]) and levels.n == 6
        assert found["a", "arc acc", "coupling@10", "changes"].n == 5

    def test_a_single_checkpoint_is_no_curve(self, tmp_path):
        save_model(tmp_path, "out/a/checkpoint-5", 0.1, {"arc": 0.3})
        assert checkpoints(scored_rows(load_runs(tmp_path), []), "coupling@10").empty


class TestOutput:
    def test_every_number_is_saved(self, found, tmp_path):
        files = {file.name for file in output.save(found, tmp_path)}
        assert files >= {"observations.csv", "correlations.csv", "fits.csv", "subsets.csv", "nested.csv", "fit.json"}
        assert {
            f"{name}.{kind}" for name in ("scatter", "scatter_1", "predictors", "ranks") for kind in ("png", "svg")
        } <= files
        assert files == {file.name for file in tmp_path.iterdir()}
        saved = json.loads((tmp_path / "fit.json").read_text(), parse_constant=pytest.fail)
        assert saved["predictor"] == "coupling@10" and len(saved["tables"]["correlations"]) == len(
            found.tables["correlations"]
        )
        again = pd.read_csv(tmp_path / "correlations.csv")
        np.testing.assert_allclose(again["coefficient"], found.tables["correlations"]["coefficient"])
        told = (tmp_path / "finding.txt").read_text()
        assert all(paragraph in told for paragraph in found.words) and all(note in told for note in found.notes)

    def test_the_command(self, series, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "140")
        out = tmp_path / "new" / "folder"
        words = ["fit", str(series[0]), "--x", "coupling@30", "--tasks", "arc", "--out", str(out)]
        assert cli.main(words) == 0
        printed = capsys.readouterr().out
        assert "coupling@30 and the score, across models" in printed and "files in" in printed
        assert "What coupling@30 says beyond size" in printed and "family a" in printed
        assert (out / "scatter.svg").is_file() and not (out / "scatter_1.svg").exists()

    def test_mistakes_are_one_sentence(self, series, tmp_path, capsys):
        assert cli.main(["fit", str(series[0]), "--score", "bleu", "--out", str(tmp_path)]) == 2
        assert "lm-eval-coupling: got no score 'bleu'" in capsys.readouterr().err
        (tmp_path / "file").write_text("")
        with pytest.raises(CouplingError, match="file for the results, which cannot be written"):
            output.save(fit_runs(series[0], x=["coupling@10"], tasks=["arc"], resamples=QUICK), tmp_path / "file")

    def test_documents_are_drawn_and_shown(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "140")
        rng = np.random.default_rng(0)
        for model in ("a", "b"):
            save_documents(tmp_path / "runs", model, rng.uniform(0.1, 0.5, 30), rng.integers(0, 2, 30))
        found = fit_runs(tmp_path / "runs", x=["coupling@10"], resamples=QUICK)
        files = {file.name for file in output.save(found, tmp_path / "out")}
        assert {"auroc.png", "calibration.svg", "documents.csv", "logistic.csv", "graded.csv", "calibration.csv"} <= files
        output.show(found)
        assert "coupling@10 and right answers, within each model" in capsys.readouterr().out

    def test_training_is_drawn(self, tmp_path):
        for i in range(4):
            save_model(tmp_path / str(i), f"out/a/checkpoint-{10**i}", 0.1 * (i + 1), {"arc": 0.2 * (i + 1)})
        found = fit_runs(tmp_path, resamples=QUICK)
        assert "training.png" in {file.name for file in output.save(found, tmp_path / "out")}
        assert any(words.startswith("Along the training of a: ") for words in found.words)


def test_a_failed_measurement_is_no_number(tmp_path):
    rows = [record("arc", 0), record("arc", 1, reason="out of memory")]
    where = save_model(tmp_path, "a", 0.2, {"arc": 0.5}, rows=rows)
    write_samples(where, "arc", [sample("d0", acc=1.0), sample("d1")])
    runs = load_runs(tmp_path)
    found = load_documents(find_runs(tmp_path).runs, runs.assign(label="a")).set_index("doc_hash")
    assert math.isnan(found.loc["d1", "coupling@10"]) and not math.isnan(found.loc["d0", "coupling@10"])


class TestFaultsOfReading:
    def save(self, folder, model, score, number, **changes):
        where = save_model(folder, model, 0.1 + 0.01 * number, {"arc": score})
        (file,) = where.glob("results_*.json")
        run = json.loads(file.read_text())
        for column in ("acc", "acc_stderr"):
            run["results"]["arc"][column.replace("acc", "likelihood_diff") + ",none"] = run["results"]["arc"].pop(
                f"{column},none"
            )
        file.write_text(json.dumps(run | changes))

    def test_the_direction_of_a_metric_is_that_of_lm_eval(self, tmp_path):
        """A bias that is better when lower was taken as better when higher, as its name is not that of a loss."""
        for i in range(10):
            told = {"arc": {"likelihood_diff": False}}
            self.save(tmp_path, f"m{i}", 0.9 - 0.05 * i, i, higher_is_better=told)
        found = fit_runs(tmp_path, score="likelihood_diff", resamples=QUICK)
        assert found.observations.scores == ["arc −likelihood_diff"]
        pearson = found.tables["correlations"].query("predictor == 'coupling@10' and method == 'pearson'")
        assert pearson["coefficient"].item() == pytest.approx(1)

    def test_directions_that_disagree_are_refused(self, tmp_path):
        for i in range(3):
            self.save(tmp_path, f"m{i}", 0.5, i, higher_is_better={"arc": {"likelihood_diff": bool(i)}})
        with pytest.raises(CouplingError, match="likelihood_diff, better when higher in .*m1.* and when lower in .*m0"):
            fit_runs(tmp_path, score="likelihood_diff", resamples=QUICK)

    def test_one_model_with_two_ways_of_prompting_is_refused_or_kept_apart(self, tmp_path):
        """The newer of a run with and one without a chat template counted, without a word."""
        for i in range(4):
            save_model(tmp_path / "plain", f"m{i}", 0.1 + 0.1 * i, {"arc": 0.3 + 0.1 * i})
            where = save_model(tmp_path / "chat", f"m{i}", 0.2 + 0.1 * i, {"arc": 0.35 + 0.1 * i})
            (file,) = where.glob("results_*.json")
            run = json.loads(file.read_text())
            run["config"]["coupling"]["run_id"] += "chat"
            file.write_text(json.dumps(run | {"chat_template": "{{x}}", "chat_template_sha": "1f2e3d4c"}))
        with pytest.raises(CouplingError, match="got arc of .*m0 with different prompts .*chat template 1f2e3d4c"):
            fit_runs(tmp_path, resamples=QUICK)
        kept = fit_runs(tmp_path, mixed="keep", resamples=QUICK)
        assert kept.observations.models == 8

    def test_no_warning_of_pandas(self, tmp_path):
        """`fit` printed pandas' PerformanceWarning when it had many predictors."""
        for i in range(4):
            save_model(tmp_path, f"m{i}", 0.1 + 0.1 * i, {"arc": 0.3 + 0.1 * i, "gsm": 0.3})
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.PerformanceWarning)
            output.save(fit_runs(tmp_path, resamples=QUICK), tmp_path / "out")
