"""Within a model: documents meet their answers."""

import math

import numpy as np
import pytest
from fitted_runs import QUICK, observations, save_documents, save_model
from saved_runs import record, sample, write_samples
from scipy import stats

from lm_eval_coupling.fit.checkpoint_curves import along_training, checkpoints
from lm_eval_coupling.fit.findings import fit_runs
from lm_eval_coupling.fit.scores import scored_rows
from lm_eval_coupling.fit.within_models import POOLED, TOGETHER, load_documents
from lm_eval_coupling.saved.saved_run import find_runs
from lm_eval_coupling.saved.scores_table import load_runs
from lm_eval_coupling.statistics import adjust_p_values, auroc_together


class TestDocuments:
    VALUES, RIGHT = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8], [0, 0, 1, 0, 1, 0, 1, 1]

    def documents(self, folder):
        runs = load_runs(folder)
        return load_documents(find_runs(folder).runs, runs.assign(label=runs["model"]), [])

    def test_records_meet_their_answers(self, tmp_path):
        save_documents(
            tmp_path, "a", self.VALUES, self.RIGHT, likelihoods={1: (-0.5, -4.0), 2: (-9.0, -1.0)}
        )
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
        save_documents(
            tmp_path / "other", "a", [v / 10 for v in self.VALUES], self.RIGHT[::-1], task="easy"
        )
        found = fit_runs([where.parent], resamples=QUICK).tables["auroc"]
        areas = found[found["predictor"] == "coupling@10"].set_index("task")["auroc"]
        assert (
            areas["arc"] == 13 / 16
            and areas["easy"] == pytest.approx(3 / 16)
            and areas[POOLED] == 0.5
        )

    @pytest.mark.parametrize("groups", [["reasoning"], ["science", "reasoning"]], ids=len)
    def test_a_group_that_is_asked_for_has_the_documents_of_its_tasks(self, tmp_path, groups):
        """Regression.

        They were lost if another run had the task alone, or if the task was in two groups.
        """

        def add_groups(run):
            run["results"] |= {group: {"acc,none": 0.5, "acc_stderr,none": 0.1} for group in groups}
            run["group_subtasks"] = {group: ["arc"] for group in groups}

        save_documents(tmp_path / "1", "a", self.VALUES, self.RIGHT, change=add_groups)
        save_documents(tmp_path / "2", "b", self.VALUES, self.RIGHT)
        found = fit_runs(tmp_path, tasks=["reasoning"], resamples=QUICK).tables["documents"]
        assert found["model"].tolist() == ["a"] * 8

    def test_one_model_prompted_in_two_ways_is_told_apart(self, tmp_path):
        """Regression.

        Its documents had both names at once, and the command ended with a traceback of pandas.
        """
        for shots in (0, 5):
            made_so = {"change": lambda run, shots=shots: run.update({"n-shot": {"arc": shots}})}
            save_documents(
                tmp_path / str(shots),
                "a",
                self.VALUES,
                self.RIGHT[::-1] if shots else self.RIGHT,
                **made_so,
            )
        rows = (
            fit_runs(tmp_path, mixed="keep", resamples=QUICK)
            .tables["auroc"]
            .query("predictor == 'coupling@10'")
        )
        areas = rows.set_index("model")["auroc"]
        assert set(areas.index) == {"a (0-shot)", "a (5-shot)", TOGETHER} and areas[
            "a (0-shot)"
        ] == pytest.approx(13 / 16)
        assert areas["a (5-shot)"] < 0.5

    def test_models_are_taken_together_over_the_documents_that_they_share(self, tmp_path):
        """What each is too few answers for.

        The numbers are those of ``statistics``, the words name what else says it.
        """
        rng = np.random.default_rng(1)
        for model in "abc":
            values = rng.uniform(0.1, 0.5, 60)
            right = (rng.uniform(size=60) < 1 / (1 + np.exp(-6 * (values - 0.3)))).astype(int)
            save_documents(tmp_path, model, values, right)
        found = fit_runs(tmp_path, resamples=QUICK)
        rows = found.tables["auroc"].query("model == @TOGETHER").set_index("predictor")
        expected = auroc_together(
            found.tables["documents"],
            "coupling@10",
            "right",
            model="model",
            task="task",
            document="doc_hash",
        )
        row = rows.loc["coupling@10"]
        assert (row["auroc"], row["stderr"], row["p"]) == (
            expected.auroc,
            expected.stderr,
            expected.p,
        )
        assert (row["models"], row["right"], row["wrong"]) == (
            3,
            expected.right,
            expected.wrong,
        )
        assert rows["p_holm"].tolist() == pytest.approx(
            adjust_p_values(rows["p"].to_numpy()).tolist(), nan_ok=True
        )
        (said,) = [
            words
            for words in found.words
            if words.startswith("All 3 models together, a document counting once")
        ]
        assert (
            f"{row['auroc']:.2f}" in said
            and "the model held fixed" in said
            and "distinct predictors (Holm)" in said
        )

    def test_coupling_that_decides_is_found_with_length_and_confidence_fixed(self, tmp_path):
        rng = np.random.default_rng(0)
        values = rng.uniform(0.1, 0.5, 200)
        right = (rng.uniform(size=200) < 1 / (1 + np.exp(-12 * (values - 0.3)))).astype(int)
        likelihoods = {i: tuple(rng.normal(size=2) - 9) for i in range(200)}
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
        write_samples(
            where,
            "arc",
            [sample(f"d{i}", acc=share[i]) for i in range(7)] + [sample("d7", acc=1.0)],
        )
        found = self.documents(tmp_path)
        assert (
            found["right"].isna().all()
            and found["margin"].isna().all()
            and found["score"].notna().all()
        )
        assert "it needs lm-eval's --log_samples" in fit_runs(tmp_path, resamples=QUICK).words[-1]

    def test_an_untrained_twin_answers_nothing(self, tmp_path):
        rows = [record("arc", i) | {"weights": "trained"} for i in range(2)]
        twins = [record("arc", i, seed=5) | {"weights": "untrained"} for i in range(2)]
        where = save_model(tmp_path, "a", 0.2, {"arc": 0.5}, rows=[*rows, *twins])
        write_samples(where, "arc", [sample("d0", acc=1.0), sample("d1")])
        found = self.documents(tmp_path)
        assert len(found) == 2
        assert found["line_shape_score"].tolist() == pytest.approx(
            [row["line_shape_score"] for row in rows]
        )

    def test_tables_of_other_runs_are_left_alone(self, tmp_path):
        save_documents(tmp_path, "a", self.VALUES, self.RIGHT, run_id="old")
        save_documents(
            tmp_path, "a", self.VALUES[::-1], self.RIGHT, run_id="new", date="2025-07-01T00-00-00"
        )
        assert len(self.documents(tmp_path)) == 8


def test_a_failed_measurement_is_no_number(tmp_path):
    rows = [record("arc", 0), record("arc", 1, reason="out of memory")]
    where = save_model(tmp_path, "a", 0.2, {"arc": 0.5}, rows=rows)
    write_samples(where, "arc", [sample("d0", acc=1.0), sample("d1")])
    runs = load_runs(tmp_path)
    found = load_documents(find_runs(tmp_path).runs, runs.assign(label="a"), []).set_index(
        "doc_hash"
    )
    assert math.isnan(found.loc["d1", "coupling@10"]) and not math.isnan(
        found.loc["d0", "coupling@10"]
    )


class TestTraining:
    def test_levels_and_changes(self, tmp_path):
        couplings, scores = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.2, 0.5, 0.4, 0.7, 0.6, 0.9]
        for i, (coupling, score) in enumerate(zip(couplings, scores, strict=True)):
            save_model(tmp_path / str(i), f"out/a/checkpoint-{10**i}", coupling, {"arc": score})
        rows = checkpoints(scored_rows(load_runs(tmp_path), []), "coupling@10", [])
        assert rows["step"].tolist() == [1, 10, 100, 1000, 10_000, 100_000]
        found = along_training(rows, "coupling@10", resamples=QUICK)
        levels = found["a", "arc acc", "coupling@10", "levels"]
        assert (
            levels.coefficient == pytest.approx(stats.spearmanr(couplings, scores)[0])
            and levels.n == 6
        )
        assert found["a", "arc acc", "coupling@10", "changes"].n == 5

    def save_revisions(self, folder, *revisions):
        for number, revision in enumerate(revisions):
            more = {"revision": revision, "fingerprint": f"{folder.name} {revision}"}
            date = f"2025-06-0{number + 1}T00-00-00"
            save_model(folder, "org/a", number / 9, {"arc": number / 9}, date=date, **more)

    def test_two_trainings_with_the_same_steps(self, tmp_path):
        """Of two seeds in one repository every step was of the seed that was run last."""
        names = [f"seed{seed}-step{step}" for seed in "12" for step in (10, 20, 30)]
        self.save_revisions(tmp_path, *names)
        rows = checkpoints(scored_rows(load_runs(tmp_path), []), "coupling@10", [])
        assert rows.groupby("lineage")["step"].apply(list).to_dict() == {
            f"a [seed{seed}]": [10, 20, 30] for seed in "12"
        }

    def test_a_step_of_several_weights_is_told(self, tmp_path):
        self.save_revisions(tmp_path / "first", "step10", "step20")
        self.save_revisions(tmp_path / "again", "step10")
        notes = []
        checkpoints(scored_rows(load_runs(tmp_path), []), "coupling@10", notes)
        assert notes == ["a has several weights at step 10, of which the newest count"]

    def test_weights_at_two_steps_are_told(self, tmp_path):
        for step in (10, 20, 30):
            name = f"out/a/checkpoint-{step}"
            save_model(tmp_path, name, step / 90, {"arc": 0.3}, fingerprint=str(min(step, 20)))
        notes = []
        checkpoints(scored_rows(load_runs(tmp_path), []), "coupling@10", notes)
        words = "has the weights of step {} at another step as well"
        assert notes == [f"a {words.format(step)}" for step in (20, 30)]

    def test_a_later_stage_comes_before_the_finished_model(self, tmp_path):
        """Checkpoints of unknown steps counted as models beside it."""
        names = ["stage1-step10", "stage2-ingredient1-step5", "stage2-ingredient2-step5"]
        self.save_revisions(tmp_path, *names)
        told = observations(tmp_path)
        assert told.models == 2 and any("each counts as a model" in note for note in told.notes)
        self.save_revisions(tmp_path, *names, "main")
        assert set(observations(tmp_path).frame["label"]) == {"a"}

    def test_a_single_checkpoint_is_no_curve(self, tmp_path):
        save_model(tmp_path, "out/a/checkpoint-5", 0.1, {"arc": 0.3})
        assert checkpoints(scored_rows(load_runs(tmp_path), []), "coupling@10", []).empty
