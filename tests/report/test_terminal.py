"""What `show` prints: every number right, every table within the terminal's width."""

import io
import json
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from rich.cells import cell_len
from rich.console import Console
from saved_runs import DATE, SETTINGS, record, sample, save, task_summary, write_samples
from scipy import stats

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.measures.registry import readings
from lm_eval_coupling.report.terminal import show
from lm_eval_coupling.saved.records import load_records
from lm_eval_coupling.saved.saved_run import find_runs
from lm_eval_coupling.saved.values import document_values, mean_and_error, prompt_values


def printed(folder, task=None, doc=None, width=120, color=False, miscoupling=False):
    out = io.StringIO()
    show(
        folder,
        task,
        doc,
        Console(
            file=out,
            width=width,
            force_terminal=color,
            color_system="truecolor" if color else None,
        ),
        miscoupling=miscoupling,
    )
    assert color or all(cell_len(line) <= width for line in out.getvalue().splitlines())
    return out.getvalue()


@pytest.fixture
def run(tmp_path):
    rows = [record(doc_id=i, prompt_index=p) for i in range(3) for p in range(2)]
    rows += [record(doc_id=7, reason="out of memory"), record(doc_id=8, reason="out of memory")]
    rows += [record("gsm", doc_id=i, layers=30) for i in range(2)]
    save(tmp_path, {"arc": task_summary(), "gsm": task_summary()}, rows=rows)
    return tmp_path


def test_overview(run):
    text = printed(run)
    assert "org/tiny" in text and "4 layers of width 64" in text
    assert "2 × out of memory" in text
    rows = [record(doc_id=i, prompt_index=p) for i in range(3) for p in range(2)]
    off = ~np.eye(4, dtype=bool)
    values = (
        np.array([1 - row["normalized_miscoupling"][0][off].mean(dtype=float) for row in rows])
        .reshape(3, 2)
        .mean(1)
    )
    assert f"{values.mean():.4f} ± {values.std(ddof=1) / 3**0.5:.4f}" in text
    assert f"{values.mean() - 0.0516:+.4f}" in text
    worst = max(row["certificate"].max() for row in rows)
    assert f"{worst:.1e}" in text


def test_a_title_has_no_digest_where_runs_do_not_differ(tmp_path):
    """Regression: "task text 6e6f3c5a" stood above every table."""

    def change(text, folder):
        file = save(folder, {"arc": task_summary()}, rows=[record()]) / f"results_{DATE}.json"
        results = json.loads(file.read_text())
        results["configs"] = {"arc": {"doc_to_text": text}}
        file.write_text(json.dumps(results))

    change("{{question}}", tmp_path / "a")
    assert "(5-shot)" in printed(tmp_path)
    change("Answer! {{question}}", tmp_path / "b")
    assert len(set(re.findall(r"task text \w{8}", printed(tmp_path)))) == 2


def test_an_error_is_never_rounded_to_zero(tmp_path):
    rows = [record(doc_id=i) for i in range(2)]
    rows[1]["normalized_miscoupling"] = rows[0]["normalized_miscoupling"] + np.float32(2e-5)
    save(tmp_path, {"arc": task_summary()}, rows=rows)
    assert "± 1e-05" in printed(tmp_path) and "± 0.0000" not in printed(tmp_path)


def test_one_table_per_model(run):
    save(run, {"arc": task_summary()}, model="org/other", rows=[record()])
    text = printed(run)
    assert text.index("org/other") < text.index("org/tiny") and text.count("Missing of") == 1


def test_layer_profile(run):
    text = printed(run, "arc")
    assert "arc: mean coupling per layer, K = 10 (chance 0.0516)" in text and "gsm" not in text
    matrices = np.stack(
        [
            record(doc_id=i, prompt_index=p)["normalized_miscoupling"][0]
            for i in range(3)
            for p in range(2)
        ]
    )
    own, others = matrices[:, 1, [0, 2, 3]].mean(), matrices[:, [0, 1, 3], 2].mean()
    assert f"{1 - own:.4f}" in text and f"{1 - others:.4f}" in text
    text = printed(run, "arc", miscoupling=True)
    assert "mean miscoupling per layer, K = 10 (chance 0.9484)" in text
    assert f"{own:.4f}" in text and f"{others:.4f}" in text


def test_the_profile_is_over_the_documents_that_the_mean_is_over(tmp_path):
    """A document of which one of two prompts failed counted in the profile, and not in the mean."""
    prompts = [(document, prompt) for document in range(3) for prompt in range(2)]
    rows = [record(doc_id=i, prompt_index=p) for i, p in prompts]
    rows[1] = record(doc_id=0, prompt_index=1, reason="out of memory")
    save(tmp_path, {"arc": task_summary(n=2, failed=1)}, rows=rows)
    matrices = np.stack([row["normalized_miscoupling"][0] for row in rows[2:]])
    assert f"{1 - matrices[:, 1, [0, 2, 3]].mean():.4f}" in printed(tmp_path, "arc")


@pytest.mark.parametrize("miscoupling", [False, True])
def test_matrix_of_a_document(run, miscoupling):
    """Regression: the overview counted coupling, where up is good, and documents miscoupling."""
    text = printed(run, "gsm", 1, miscoupling=miscoupling)
    assert "Question 1: why is the sky blue?" in text and "token 5 of 5" in text
    cells = [line for line in text.splitlines() if re.fullmatch(r" *\d+( +[\d·]+){30} *", line)]
    actual = [line.split() for line in cells]
    expected = record("gsm", doc_id=1, layers=30)["normalized_miscoupling"][0].astype(float)
    expected = np.floor((expected if miscoupling else 1 - expected) * 100)
    for i, row in enumerate(actual):
        assert row[0] == str(i + 1) and row[i + 1] == "·"
        others = [j for j in range(30) if j != i]
        assert [int(row[j + 1]) for j in others] == expected[i, others].tolist()
    assert len(actual) == 30


def test_prompts_are_counted_from_one_as_on_the_page(run):
    """Regression: the terminal called "context 0" what the page calls "prompt 1"."""
    assert "Document 1, prompt 2 (context)" in printed(run, "arc", 1)


def test_scores_stand_beside_coupling(tmp_path):
    """Regression: no score of lm-eval was shown, printed as CSV or as JSON."""
    save(tmp_path, {"arc": task_summary()}, rows=[record(doc_id=i) for i in range(3)])
    alone = save(tmp_path / "alone", {"gsm": task_summary()}, rows=[record("gsm")])
    next(alone.glob("results_*.json")).unlink()
    assert re.search(r"acc 0\.5000 ± 0\.0\d+", printed(tmp_path))
    out = io.StringIO()
    show(tmp_path, console=Console(file=out), form="csv")
    table = pd.read_csv(io.StringIO(out.getvalue())).set_index("task")
    assert table.loc["arc", ["metric", "score"]].iloc[0].tolist() == ["acc,none", 0.5]


def test_empty_columns_are_left_out_for_programs(run):
    """Regression: a third of the columns was empty in every row."""
    for form in ("csv", "json"):
        out = io.StringIO()
        show(run, console=Console(file=out), form=form)
        text = out.getvalue()
        table = pd.read_csv(io.StringIO(text)) if form == "csv" else pd.DataFrame(json.loads(text))
        assert table.notna().any().all() and "untrained" not in table


@pytest.mark.parametrize("form", ["table", "csv", "json"])
def test_names_of_others_do_not_steer_the_terminal(tmp_path, form):
    """Regression: an escape sequence in a model's name reached the terminal."""
    name = "org/\x1b]0;title\x07\x1b[2Jm\x9b31m\u202e"
    summary = {"t\x1b[31m": task_summary()}
    save(tmp_path, summary, model=name, rows=[record("t\x1b[31m", reason="\x1b[2J")])
    save(tmp_path, {"t": task_summary()}, model="=HYPERLINK(1)", rows=[record("t")], run_id="r2")
    out = io.StringIO()
    show(tmp_path, console=Console(file=out, width=120), form=form)
    text = out.getvalue()
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text)
    if form == "csv":
        assert "'=HYPERLINK(1)" in text


def test_matrix_wraps_in_a_narrow_terminal(run):
    text = printed(run, "gsm", 1, width=60)
    assert len([line for line in text.splitlines() if re.match(r" 30 ", line)]) == 2


def test_matrix_is_colored(run):
    text = printed(run, "gsm", 1, color=True)
    pairs = 1 - record("gsm", doc_id=1, layers=30)["normalized_miscoupling"][0].astype(float)
    pairs = pairs[~np.eye(30, dtype=bool)]
    low, high = int(100 * pairs.min()), int(100 * pairs.max())
    assert f"\x1b[37;48;2;68;1;84m{low:>3}" in text, "least coupled is dark"
    assert f"\x1b[30;48;2;253;231;37m{high:>3}" in text, "most coupled is bright"


def test_prompts_are_text_not_markup(tmp_path):
    row = record() | {"text": "x" * 500 + " [bold]not markup[/nothing] \x1b[31m", "kind": "context"}
    row["normalized_miscoupling"][0, 0, 1] = np.nan
    save(tmp_path, {"arc": task_summary()}, rows=[row | {"reason": "1 [pair] undefined"}])
    text = printed(tmp_path, "arc", 0)
    assert "[bold]not markup[/nothing]" in text and "1 [pair] undefined" in text and "  ?" in text
    assert "\x1b" not in text and "x" * 400 not in text


def test_a_document_without_a_matrix_says_why(run):
    text = printed(run, "arc", 7)
    assert "Note: out of memory" in text and "No layer-by-layer matrix" in text


def test_nothing_measured_is_no_error(tmp_path):
    save(tmp_path, {"arc": task_summary()}, rows=[record(reason="too short")])
    assert "1 × too short" in printed(tmp_path) and "per layer" in printed(tmp_path, "arc")


def test_unknown_tasks_and_documents_name_what_there_is(run):
    with pytest.raises(CouplingError, match="got task mmlu.*choose one of arc, gsm"):
        show(run, "mmlu")
    with pytest.raises(
        CouplingError,
        match="got document 5, which task arc does not have; choose one of 0, 1, 2, 7, 8",
    ):
        show(run, "arc", 5)
    with pytest.raises(CouplingError, match="without a task"):
        show(run, None, 5)
    with pytest.raises(CouplingError, match="no coupling_"):
        (run / "empty").mkdir()
        show(run / "empty")


def test_coupling_is_that_of_the_measurement(run):
    item = load_records(run).query("task == 'gsm'").iloc[[0]]
    (table,) = [table for _, table in find_runs(run).newest_tables() if table.task == "gsm"]
    mean, error, n = mean_and_error(document_values(prompt_values(table).iloc[[0]])["coupling@30"])
    assert n == 1 and np.isnan(error)
    assert mean == pytest.approx(readings()["coupling"].read(item.iloc[0], 30), abs=1e-6)


def test_nothing_heavy_is_imported():
    code = "import sys, lm_eval_coupling.report.terminal; "
    code += "sys.exit(bool({'torch', 'lm_eval'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_overview_is_legible_in_80_columns(run):
    lines = printed(run, width=80).splitlines()
    assert any(
        all(name in line for name in ("docs", "coupling", "chance", "excess", "error"))
        for line in lines
    )


@pytest.mark.parametrize("width", [60, 66, 72, 80, 100])
def test_no_word_and_no_number_is_broken(tmp_path, width):
    """Regression: at 80 columns `arc_easy` was printed as `arc_e` and `asy`."""
    long = ["mmlu_", "high_", "school_", "european_", "history"]
    names = ["arc_easy", "".join(long), "gsm8k"]
    rows = [
        record(name, doc_id=i) | {"weights": w}
        for name in names
        for i in range(3)
        for w in ("trained", "untrained")
    ]
    save(tmp_path, {name: task_summary() for name in names}, rows=rows, untrained={"seed": 0})
    pieces = {"".join(long[i:j]) for i in range(5) for j in range(i + 1, 6)}
    lines = [
        line
        for line in printed(tmp_path, width=width).splitlines()
        if not line.startswith(("Chance:", "Not shown"))
    ]
    words = set(re.findall(r"\S+", printed(tmp_path, width=200)))
    assert set(" ".join(lines).split()) <= words | pieces


def test_untrained_weights_stand_beside_with_the_paired_difference(tmp_path):
    """The untrained twin took half of the time and was shown nowhere."""
    trained = [record(doc_id=i) for i in range(5)]
    twins = [
        record(doc_id=i, seed=3) | {"weights": "untrained"} for i in range(4)
    ]  # one was not measured
    save(tmp_path, {"arc": task_summary()}, rows=[*trained, *twins], untrained={"seed": 7})
    off = ~np.eye(4, dtype=bool)
    own, other = (
        [1 - r["normalized_miscoupling"][0][off].mean(dtype=float) for r in rows]
        for rows in (trained, twins)
    )
    difference = np.subtract(own[:4], other)
    text = printed(tmp_path)
    assert "untrained weights (seed 7)" in text
    expected = f"{difference.mean():+.4f} ± {difference.std(ddof=1) / 2:.4f}".replace("-", "−")
    assert expected in text and f"{np.mean(other):.4f} ± {np.std(other, ddof=1) / 2:.4f}" in text


def test_prompts_made_in_two_ways_stand_apart(tmp_path):
    """Regression: 2 and 5 examples of one task were two tables under one caption."""
    for shots, date in ((2, "2025-06-01T00-00-00"), (5, "2025-06-02T00-00-00")):
        where = save(
            tmp_path,
            {"arc": task_summary()},
            rows=[record(seed=shots)],
            date=date,
            run_id=f"run{shots}",
        )
        file = where / f"results_{date}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"n-shot": {"arc": shots}}))
    text = printed(tmp_path)
    assert "org/tiny (2-shot), 4 layers" in text and "org/tiny (5-shot), 4 layers" in text


def test_runs_are_compared_document_by_document(tmp_path):
    for model, seed, documents in (("base", 1, range(6)), ("tuned", 2, range(2, 8))):
        save(
            tmp_path,
            {"arc": task_summary()},
            model=model,
            rows=[record(doc_id=i, seed=seed) for i in documents],
            run_id=model,
        )
    off = ~np.eye(4, dtype=bool)
    base, tuned = (
        np.array(
            [
                1 - record(doc_id=i, seed=s)["normalized_miscoupling"][1][off].mean(dtype=float)
                for i in range(2, 6)
            ]
        )
        for s in (1, 2)
    )
    interval = stats.ttest_rel(tuned, base).confidence_interval()
    out = io.StringIO()
    show(tmp_path, console=Console(file=out, width=80), compare=True)
    (line,) = [line for line in out.getvalue().splitlines() if re.search(r" 30 ", line)]
    assert line.replace("−", "-").split()[-3:] == [
        f"{v:+.4f}" for v in ((tuned - base).mean(), *interval)
    ]
    assert "tuned less base" in out.getvalue() and " 4  30" in line


def test_numbers_for_other_programs(run):
    out = io.StringIO()
    show(run, console=Console(file=out, width=60), form="csv")
    table = pd.read_csv(io.StringIO(out.getvalue()))
    assert table["task"].tolist() == ["arc", "arc", "gsm", "gsm"] and table[
        "documents"
    ].tolist() == [3, 3, 2, 2]
    out = io.StringIO()
    show(run, "gsm", console=Console(file=out, width=60), form="json")
    rows = json.loads(out.getvalue(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert [row["rank"] for row in rows] == [10, 30]


def test_what_is_compared_is_the_first_folder_given_in_every_task(tmp_path):
    """Folders were taken by name; tasks in which the first run needs a shorter name were lost."""
    for folder, shots, tasks in (("b", 0, ("arc", "gsm")), ("a", 5, ("arc",))):
        rows = [record(task, doc_id=i, seed=shots) for task in tasks for i in range(4)]
        where = save(
            tmp_path / folder, dict.fromkeys(tasks, task_summary()), rows=rows, run_id=folder
        )
        (file,) = where.glob("results_*.json")
        file.write_text(
            json.dumps(json.loads(file.read_text()) | {"n-shot": dict.fromkeys(tasks, shots)})
        )
    rows = [record(task, doc_id=i, seed=9) for task in ("arc", "gsm") for i in range(4)]
    save(
        tmp_path / "c",
        dict.fromkeys(("arc", "gsm"), task_summary()),
        rows=rows,
        model="org/other",
        run_id="c",
        fingerprint="g",
    )

    def compared(*folders):
        out = io.StringIO()
        show(
            [tmp_path / folder for folder in folders],
            console=Console(file=out, width=60),
            compare=True,
            form="csv",
        )
        actual = pd.read_csv(io.StringIO(out.getvalue()))
        return {(row.label, row.base, row.task) for row in actual.itertuples()}

    zero, five, other = "org/tiny (0-shot)", "org/tiny (5-shot)", "org/other (5-shot)"
    assert compared("b", "a") == {(five, zero, "arc")} and compared("a", "b") == {
        (zero, five, "arc")
    }
    assert compared("b", "a", "c") == {
        (five, zero, "arc"),
        (other, zero, "arc"),
        (other, zero, "gsm"),
    }
    out = io.StringIO()
    show([tmp_path / folder for folder in "bac"], console=Console(file=out, width=60), compare=True)
    lines = out.getvalue().splitlines()
    assert all(len(line) <= 60 for line in lines) and f"{other} less {zero}" in lines
    numbers = [line.split()[-3:] for line in lines if re.search(r"\d$", line)]
    assert all(re.fullmatch(r"[+−]0\.\d{4}", number) for line in numbers for number in line), (
        numbers
    )


def test_bars_show_how_layers_differ(tmp_path):
    """Bars from 0 of numbers such as 0.93 and 0.95 were all of one length."""
    row = record()
    row["normalized_miscoupling"] = 0.93 + 0.02 * row["normalized_miscoupling"]
    save(tmp_path, {"arc": task_summary()}, rows=[row])
    bars = [line.count("█") for line in printed(tmp_path, "arc").splitlines() if "█" in line]
    assert len(bars) == 4 and max(bars) > 10 * min(bars)


def test_one_bad_file_is_named_and_passed_over(run, caplog):
    """One half-written table ended the command for all the others."""
    (run / "coupling_broken.parquet").write_bytes(b"PAR1 half a table")
    (run / "results_broken.json").write_text("{")
    text = printed(run)
    assert (
        "org/tiny" in text
        and "coupling_broken.parquet" in caplog.text
        and "results_broken.json" in caplog.text
    )


def saved_pair(folder, scores, **changes):
    """Save two runs whose documents have these scores, by model."""
    for model, values in scores.items():
        rows = [record(doc_id=i, seed=len(model)) for i in range(len(values))]
        where = save(folder, {"arc": task_summary()}, model=model, rows=rows, run_id=model)
        lines = [sample(f"d{i}", acc=value, **changes) for i, value in enumerate(values)]
        write_samples(where, "arc", lines)


def test_scores_are_compared_document_by_document(tmp_path):
    """Means of two runs say less than their paired difference, over the documents of both."""
    base = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    tuned = [1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0]  # one document less
    saved_pair(tmp_path, {"base": base, "tuned": tuned})
    out = io.StringIO()
    show(tmp_path, console=Console(file=out), compare=True, form="csv")
    row = pd.read_csv(io.StringIO(out.getvalue())).iloc[0]
    differences = np.subtract(tuned, base[:8])
    interval = stats.ttest_1samp(differences, 0).confidence_interval()
    assert row["metric"] == "acc,none" and row["score_paired"] == 8
    assert row["score_difference"] == pytest.approx(differences.mean())
    assert [row["score_difference_low"], row["score_difference_high"]] == pytest.approx([*interval])
    # Five documents are right in the tuned model only, one in the base model only.
    assert row["mcnemar_p"] == pytest.approx(2 * (1 + 6) / 2**6)
    out = io.StringIO()
    show(tmp_path, console=Console(file=out, width=100), compare=True)
    (line,) = [line for line in out.getvalue().splitlines() if " acc " in line]
    assert line.split()[:3] == ["arc", "8", "acc"] and line.split()[-1] == "0.219"


@pytest.mark.parametrize(
    ("scores", "p"), [(([0.0, 1.0], [0.0, 1.0]), 1.0), (([0.5, 1.0], [0.25, 1.0]), None)]
)
def test_mcnemar_is_exact_and_of_right_and_wrong_alone(tmp_path, scores, p):
    saved_pair(tmp_path, dict(zip(("base", "tuned"), scores, strict=True)))
    out = io.StringIO()
    show(tmp_path, console=Console(file=out), compare=True, form="json")
    assert json.loads(out.getvalue())[0].get("mcnemar_p") == p


def test_runs_without_samples_have_no_score_difference(tmp_path):
    for model in ("base", "tuned"):
        save(tmp_path, {"arc": task_summary()}, model=model, rows=[record()], run_id=model)
    out = io.StringIO()
    show(tmp_path, console=Console(file=out, width=100), compare=True)
    assert "tuned less base" in out.getvalue() and " acc " not in out.getvalue()


def test_what_two_runs_were_measured_with_and_lack_is_told(tmp_path, caplog):
    """A float64 run of another version of depth was compared with a float32 one without a word."""
    for number, version in enumerate((1, 2)):
        settings = SETTINGS | {"depth_version": version, "dtype": f"float{32 * version}"}
        about = {"settings": settings, "run_id": str(number)}
        rows = [record(doc_id=i, seed=number) for i in range(3)]
        where = save(tmp_path, {"arc": task_summary()}, model=f"org/m{number}", rows=rows, **about)
        write_samples(where, "arc", [sample(f"d{i}", acc=1.0) for i in range(2)])
    out = io.StringIO()
    show(tmp_path, console=Console(file=out, width=100), compare=True)
    first, other = (
        f"org/m{n} (measured with dtype=float{32 * (n + 1)}, measured with depth_version={n + 1})"
        for n in (0, 1)
    )
    assert f"{other} less {first}" in " ".join(out.getvalue().split())
    assert caplog.text.count("the answers to 2 documents, expected those to the 50") == 2


def test_what_a_narrow_terminal_does_not_show_is_named(run):
    """The score was left out without a word."""
    text = printed(run, width=60)
    assert "Not shown at this width: " in text and "score" in text.split("this width: ")[1]
    assert "Not shown" not in printed(run, width=150)


def test_layers_without_a_value(tmp_path):
    save(tmp_path, {"arc": task_summary()}, rows=[record(layers=1)], n_layers=1)
    text = printed(tmp_path, "arc")
    assert "1 layer of width" in text and "nan" not in text
    assert text.split("its basis")[-1].count("–") == 2


def test_a_document_is_no_row_of_a_table_for_programs(run):
    with pytest.raises(CouplingError, match="leave out --doc or --csv"):
        show(run, "arc", 0, form="csv")
