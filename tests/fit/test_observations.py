"""The right numbers of saved runs become observations; what does not compare is refused."""

import json
import math
import warnings

import numpy as np
import pandas as pd
import pytest
from fitted_runs import QUICK, observations, save_model
from saved_runs import save, task_summary
from scipy import stats

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.fit import output
from lm_eval_coupling.fit.findings import fit_runs


class TestObservations:
    def test_one_row_per_model_and_score_and_the_mean(self, series):
        truth = series[1]
        frame = observations(series[0]).frame
        assert list(dict.fromkeys(frame["score_of"])) == ["arc acc", "gsm acc", "mean of 2 scores"]
        rows = {
            score: of.set_index("label").loc[truth.index] for score, of in frame.groupby("score_of")
        }
        np.testing.assert_allclose(rows["arc acc"]["score"], truth["arc"])
        np.testing.assert_allclose(
            rows["mean of 2 scores"]["score"], (truth["arc"] + truth["gsm"]) / 2
        )
        np.testing.assert_allclose(rows["mean of 2 scores"]["coupling@10"], truth["coupling"])
        np.testing.assert_allclose(rows["gsm acc"]["log10_params"], truth["size"])
        errors = [np.sqrt(truth[task] * (1 - truth[task]) / 49) for task in ("arc", "gsm")]
        np.testing.assert_allclose(rows["mean of 2 scores"]["score_error"], np.hypot(*errors) / 2)
        np.testing.assert_allclose(
            rows["mean of 2 scores"]["coupling_stderr@10"], math.hypot(0.01, 0.01) / 2
        )
        assert set(frame["family"]) == set("abcdef") and frame["tuned"].sum() == 9 * 3

    def test_the_predictor_in_question_comes_first(self, series):
        assert observations(series[0]).main.name == "coupling@10"
        found = observations(series[0], x=["line_shape_score", "coupling@30"])
        assert [p.name for p in found.predictors] == [
            "line_shape_score",
            "coupling@30",
            "other_tasks_mean",
            "other_tasks_component",
            "log10_params",
        ]
        assert (
            found.main.error == "line_shape_score_stderr"
            and found.predictors[1].error == "coupling_stderr@30"
        )
        with pytest.raises(
            CouplingError, match="no predictor 'coupling@7', expected one of coupling@10"
        ):
            observations(series[0], x=["coupling@7"])

    def test_numbers_of_the_facts_are_predictors(self, series, tmp_path):
        (tmp_path / "facts.csv").write_text(
            "model,loss\n" + "".join(f"{m},{i}\n" for i, m in enumerate(series[1].index))
        )
        found = fit_runs(series[0], x=["loss"], facts=tmp_path / "facts.csv", resamples=QUICK)
        correlated = found.tables["correlations"].query(
            "predictor == 'loss' and method == 'pearson' and score == 'arc acc'"
        )
        expected = stats.pearsonr(np.arange(18), series[1]["arc"])[0]
        assert correlated["coefficient"].item() == pytest.approx(expected)

    def test_models_without_coupling_stay_out(self, tmp_path):
        save_model(tmp_path, "org/a", 0.1, {"arc": 0.3})
        save(tmp_path, {"arc": task_summary()}, model="org/plain", coupling=False)
        found = observations(tmp_path)
        assert (
            list(found.frame["label"]) == ["a"]
            and "without coupling and left out: plain" in found.notes
        )
        with pytest.raises(
            CouplingError, match="without coupling only; evaluate .* --model coupling-hf"
        ):
            observations(tmp_path / "org__plain")

    def test_the_same_weights_under_two_names_count_once(self, tmp_path):
        save_model(tmp_path, "org/a", 0.1, {"arc": 0.3}, fingerprint="same")
        save_model(
            tmp_path,
            "/local/copy",
            0.2,
            {"arc": 0.4},
            fingerprint="same",
            date="2025-07-01T00-00-00",
        )
        found = observations(tmp_path)
        assert list(found.frame["label"]) == ["copy"]
        assert "the same weights under another name, counted once: a" in found.notes
        about = {
            "n-samples": {"arc": {"original": 99, "effective": 99}}
        }  # more documents count for more than a later date
        save_model(
            tmp_path,
            "org/a",
            0.1,
            {"arc": 0.3},
            fingerprint="same",
            change=lambda run: run.update(about),
        )
        assert list(observations(tmp_path).frame["label"]) == ["a"]

    def test_of_checkpoints_the_last_counts(self, tmp_path):
        for step in (1, 10, 100):
            model = f"out/a/checkpoint-{step}"
            save_model(tmp_path, model, step / 1000, {"arc": 0.3})
        found = observations(tmp_path)
        assert list(found.frame["label"]) == ["a/checkpoint-100"]
        assert "of 1 models the last checkpoint counts, 2 rows do not" in found.notes

    def test_labels_tell_models_apart_and_no_more(self, tmp_path):
        """Regression.

        Of two folders with one last name the labels were the whole paths, and in notes they had
        one name.
        """
        for i, model in enumerate(("/home/me/a/base", "/home/me/b/base", "org/other")):
            save_model(tmp_path, model, i / 10 + 0.1, {"arc": 0.3})
        save(tmp_path, {"arc": task_summary()}, model="/home/me/c/base", coupling=False)
        found = observations(tmp_path)
        assert list(found.frame["label"]) == ["a/base", "b/base", "other"]
        assert "without coupling and left out: c/base" in found.notes

    def test_tasks_measured_with_other_weights_are_of_another_model(self, tmp_path):
        """Regression: a mean over tasks took them for one model's."""
        save_model(tmp_path, "org/a", 0.1, {"arc": 0.3}, fingerprint="before")
        save_model(
            tmp_path, "org/a", 0.1, {"gsm": 0.3}, fingerprint="after", date="2025-07-01T00-00-00"
        )
        save_model(tmp_path, "org/b", 0.1, {"arc": 0.3, "gsm": 0.4})
        found = observations(tmp_path)
        assert set(found.frame["label"]) == {"a #before", "a #after", "b"}
        assert "no mean of the scores, as models do not share two of them" in found.notes

    @pytest.mark.parametrize(
        ("key", "what"),
        [
            ("n-shot", "different few-shot examples: 0-shot and 5-shot"),
            ("versions", "different task version: task version 0 and task version 5"),
        ],
    )
    def test_scores_that_do_not_compare_are_refused(self, tmp_path, key, what):
        for model, count in (("a", 0), ("b", 5)):
            save_model(
                tmp_path,
                model,
                0.1 + count / 100,
                {"arc": 0.3},
                change=lambda run, n=count: run.update({key: {"arc": n}}),
            )
        with pytest.raises(
            CouplingError, match=rf"got arc with {what} \(.*a.results.*b.results.*--mixed keep"
        ):
            observations(tmp_path)
        assert len(observations(tmp_path, mixed="keep").frame) == 2

    def test_what_may_make_scores_differ_is_noted(self, tmp_path):
        for model, count in (("a", 50), ("b", 20)):
            about = {
                "n-samples": {"arc": {"original": 100, "effective": count}},
                "lm_eval_version": f"0.4.{count}",
            }
            save_model(
                tmp_path,
                model,
                0.1,
                {"arc": 0.3},
                change=lambda run, about=about: run.update(about),
            )
        notes = observations(tmp_path).notes
        assert "models differ in the numbers of documents of arc" in notes
        assert "the runs are of lm-eval 0.4.20, 0.4.50" in notes

    def test_groups_stand_for_their_tasks_unless_named(self, tmp_path):
        def add_group(run):
            run["results"]["both"] = {"acc,none": 0.4, "acc_stderr,none": 0.01}
            run["group_subtasks"] = {"both": ["arc", "gsm"]}

        save_model(tmp_path, "a", 0.1, {"arc": 0.3, "gsm": 0.5}, change=add_group)
        assert list(observations(tmp_path).frame["score_of"]) == ["both acc"]
        assert observations(tmp_path, tasks=["arc", "gsm"]).scores == [
            "arc acc",
            "gsm acc",
            "mean of 2 scores",
        ]
        with pytest.raises(
            CouplingError, match="no task 'nothing', expected one of arc, both, gsm"
        ):
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
            run["results"]["arc"] |= {
                "word_perplexity,none": 12.0,
                "word_perplexity_stderr,none": "N/A",
            }

        save_model(tmp_path, "a", 0.1, {"arc": 0.3}, change=add_loss)
        assert observations(tmp_path, score="f1").frame["score"].tolist() == [0.4]
        row = observations(tmp_path, score="word_perplexity").frame.iloc[0]
        assert (
            row["score"] == -12
            and row["score_of"] == "arc −word_perplexity"
            and math.isnan(row["score_error"])
        )
        with pytest.raises(
            CouplingError,
            match="no score 'bleu' in these runs, expected one of acc,none, f1,strict, word",
        ):
            observations(tmp_path, score="bleu")

    def test_accuracies_and_losses_have_no_mean(self, tmp_path):
        """The mean of an accuracy and of −bits per byte was a score, of which the loss as a rival
        was the larger part.
        """

        def add_loss(run):
            score = {"bits_per_byte,none": run["results"]["text"].pop("acc,none")}
            for name in ("acc_stderr,none", "f1,strict", "f1_stderr,strict"):
                run["results"]["text"].pop(name)
            run["results"]["text"] |= score

        for i in range(3):
            scores = {"arc": 0.3 + i / 10, "gsm": 0.4, "text": 0.9 - i / 10}
            save_model(tmp_path, f"m{i}", 0.1 + i / 10, scores, change=add_loss)
        found = observations(tmp_path)
        assert found.scores == ["arc acc", "gsm acc", "text −bits_per_byte", "mean of 2 scores"]
        mean = found.frame.query("task == 'mean'").sort_values("label")
        np.testing.assert_allclose(mean["score"], [0.35, 0.4, 0.45])
        assert (
            "not in the mean of the scores, as lower is better: text −bits_per_byte" in found.notes
        )

    def test_a_perfect_score_has_an_error_too(self, tmp_path):
        save_model(tmp_path, "a", 0.1, {"arc": 1.0})
        shrunk = 52 / 54  # two right and two wrong answers added
        expected = math.sqrt(shrunk * (1 - shrunk) / 54)
        assert observations(tmp_path).frame["score_error"].tolist() == pytest.approx([expected])

    def test_a_model_that_lacks_a_task_is_not_in_the_mean(self, tmp_path):
        save_model(tmp_path, "a", 0.1, {"arc": 0.3, "gsm": 0.2})
        save_model(tmp_path, "b", 0.2, {"arc": 0.4})
        found = observations(tmp_path)
        assert list(found.frame["label"]) == ["a", "b", "a"]
        assert "no mean of the scores, as models do not share two of them" in found.notes
        assert found.main_score == "arc acc"


class TestFaultsOfReading:
    def save(self, folder, model, score, number, **changes):
        where = save_model(folder, model, 0.1 + 0.01 * number, {"arc": score})
        (file,) = where.glob("results_*.json")
        run = json.loads(file.read_text())
        for column in ("acc", "acc_stderr"):
            run["results"]["arc"][column.replace("acc", "likelihood_diff") + ",none"] = run[
                "results"
            ]["arc"].pop(f"{column},none")
        file.write_text(json.dumps(run | changes))

    def test_the_direction_of_a_metric_is_that_of_lm_eval(self, tmp_path):
        """A bias that is better when lower was taken as better when higher, as its name is not
        that of a loss.
        """
        for i in range(10):
            told = {"arc": {"likelihood_diff": False}}
            self.save(tmp_path, f"m{i}", 0.9 - 0.05 * i, i, higher_is_better=told)
        found = fit_runs(tmp_path, score="likelihood_diff", resamples=QUICK)
        assert found.observations.scores == ["arc −likelihood_diff"]
        pearson = found.tables["correlations"].query(
            "predictor == 'coupling@10' and method == 'pearson'"
        )
        assert pearson["coefficient"].item() == pytest.approx(1)

    def test_directions_that_disagree_are_refused(self, tmp_path):
        for i in range(3):
            self.save(
                tmp_path, f"m{i}", 0.5, i, higher_is_better={"arc": {"likelihood_diff": bool(i)}}
            )
        with pytest.raises(
            CouplingError,
            match="likelihood_diff, better when higher in .*m1.* and when lower in .*m0",
        ):
            fit_runs(tmp_path, score="likelihood_diff", resamples=QUICK)

    def test_one_model_with_two_ways_of_prompting_is_refused_or_kept_apart(self, tmp_path):
        """The newer of a run with and one without a chat template counted, without a word."""
        for i in range(4):
            save_model(tmp_path / "plain", f"m{i}", 0.1 + 0.1 * i, {"arc": 0.3 + 0.1 * i})
            where = save_model(tmp_path / "chat", f"m{i}", 0.2 + 0.1 * i, {"arc": 0.35 + 0.1 * i})
            (file,) = where.glob("results_*.json")
            run = json.loads(file.read_text())
            run["config"]["coupling"]["run_id"] += "chat"
            file.write_text(
                json.dumps(run | {"chat_template": "{{x}}", "chat_template_sha": "1f2e3d4c"})
            )
        with pytest.raises(
            CouplingError,
            match=r"got arc of .*m0 with different prompts \(without and chat template\)",
        ):
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


class TestWhatCounts:
    """Each model, task and number counts once, and what does not count is named."""

    def save(self, folder, scores, models=10, **about):
        for i in range(models):
            save_model(folder, f"org/m{i}-{i + 1}b", 0.2 + i / 50, scores(i), **about)

    def test_a_score_without_a_number_is_missing(self, tmp_path):
        def scores(i):
            return {"easy": 0.8 + i / 100, "hard": 0.2 + i / 100, "third": 0.5 + i / 100}

        def forget(run):
            run["results"]["hard"]["acc,none"] = None

        self.save(tmp_path, scores, models=9)
        save_model(tmp_path, "org/m9-10b", 0.4, scores(9), change=forget)
        found = observations(tmp_path)
        mean = found.frame[found.frame["task"] == "mean"].set_index("label")
        assert found.main_score == "mean of 2 scores" and len(mean) == 10
        assert mean.loc["m9-10b", "score"] == pytest.approx(0.74)
        assert mean["mean_of"].unique().tolist() == ["easy; third"]
        notes = " ".join(found.notes)
        assert "the mean is over 2 of 3 scores, without hard acc (no score of m9-10b)" in notes

    def test_with_two_tasks_the_model_is_left_out(self, tmp_path):
        self.save(tmp_path, lambda i: {"easy": 0.8 + i / 100, "hard": 0.2 + i / 100}, models=9)
        save_model(tmp_path, "org/m9-10b", 0.4, {"easy": 0.9})
        found = observations(tmp_path)
        mean = found.frame[found.frame["task"] == "mean"]
        assert len(mean) == 9 and "m9-10b (has no hard acc)" in " ".join(found.notes)

    def test_without_a_mean_the_main_score_is_one_of_which_higher_is_better(self, tmp_path):
        def add_loss(run):
            score = run["results"]["text"].pop("acc,none")
            for name in ("acc_stderr,none", "f1,strict", "f1_stderr,strict"):
                run["results"]["text"].pop(name)
            run["results"]["text"]["calibration_error,none"] = score

        self.save(
            tmp_path, lambda i: {"arc": 0.3 + i / 100, "text": 0.9 - i / 100}, change=add_loss
        )
        found = observations(tmp_path)
        assert found.scores == ["arc acc", "text −calibration_error"]
        assert found.main_score == "arc acc"

    def test_two_models_are_not_compared(self, tmp_path):
        self.save(tmp_path / "runs", lambda i: {"arc": 0.3 + i / 100}, models=2)
        found = fit_runs(tmp_path / "runs", resamples=QUICK)
        assert not found.fits and "correlations" not in found.tables
        assert "nothing to compare across models" in found.words[0]
        files = output.save(found, tmp_path / "out")
        assert not [file for file in files if file.suffix in (".png", ".svg")]
        output.show(found)

    def test_a_fact_with_the_name_of_a_derived_size_is_refused(self, tmp_path):
        self.save(tmp_path / "runs", lambda i: {"arc": 0.3 + i / 100})
        rows = "".join(f"m{i}-{i + 1}b,{i}\n" for i in range(10))
        (tmp_path / "facts.csv").write_text("model,log10_params\n" + rows)
        with pytest.raises(CouplingError, match="log10_params"):
            fit_runs(tmp_path / "runs", facts=tmp_path / "facts.csv", resamples=QUICK)

    def test_the_last_checkpoint_counts_in_all_tasks(self, tmp_path):
        self.save(tmp_path, lambda i: {"t1": 0.4 + i / 100, "t2": 0.4 + i / 100})
        for step, tasks in ((1000, ("t1", "t2")), (2000, ("t1",))):
            name = f"out/p/checkpoint-{step}"
            save_model(tmp_path / str(step), name, step / 1e4, dict.fromkeys(tasks, 0.3))
        found = observations(tmp_path)
        assert found.models == 11
        assert "p/checkpoint-2000 has no t2, an earlier checkpoint has" in found.notes
