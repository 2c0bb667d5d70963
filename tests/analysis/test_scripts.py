"""Every script runs, and says what is missing."""

import json
import math
import re
import runpy

import command
import numpy as np
import pandas as pd
import pytest
import saved_runs
import tiny
from coupling_analysis.token_pairs import KINDS
from coupling_analysis.training_steps import add_steps
from matplotlib.collections import LineCollection
from studied import ANALYSIS, CHANCE, NOT_OURS, record, save, script, table

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.measures.formulas.headline import chance_level

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture
def two_models(tmp_path):
    """One document in the tokens of two models; the second run has no singular_values."""
    save(tmp_path, [record(0)], model="org/first")
    longer = {"n_tokens": 9, "tokens": tuple(range(9)), "position": 8, "self_tokens": (7, 8)}
    longer |= {"trajectories": np.arange(9 * 4 * 3, dtype=np.float32).reshape(9, 4, 3)}
    return save(
        tmp_path, [record(0, **longer, depth_slope=None, depth_r2=None)], model="org/second"
    )


@pytest.fixture
def drawn(monkeypatch):
    """The figures that scripts made, as they are before they are saved."""
    figures = []
    monkeypatch.setattr(
        command, "save", lambda folder, name, figure, rows, left_out=(): figures.append(figure)
    )
    return figures


def test_every_model_has_tokens_of_its_own(two_models, drawn):
    """Regression: all panels had the tokens of one model, the last one's or the first one's."""
    script("tokenwise")([str(two_models), "--layers", "1", "--doc", "0"])
    script("trajectories")([str(two_models)])
    tokenwise, ways = drawn
    assert [[text.get_text() for text in ax.get_xticklabels()] for ax in tokenwise.axes[:2]] == [
        ["4", "5"],
        ["7", "8"],
    ]
    widths = [
        [line.get_linewidth()[0] for line in ax.collections if isinstance(line, LineCollection)]
        for ax in ways.axes
    ]
    assert widths[0] == [0.7] * 5 + [2.2] and widths[3] == [0.7] * 8 + [2.2]
    assert [ax.get_title() for ax in ways.axes[:6:3]] == [
        "first (6 tokens): all layers",
        "second (9 tokens): all layers",
    ]


@pytest.fixture
def namesakes(tmp_path):
    """Two models whose folders have the same last name."""
    save(tmp_path, [record(0)], model="/some/where/a/tiny")
    return save(tmp_path, [record(0, shift=0.1)], model="/some/where/b/tiny")


@pytest.mark.parametrize(
    ("name", "panels"),
    [
        ("layer_graph", 2),
        ("influence --last 3", 2),
        ("trajectories", 6),
        ("tokenwise --layers 1", 2),
    ],
)
def test_models_of_one_last_name_have_panels_of_their_own(namesakes, drawn, name, panels):
    """Regression: both had one label, and one panel was drawn in the place of the other."""
    name, *arguments = name.split()
    script(name)([str(namesakes), *arguments])
    titles = [ax.get_title() for ax in drawn[0].axes if ax.get_title()]
    assert len(titles) == panels
    assert all(
        title.startswith(("a/tiny", "b/tiny")[i >= panels / 2]) for i, title in enumerate(titles)
    ), titles


def test_models_of_one_last_name_have_lines_of_their_own(namesakes, tmp_path):
    """Regression: they were drawn as one line, which went through the layers twice."""
    script("layer_coupling")([str(namesakes), "--out", str(tmp_path)])
    rows = table(tmp_path, "layer_coupling").query("measure == 'layer_coupling'")
    medians = {line: of["median"].tolist() for line, of in rows.groupby("line")}
    assert medians == {
        "a/tiny": pytest.approx([0.7, 0.3, 0.25]),
        "b/tiny": pytest.approx([0.6, 0.2, 0.15]),
    }


def test_trainings_of_one_last_name_have_lines_of_their_own(tmp_path):
    """Regression: checkpoints of two trainings were drawn as those of one."""
    for training_of, steps in {"a": (1, 3), "b": (2, 4)}.items():
        for step in steps:
            save(tmp_path, [record(0)], model=f"/some/where/{training_of}/tiny/checkpoint-{step}")
    script("checkpoints")([str(tmp_path), "--out", str(tmp_path)])
    rows = table(tmp_path, "checkpoints").query("measure == 'coupling'")
    assert {line: of["step"].tolist() for line, of in rows.groupby("line")} == {
        "a/tiny": [1, 3],
        "b/tiny": [2, 4],
    }


def test_a_run_without_spectra_beside_one_with(two_models, tmp_path):
    """Regression: its lines were lost, and the picture with them."""
    script("singular_values")([str(two_models), "--indices", "2", "--out", str(tmp_path)])
    rows = table(tmp_path, "singular_values").groupby("line").first()
    assert rows["slope"].tolist() == pytest.approx([1, 1])
    assert rows.loc["first", "r2_documents"] == pytest.approx(0.9) and np.isnan(
        rows.loc["second", "r2_documents"]
    )


def test_layer_coupling_without_a_defined_pair(tmp_path):
    """Regression: the most coupled of no layers was asked for, and the picture had empty axes."""
    undefined = np.full((2, 3, 3), np.nan, np.float32)
    run = save(tmp_path, [record(0, normalized_miscoupling=undefined)])
    with pytest.raises(
        CouplingError,
        match="a document in which coupling, its Jacobian.* is defined, got none",
    ):
        script("layer_coupling")([str(run), "--out", str(tmp_path)])


def test_layer_coupling(run, tmp_path, capsys):
    script("layer_coupling")([str(run), "--out", str(tmp_path)])
    rows = table(tmp_path, "layer_coupling").query("measure == 'layer_coupling'")
    trained = rows[rows["weights"] == "trained"]
    assert trained["median"].tolist() == pytest.approx(
        [0.685, 0.285, 0.235], abs=1e-6
    )  # shifts 0 to 0.03
    assert trained["n"].tolist() == [4, 4, 4]
    assert rows[rows["weights"] == "untrained"]["median"].tolist() == pytest.approx(
        [CHANCE] * 3, abs=1e-6
    )
    assert "tiny, trained: most coupled is layer 1, 0.685 (chance 0.052)" in capsys.readouterr().out


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
    assert rows.loc[
        ("line_shape_score", "trained"), ["q25", "median", "q75"]
    ].tolist() == pytest.approx([1.5075, 1.515, 1.5225])
    assert rows.loc[("line_shape_score", "untrained"), "median"] == 2
    assert rows.loc[("equidistance", "trained"), "median"] == pytest.approx(0.265)


def test_coupling_parts(run, tmp_path):
    parts = [
        {
            "rotated_coupling": [0.1, 0.05],
            "deflated_coupling": [0.1 + i / 100, 0.2],
            "mean_erasing": [-0.2, -0.1],
        }
        for i in range(3)
    ]
    runs = save(tmp_path / "run", [record(i, **columns) for i, columns in enumerate(parts)])
    script("coupling_parts")([str(runs), "--rank", "10", "--out", str(tmp_path)])
    documents = pd.read_csv(tmp_path / "coupling_parts_arc_documents.csv")
    rows = table(tmp_path, "coupling_parts").set_index("measure")
    means = documents[rows.index].mean()
    assert means.to_numpy() == pytest.approx(rows["mean"].to_numpy(), abs=1e-7)
    assert rows.loc["deflated", ["median", "n"]].tolist() == pytest.approx([0.11, 3])
    assert rows.loc["erasing", "mean"] == pytest.approx(-0.2)
    assert "coupling" in rows.index and "without_identity" not in rows.index
    with pytest.raises(CouplingError, match="measure again with coupling_measures=depth"):
        script("coupling_parts")([str(run), "--out", str(tmp_path)])


def test_token_positions(tmp_path):
    """The last token is no other token as well, also of a prompt of one token."""
    places = [(0, 0, 6), (1, 5, 6), (0, 0, 1)]  # place, position, tokens
    rows = [
        record(0 if n > 1 else 1, place=place, position=position, n_tokens=n, tokens=range(n))
        | {"rotated_coupling": [0.1 + position / 100, 0.05]}
        for place, position, n in places
    ]
    runs = save(tmp_path / "run", rows)
    script("token_positions")([str(runs), "--rank", "10", "--out", str(tmp_path)])
    rows = table(tmp_path, "token_positions").query("measure == 'rotated'").set_index("token")
    assert rows["n"].to_dict() == {"1": 1, "last": 2}
    assert rows["mean"].to_dict() == pytest.approx({"1": 0.1, "last": (0.15 + 0.1) / 2})
    assert rows["x"].to_dict() == {"1": 1, "last": 3.5}


def test_depth_profiles(run, tmp_path):
    script("depth_profiles")([str(run), "--out", str(tmp_path)])
    rows = table(tmp_path, "depth_profiles").query("weights == 'trained'")
    medians = {name: of["median"].tolist() for name, of in rows.groupby("measure")}
    assert medians["norms"] == [1, 2, 4, 8] and medians["entropy"] == [4, 3, 2, 1]
    assert medians["effective_rank"] == [5, 6, 7] and len(medians) == 7


def test_singular_values(run, tmp_path):
    script("singular_values")([str(run), "--indices", "1", "3", "--out", str(tmp_path)])
    rows = (
        table(tmp_path, "singular_values").query("weights == 'trained'").set_index(["k", "depth"])
    )
    assert rows.loc[(3, 2), "median"] == pytest.approx(1 / 5)  # 1/σ_k = k + depth
    assert rows["slope"].tolist() == pytest.approx([1] * 6) and rows[
        "r2"
    ].tolist() == pytest.approx([1] * 6)
    assert rows.loc[(3, 1), "intercept"] == pytest.approx(3)
    assert rows["r2_documents"].tolist() == pytest.approx([0.9] * 6)
    with pytest.raises(
        CouplingError, match="got singular value 31, expected 1 to 30.*coupling_ranks=31"
    ):
        script("singular_values")([str(run), "--indices", "31"])


def test_influence(run, tmp_path):
    script("influence")([str(run), "--last", "3", "--out", str(tmp_path)])
    rows = (
        table(tmp_path, "influence").query("weights == 'trained' and depth == 2").set_index("token")
    )
    assert rows["median"].to_dict() == pytest.approx(
        {"first": 8.015, "-2": 2.015, "-1": 3.015, "0": 4.015}
    )
    with pytest.raises(
        CouplingError, match="got prompts of at most 6 tokens .* expected more than 6"
    ):
        script("influence")([str(run), "--last", "6"])


def test_trajectories(run, tmp_path):
    script("trajectories")([str(run), "--doc", "2", "--out", str(tmp_path)])
    rows = table(tmp_path, "trajectories")
    assert len(rows) == 2 * 6 * 4 and rows.loc[5, ["token", "layer", "component_2"]].tolist() == [
        1,
        1,
        16,
    ]
    with pytest.raises(
        CouplingError, match="got document 9, which has no such record; choose among 0, 1, 2, 3"
    ):
        script("trajectories")([str(run), "--doc", "9"])


@pytest.mark.parametrize("kind", KINDS)
def test_tokenwise(run, tmp_path, kind):
    script("tokenwise")([str(run), "--kind", kind, "--layers", "2", "--out", str(tmp_path)])
    rows = table(tmp_path, f"tokenwise_{kind}").query("weights == 'trained'")
    cell = rows.query(
        "jacobian_layer == 2 and basis_layer == 2 and jacobian_token == 4 and basis_token == 5"
    )
    assert (
        cell["miscoupling"].item() == pytest.approx(0.17 + (0.015 if kind == "self" else 0))
        and len(rows) == 36
    )
    with pytest.raises(CouplingError, match="got layer 8, expected one of 1, 2, 3"):
        script("tokenwise")([str(run), "--kind", kind, "--layers", "8"])


def test_chain_of_thought(tmp_path):
    step = np.array([0.02, 0.04, 0.06], np.float32)
    rows = [record(i, task="gsm8k") for i in range(3)]
    rows += [record(i, task="gsm8k_cot_zeroshot", shift=-step[i]) for i in range(3)]
    save(tmp_path, rows)
    script("chain_of_thought")([str(tmp_path), "--out", str(tmp_path)])
    means = table(tmp_path, "chain_of_thought", "_gsm8k+gsm8k_cot_zeroshot").set_index(
        ["measure", "depth"]
    )
    full = means.xs("coupling").iloc[0]
    assert full["difference"] == pytest.approx(0.04, abs=1e-6) and full["stderr"] == pytest.approx(
        0.02 / math.sqrt(3)
    )
    assert full["positive"] == 1 and full["n"] == 3
    assert means.xs("layer_coupling")["difference"].tolist() == pytest.approx([0.04] * 3, abs=1e-6)
    assert len(
        pd.read_csv(tmp_path / "chain_of_thought_gsm8k+gsm8k_cot_zeroshot_documents.csv")
    ) == 3 * (3 + 3)


def test_prompt_length(tmp_path):
    rows = [record(i, shift=i / 100, n_tokens=10 * i + 10) for i in range(9)]
    save(tmp_path, rows)
    script("prompt_length")([str(tmp_path), "--out", str(tmp_path)])
    assert sorted(table(tmp_path, "prompt_length")["n_tokens"].unique()) == [
        10.0 * i for i in range(1, 10)
    ]
    actual = pd.read_csv(tmp_path / "prompt_length_arc_correlations.csv").set_index("measure")[
        "coefficient"
    ]
    assert actual.round(6).to_dict() == {"coupling": -1, "line_shape_score": 1, "expodistance": 1}


def test_difficulty(tmp_path):
    folder = save(tmp_path, [record(i, shift=i / 100) for i in range(9)]) / "org__tiny-main"
    levels = [
        {
            "doc_hash": f"d{i}",
            "doc": {"level": f"Level {i // 3}", "answer": "<<" * i, "text": "none"},
        }
        for i in range(9)
    ]
    samples = folder / f"samples_arc_{saved_runs.DATE}.jsonl"
    samples.write_text("".join(json.dumps(sample) + "\n" for sample in levels) + '{"cut o')
    main, out = script("difficulty"), ["--out", str(tmp_path)]
    main([str(tmp_path), "--column", "level", *out])
    assert table(tmp_path, "difficulty").query("measure == 'coupling'")["difficulty"].tolist() == [
        0,
        0,
        0,
        1,
        1,
        1,
        2,
        2,
        2,
    ]
    main([str(tmp_path), "--column", "answer", "--count", "<<", *out])
    assert table(tmp_path, "difficulty").query("measure == 'coupling'")["difficulty"].tolist() == [
        *range(9)
    ]
    (tmp_path / "known.csv").write_text("doc_hash,hard\nd1,5\nd2,7\nd99,1\n")
    main([str(tmp_path), "--csv", str(tmp_path / "known.csv"), "--column", "hard", *out])
    assert sorted(table(tmp_path, "difficulty")["difficulty"].unique()) == [5, 7]
    with pytest.raises(
        CouplingError,
        match="got column 'grade', which the documents do not have; choose among answer, level",
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
    assert rows["median"].tolist() == pytest.approx(
        [1 - 3.5 / 6 + step / 4096 for step in (1, 64, 512)], abs=1e-6
    )
    assert table(tmp_path, "checkpoints_layers")["line"].unique().tolist() == [
        f"tiny, step {s}" for s in (1, 64, 512)
    ]
    with pytest.raises(
        CouplingError, match="got 1 checkpoints of a training, expected at least two"
    ):
        add_steps(pd.DataFrame({"model": ["m", "n"], "revision": ["step1", "main"]}))


def test_coupling_matrices(tmp_path):
    arguments = [
        tiny.save_model(tmp_path / "model", num_hidden_layers=4),
        "--prompt",
        "The sky is blue.",
        "--rank",
        "4",
        "--out",
        str(tmp_path),
    ]
    main = script("coupling_matrices")
    main([*arguments, "--layers", "1", "4"])
    rows = table(tmp_path, "coupling_matrices_layers", "")
    own = rows.query("jacobian == basis")
    assert (
        len(rows) == 4 * 16 and own.query("i != j")["value"].abs().max() < 1e-4 * own["value"].max()
    )
    main([*arguments, "--across", "self", "--tokens", "-2", "-1", "--untrained", "0"])
    assert set(table(tmp_path, "coupling_matrices_self_untrained", "")["jacobian"]) == {
        "token 15",
        "token 16",
    }


def test_all_results_that_the_records_allow(tmp_path, capsys, monkeypatch):
    main = script("make_results")
    assert all(
        (ANALYSIS / f"{study.split()[0]}.py").exists() for study in main.__globals__["STUDIES"]
    )
    some = ["layer_coupling", "influence", "tokenwise --kind context_input", "chain_of_thought"]
    monkeypatch.setitem(main.__globals__, "STUDIES", some)
    rows = [record(i, shift=i / 100, n_tokens=10 + i) for i in range(3)]
    place = save(
        tmp_path, [*rows, record(0, prompt_index=1, trajectories=None)], model="/some/where/tiny"
    )
    out = tmp_path / "results"
    main([str(place), "--out", str(out)])
    lines = capsys.readouterr().out.splitlines()
    left = [line.split(": ")[0] for line in lines if line.startswith("left out")]
    assert left == ["left out influence", "left out chain_of_thought"]
    assert {file.suffix for file in out.iterdir()} == {".csv", ".png"}
    (run,) = pd.read_csv(out / "runs.csv").to_dict("records")
    assert (run["model"], run["weights"], run["documents"], run["prompts"]) == (
        "tiny",
        "trained",
        3,
        4,
    )
    rows = pd.read_csv(out / "layer_coupling_arc.csv").query("measure == 'layer_coupling'")
    assert rows["median"].tolist() == pytest.approx([0.69, 0.29, 0.24], abs=1e-6) and set(
        rows["model"]
    ) == {"tiny"}
    assert "/some/where" not in "".join(file.read_text() for file in out.glob("*.csv"))
    assert {file.name for file in out.glob("*.png")} == {
        "layer_coupling_arc.png",
        "tokenwise_context_input_arc.png",
    }


def test_results_of_models_of_one_last_name(namesakes, tmp_path, monkeypatch):
    """Regression: both were committed under one name, equal in all columns of a run."""
    main = script("make_results")
    monkeypatch.setitem(main.__globals__, "STUDIES", ["layer_coupling"])
    main([str(namesakes), "--out", str(tmp_path / "results")])
    for name in ("runs", "layer_coupling_arc"):
        rows = pd.read_csv(tmp_path / "results" / f"{name}.csv")
        assert rows["model"].unique().tolist() == ["a/tiny", "b/tiny"]


def test_pictures_say_their_task(tmp_path):
    """The picture of a second task was written over that of the first."""
    save(tmp_path / "runs", [record(i, task=task) for task in ("arc", "wino") for i in range(2)])
    for words in ([], ["--tasks", "arc"], ["--tasks", "wino"], ["--tasks", "arc", "wino"]):
        script("regularity")([str(tmp_path / "runs"), *words, "--out", str(tmp_path)])
    names = {file.name for file in tmp_path.glob("*.png")}
    assert names == {f"regularity{of}.png" for of in ("", "_arc", "_wino", "_arc+wino")}
    many = pd.DataFrame({"task": ["a", "b", "c/d", "e"]})
    assert command.name_study("x", many, ["a", "b", "c/d", "e"]) == "x_4_tasks"
    assert command.name_study("x", many[2:3]).startswith("x_c_d-")


def test_documents_that_a_picture_lacks_are_counted_below_its_title(tmp_path, capsys):
    """They were missing without a word."""
    rows = [record(i) for i in range(5)]
    for i, reason in ((0, "out of memory"), (1, "out of memory"), (2, "the stream holds NaN")):
        rows[i] |= {"normalized_miscoupling": None, "reason": reason}
    rows[3] |= {"line_shape_score": math.nan}
    save(tmp_path / "runs", rows)
    runs = [str(tmp_path / "runs"), "--out", str(tmp_path)]
    script("layer_coupling")(runs)
    output = "3 of 5 documents left out (2 × out of memory; 1 × the stream holds NaN)"
    assert f"layer_coupling_arc: {output}" in capsys.readouterr().out
    assert output.replace(" ", "") in drawn_text(tmp_path / "layer_coupling_arc.svg")
    script("regularity")(runs)
    output = "line-shape score: 1 of 5 documents left out (not measured)"
    assert f"regularity_arc: {output}\n" in capsys.readouterr().out
    script("influence")([*runs, "--last", "4"])
    assert "left out" not in capsys.readouterr().out
    save(tmp_path / "runs" / "more", [record(9, position=3)])
    script("influence")([*runs, "--last", "4"])
    assert (
        "1 of 6 documents left out (at most 4 tokens up to the measured one)"
        in capsys.readouterr().out
    )


def drawn_text(picture):
    """Return the text of an SVG file without spaces: matplotlib keeps each text in a comment."""
    return (
        "".join(re.findall(r"<!--(.*?)-->", picture.read_text(encoding="utf-8"), re.DOTALL))
        .replace(" ", "")
        .replace("\n", "")
    )


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
    assert error.startswith(
        f"{name}.py: got 2 records of arc with the measures depth, none with {needed}; "
    )


@pytest.mark.parametrize(
    "words",
    [
        "layer_coupling BAD",
        "correlate BAD",
        "checkpoints BAD",
        "difficulty RUN --column x --csv BAD",
    ],
)
def test_a_path_that_is_not_there_is_one_sentence(words, plain, tmp_path, capsys, monkeypatch):
    """Regression: one script told it with a traceback, another with [Errno 2]."""
    name, *arguments = words.split()
    places = {"BAD": str(tmp_path / "nowhere"), "RUN": str(plain)}
    monkeypatch.setattr("sys.argv", [f"{name}.py", *(places.get(word, word) for word in arguments)])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(ANALYSIS / f"{name}.py"), run_name="__main__")
    output = capsys.readouterr().err
    assert (
        output.startswith(f"{name}.py: got {tmp_path}/nowhere, which ")
        and output.count("\n") == 1
        and "Errno" not in output
    )


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CouplingError, match="which cannot be written"):
        command.save_table(tmp_path / "file", "name", pd.DataFrame())


def test_every_script_is_listed_with_its_command():
    readme = (ANALYSIS / "README.md").read_text(encoding="utf-8")
    names = {file.stem for file in ANALYSIS.glob("*.py")} - {
        "command",
        "kept_rows",
        "paired_seeds",
        "recipe",
        "vit_members",
    }  # what scripts have in common
    assert names >= {"layer_coupling", *NOT_OURS}
    for name in names:
        assert f"python analysis/{name}.py " in readme and f"[`{name}.py`]({name}.py)" in readme
