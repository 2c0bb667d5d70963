"""What `fit` finds is saved, drawn and said."""

import errno
import json

import matplotlib
import numpy as np
import pandas as pd
import pytest
from fitted_runs import QUICK, save_documents, save_model
from matplotlib.figure import Figure

from lm_eval_coupling import cli
from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.fit import output
from lm_eval_coupling.fit.findings import fit_runs


@pytest.fixture(scope="module")
def alone(series):
    """What is found in one task by one predictor: there is less to draw."""
    return fit_runs(series[0], x=["coupling@10"], tasks=["arc"], resamples=QUICK)


class TestOutput:
    def test_every_number_is_saved(self, found, tmp_path):
        files = {file.name for file in output.save(found, tmp_path)}
        assert files >= {
            "observations.csv",
            "correlations.csv",
            "fits.csv",
            "subsets.csv",
            "nested.csv",
            "influence.csv",
            "within_families.csv",
            "fit.json",
        }
        pictures = (
            "scatter_arc_acc",
            "scatter_gsm_acc",
            "scatter_mean_of_2_scores",
            "predictors",
            "influence",
        )
        assert {f"{name}.{kind}" for name in pictures for kind in ("png", "svg")} <= files
        assert files == {file.name for file in tmp_path.iterdir()}
        saved = json.loads((tmp_path / "fit.json").read_text(), parse_constant=pytest.fail)
        assert saved["predictor"] == "coupling@10" and len(saved["tables"]["correlations"]) == len(
            found.tables["correlations"]
        )
        again = pd.read_csv(tmp_path / "correlations.csv")
        np.testing.assert_allclose(
            again["coefficient"], found.tables["correlations"]["coefficient"]
        )
        told = (tmp_path / "finding.txt").read_text()
        assert all(paragraph in told for paragraph in found.words) and all(
            note in told for note in found.notes
        )

    def test_the_command(self, series, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "140")
        out = tmp_path / "new" / "folder"
        words = ["fit", str(series[0]), "--x", "coupling@30", "--tasks", "arc", "--out", str(out)]
        assert cli.main(words) == 0
        printed = capsys.readouterr().out
        assert "coupling@30 and the score, across models" in printed and "files in" in printed
        assert "What coupling@30 says beyond size" in printed and "family a" in printed
        assert [file.name for file in out.glob("scatter*.svg")] == ["scatter_arc_acc.svg"]

    def test_mistakes_are_one_sentence(self, series, tmp_path, capsys):
        assert cli.main(["fit", str(series[0]), "--score", "bleu", "--out", str(tmp_path)]) == 2
        assert "lm-eval-coupling: got no score 'bleu'" in capsys.readouterr().err
        (tmp_path / "file").write_text("")
        with pytest.raises(CouplingError, match="file for the results, which cannot be written"):
            output.save(
                fit_runs(series[0], x=["coupling@10"], tasks=["arc"], resamples=QUICK),
                tmp_path / "file",
            )

    def test_an_earlier_fit_in_the_folder_is_replaced_as_a_whole(self, series, alone, tmp_path):
        """Its pictures and tables stayed beside a finding that had none."""
        out = tmp_path / "out"
        two = fit_runs(series[0], x=["coupling@10"], resamples=QUICK)
        before = {file.name for file in output.save(two, out)}
        (out / "notes.txt").write_text("mine")
        link = out / "finding.txt"
        link.rename(tmp_path / "elsewhere.txt")
        link.symlink_to(tmp_path / "elsewhere.txt")
        after = {file.name for file in output.save(alone, out)}
        assert "scatter_gsm_acc.png" in before - after
        assert {file.name for file in out.iterdir()} == after | {"notes.txt"}
        assert link.is_symlink() and alone.words[0] in (tmp_path / "elsewhere.txt").read_text()

    def test_a_fit_that_cannot_be_written_leaves_the_earlier_one(
        self, alone, tmp_path, monkeypatch
    ):
        output.save(alone, tmp_path)
        before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(output, "write_text", full)
        with pytest.raises(CouplingError, match=f"got {tmp_path} for the results, which cannot be"):
            output.save(alone, tmp_path)
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before

    @pytest.mark.parametrize("content", ["[]", '{"files": "a"}', '{"files": ["../a", 3]}', "{", ""])
    def test_files_that_an_earlier_fit_does_not_list_are_kept(self, alone, tmp_path, content):
        (tmp_path / "a").write_text("")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "fit.json").write_text(content)
        output.save(alone, tmp_path / "out")
        assert (tmp_path / "a").exists()

    def test_documents_are_drawn_and_shown(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "140")
        rng = np.random.default_rng(0)
        for model in ("a", "b"):
            save_documents(
                tmp_path / "runs", model, rng.uniform(0.1, 0.5, 30), rng.integers(0, 2, 30)
            )
        found = fit_runs(tmp_path / "runs", x=["coupling@10"], resamples=QUICK)
        files = {file.name for file in output.save(found, tmp_path / "out")}
        assert {
            "auroc.png",
            "calibration.svg",
            "documents.csv",
            "logistic.csv",
            "graded.csv",
            "calibration.csv",
        } <= files
        output.show(found)
        assert "coupling@10 and right answers, within each model" in capsys.readouterr().out

    def test_training_is_drawn(self, tmp_path):
        for i in range(4):
            save_model(
                tmp_path / str(i),
                f"out/a/checkpoint-{10**i}",
                0.1 * (i + 1),
                {"arc": 0.2 * (i + 1)},
            )
        found = fit_runs(tmp_path, resamples=QUICK)
        assert "training.png" in {file.name for file in output.save(found, tmp_path / "out")}
        assert any(words.startswith("Along the training of a: ") for words in found.words)


def test_pictures_need_no_latex(monkeypatch, tmp_path):
    """A `text.usetex: True` in the user's matplotlibrc ended `fit` where LaTeX is missing."""

    def draw():
        figure = Figure()
        figure.subplots().set_title("org/a_model_of_50%")
        return figure

    monkeypatch.setenv("PATH", str(tmp_path))  # so that there is no LaTeX
    monkeypatch.setattr(output, "figures", lambda _: [("picture", draw)])
    with matplotlib.rc_context({"text.usetex": True}):
        files = list(output._save_figures(None, tmp_path))
    assert all(file.stat().st_size for file in files) and len(files) == 2
