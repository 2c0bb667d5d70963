"""The report: numbers as in `load_runs`, other people's text only ever as text, and a page that works in a real browser."""

import base64
import hashlib
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import browser
import numpy as np
import pytest
from saved_runs import CHANCE, record, sample, save, task_summary, write_samples

from lm_eval_coupling import cli
from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.report.data import _limit
from lm_eval_coupling.report.page import embeddable_json, gather, page, write_report
from lm_eval_coupling.report.prompts import pack
from lm_eval_coupling.saved.results import load_runs
from lm_eval_coupling.saved.run import find_runs
from lm_eval_coupling.saved.samples import read_answers
from lm_eval_coupling.saved.values import document_values, mean_and_error, prompt_values

NASTY = (
    "</script><script>window.pwned=1</script><!--<img src=x onerror='window.pwned=2'> \"quoted\" {{script}} & &amp; \\u003c "
    "\u2028 \u202eright-to-left\u202c 漢字 🙂 \x00"
)
BAD_MODEL = "org/<b>bold</b><img src=x onerror=window.pwned=3>%{x}"
RECORDS = {
    "arc": [record("arc", i, p) for i in range(3) for p in range(2)],
    "gsm": [record("gsm", i, seed=1) for i in range(2)],
}


def packed(text, layers):
    """Independent inverse of pack()."""
    whole = np.frombuffer(base64.b64decode(text), dtype="<u2").astype(float).reshape(layers, layers)
    return np.where(whole == 65535, np.nan, whole / 10000)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model with a group of two tasks, one failure and samples; one of another size; one without coupling."""
    out = tmp_path_factory.mktemp("out")
    nasty = record("arc", 5) | {"text": NASTY}
    failed = record("arc", 6, reason="out of <b>memory</b>")
    summaries = {"arc": task_summary(0.3), "gsm": task_summary(0.2)}
    rows = [*RECORDS["arc"], nasty, failed, *RECORDS["gsm"]]
    tiny = save(out, summaries, rows=rows, groups={"both": ["arc", "gsm"]}, run_id="tiny")
    lines = [sample("d0"), sample("d1", acc=1.0, target="blue"), sample("d5", arguments=nasty_arguments())]
    write_samples(tiny, "arc", lines)
    save(out, {"arc": task_summary(0.1)}, model=BAD_MODEL, rows=[record("arc", 0, layers=6)], run_id="bad")
    save(out, {"arc": task_summary()}, model="org/plain", coupling=False)
    return out


@pytest.fixture(scope="module")
def html(gathered):
    return page(gathered)


def nasty_arguments():
    return {f"gen_args_{i}": {"arg_0": "Why?", "arg_1": f" {i}{NASTY}"} for i in range(2)}


@pytest.fixture(scope="module")
def gathered(saved):
    return gather(saved)


def row_of(data, model, task):
    (row,) = [row for row in data["rows"] if (row["model"], row["task"]) == (model, task)]
    return row


class TestNumbers:
    def test_rows_are_those_of_load_runs(self, saved, gathered):
        runs = load_runs(saved)
        assert len(gathered["rows"]) == len(runs) == 5
        for row, expected in zip(gathered["rows"], runs.to_dict("records"), strict=True):
            assert (row["model"], row["task"]) == (expected["model"], expected["task"])
            assert row["scores"]["acc,none"] == pytest.approx([expected["acc,none"], expected["acc_stderr,none"]])
            assert row["scores"]["f1,strict"] == [0.4, None]
            assert set(row["coupling"]) == (set() if row["model"] == "org/plain" else {"10", "30"})
            for rank, found in row["coupling"].items():
                assert found["mean"] == pytest.approx(expected[f"coupling@{rank}"], rel=1e-5)
                assert found["stderr"] == pytest.approx(expected[f"coupling_stderr@{rank}"], rel=1e-5)
                assert found["chance"] == pytest.approx(1 - CHANCE[int(rank)], rel=1e-5)
                assert found["excess"] == pytest.approx(expected[f"coupling_excess@{rank}"], rel=1e-5)
                assert found["n"] == expected[f"coupling_n@{rank}"]
            assert [row["measured"], row["n_samples"]] == [expected["measured"], expected["n_samples"]] or row["group"]

    def test_scores_leave_coupling_out_and_the_first_is_the_main_one(self, gathered):
        row = row_of(gathered, "org/tiny", "arc")
        assert set(row["scores"]) == {"acc,none", "f1,strict"} and row["main"] == "acc,none"

    def test_groups_know_their_tasks(self, gathered):
        group, member = row_of(gathered, "org/tiny", "both"), row_of(gathered, "org/tiny", "arc")
        assert group["group"] and not group["member"] and member["member"] and not member["group"]
        assert [gathered["tables"][i]["task"] for i in group["tables"]] == ["arc", "gsm"]
        assert [gathered["tables"][i]["task"] for i in member["tables"]] == ["arc"]
        assert row_of(gathered, "org/plain", "arc")["tables"] == []

    def test_tables_are_not_taken_from_another_model(self, gathered):
        ours, other = (row_of(gathered, model, "arc")["tables"] for model in ("org/tiny", BAD_MODEL))
        assert ours != other and gathered["tables"][other[0]]["total"] == 1

    @pytest.mark.parametrize("rank", [10, 30])
    def test_the_mean_matrix_is_the_mean_over_documents(self, saved, gathered, rank):
        table = gathered["tables"][row_of(gathered, "org/tiny", "arc")["tables"][0]]
        found = packed(table["mean"][str(rank)], 4)
        at = (10, 30).index(rank)
        documents = [
            np.mean([record("arc", i, p)["normalized_miscoupling"][at] for p in range(2)], axis=0) for i in range(3)
        ]
        documents.append(record("arc", 5)["normalized_miscoupling"][at])
        np.testing.assert_allclose(found, np.mean(documents, axis=0), atol=6e-5)
        (own,) = [t for _, t in find_runs(saved / "org__tiny").newest_tables() if t.task == "arc"]
        mean, _, n = mean_and_error(document_values(prompt_values(own))[f"coupling@{rank}"])
        assert table["measured"] == n == 4
        assert 1 - found[~np.eye(4, dtype=bool)].mean() == pytest.approx(mean, abs=1e-4)

    def test_documents(self, gathered):
        table = gathered["tables"][row_of(gathered, "org/tiny", "arc")["tables"][0]]
        assert [(one["id"], one["prompt"]) for one in table["documents"]][:3] == [(0, 0), (0, 1), (1, 0)]
        one, expected = table["documents"][3], record("arc", 1, 1)
        off = ~np.eye(4, dtype=bool)
        np.testing.assert_allclose(packed(one["matrix"], 4), expected["normalized_miscoupling"][0], atol=6e-5)
        for at, rank in enumerate(("10", "30")):
            wanted = 1 - expected["normalized_miscoupling"][at][off].mean(dtype=float)
            assert one["coupling"][rank] == pytest.approx(wanted, rel=1e-5)
        np.testing.assert_allclose(one["norms"], expected["norms"], rtol=1e-5)
        failed = table["documents"][-1]
        assert failed["reason"] == "out of <b>memory</b>" and failed["matrix"] is None and failed["coupling"] == {}

    def test_undefined_pairs_are_left_out(self, tmp_path):
        rows = [record(doc_id=i) for i in range(2)]
        rows[0]["normalized_miscoupling"][0, 1, 2] = np.nan
        for row in rows:
            row["normalized_miscoupling"][0, 2, 3] = np.nan
        save(tmp_path, {"arc": task_summary()}, rows=rows)
        (table,) = gather(tmp_path)["tables"]
        found = packed(table["mean"]["10"], 4)
        assert found[1, 2] == pytest.approx(rows[1]["normalized_miscoupling"][0, 1, 2], abs=6e-5)
        assert np.isnan(found[2, 3]) and np.isnan(found).sum() == 1

    def test_packing_keeps_four_digits(self):
        matrix = np.array([[0, 1], [np.nan, 0.12344]], dtype=np.float32)
        np.testing.assert_array_equal(packed(pack(matrix), 2), [[0, 1], [np.nan, 0.1234]])


class TestLimits:
    def test_documents_are_capped_and_the_mean_is_not(self, saved, gathered):
        capped = gather(saved, documents=2)
        assert capped["limit"] == 2
        for table, whole in zip(capped["tables"], gathered["tables"], strict=True):
            assert len(table["documents"]) == min(2, whole["total"]) and table["total"] == whole["total"]
            assert table["mean"] == whole["mean"] and table["norms"] == whole["norms"]
        assert gather(saved, documents=0)["tables"][0]["documents"] == []

    def test_many_tables_share_the_page(self):
        assert _limit([100] * 40, 200) == 200
        assert _limit([5] * 100 + [100] * 100, 200) == 35  # 500 + 3500
        assert _limit([50] * 5000, 200) == 1 and _limit([50] * 5000, 0) == 0

    def test_long_prompts_keep_their_end(self, tmp_path):
        save(tmp_path, {"arc": task_summary()}, rows=[record() | {"text": "a" * 5000 + "the question"}])
        (one,) = gather(tmp_path)["tables"][0]["documents"]
        assert one["text"].endswith("athe question") and len(one["text"]) == 4000 and one["cut"] == 1012

    def test_a_full_page_stays_small(self, tmp_path):
        """200 documents of 32 layers: below 4 kB each, and plotly once."""
        save(tmp_path, {"arc": task_summary()}, rows=[record(doc_id=i, layers=32) for i in range(250)])
        data = gather(tmp_path)
        assert len(data["tables"][0]["documents"]) == 200
        assert len(embeddable_json(data)) < 200 * 4000
        assert page(data).count("plotly.js v") == 1


class TestAnswers:
    def read(self, tmp_path, *samples, main="acc,none"):
        return read_answers(write_samples(tmp_path, "t", samples), main)

    def test_multiple_choice(self, tmp_path):
        found = self.read(tmp_path, sample("a"), sample("b", acc=1.0, target="red"), sample("c", acc=0.5, target=None))
        assert found["a"] == {
            "scores": {"acc,none": 0.0},
            "given": "red",
            "expected": "blue",
            "options": [("red", -1.5), ("blue", -2.5)],
            "right": False,
        }
        assert found["b"]["right"] is True and found["b"]["expected"] == "red"
        assert found["c"]["right"] is None and found["c"]["expected"] is None

    def test_choices_that_differ_in_their_context(self, tmp_path):
        names = ("Sarah", "Samantha")
        arguments = {f"gen_args_{i}": {"arg_0": f"It was {name}", "arg_1": " who won."} for i, name in enumerate(names)}
        found = self.read(tmp_path, sample("a", arguments=arguments, target="who won."))
        assert found["a"]["options"] == [("Sarah", -1.5), ("Samantha", -2.5)] and found["a"]["expected"] == "who won."

    def test_unconditional_likelihoods_are_no_choices(self, tmp_path):
        arguments = [("Why?", " red"), ("Why?", " blue"), ("", " red"), ("", " blue")]
        arguments = {f"gen_args_{i}": {"arg_0": a, "arg_1": b} for i, (a, b) in enumerate(arguments)}
        responses = [[-3.0, False], [-2.0, False], [-1.0, False], [-0.5, False]]
        found = self.read(tmp_path, sample("a", arguments=arguments, filtered_resps=responses))
        assert found["a"]["options"] == [("red", -3.0), ("blue", -2.0)] and found["a"]["given"] == "blue"

    def test_generation_with_two_filters(self, tmp_path):
        generated = {
            "arguments": {"gen_args_0": {"arg_0": "6*7?", "arg_1": {"until": ["\n"]}}},
            "resps": [["It is 42, or #### 41"]],
            "target": "42",
            "metrics": ["exact_match"],
        }
        strict = sample("a", **generated, filter="strict-match", filtered_resps=["41"], exact_match=0.0)
        flexible = sample("a", **generated, filter="flexible-extract", filtered_resps=["42"], exact_match=1.0)
        for order in ((strict, flexible), (flexible, strict)):
            found = self.read(tmp_path, *order, main="exact_match,flexible-extract")["a"]
            assert found["given"] == "42" and found["generated"] == "It is 42, or #### 41" and found["expected"] == "42"
            assert found["right"] is True
            assert found["scores"] == {"exact_match,strict-match": 0.0, "exact_match,flexible-extract": 1.0}
            assert self.read(tmp_path, *order, main="exact_match,strict-match")["a"]["given"] == "41"

    def test_one_scored_continuation_is_no_choice(self, tmp_path):
        arguments = {"gen_args_0": {"arg_0": "The sky is", "arg_1": " blue"}}
        found = self.read(tmp_path, sample("a", arguments=arguments, filtered_resps=[["-1.0", "True"]], target=" blue"))
        assert found["a"]["given"] is None and found["a"]["expected"] == "blue" and found["a"]["options"] == [("blue", -1.0)]

    def test_rolling_likelihoods_have_no_answer(self, tmp_path):
        rolling = {"arguments": {"gen_args_0": {"arg_0": "text"}}, "filtered_resps": [-123.4], "resps": [[-123.4]]}
        found = self.read(tmp_path, sample("a", **rolling, target="text"))
        assert found["a"]["options"] == [] and found["a"]["right"] is False

    def test_no_file_an_unfinished_line_and_strange_lines(self, tmp_path):
        assert read_answers(tmp_path / "none.jsonl", "acc,none") == {}
        file = write_samples(tmp_path, "t", [sample("a"), [], {}])
        file.write_text(file.read_text() + '{"doc_hash": "b", "tar')
        assert set(read_answers(file, None)) == {"a", "None"}


class Tags(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.tags, self.inside, self.content = [], None, {}
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = len(self.tags) if tag in ("script", "style") else None

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside:
            self.content[self.inside] = self.content.get(self.inside, "") + data


class TestPage:
    def test_nothing_is_loaded_from_elsewhere(self, html):
        tags = Tags(html).tags
        loads = [
            attributes[name]
            for _, attributes in tags
            for name in ("src", "href", "srcset", "data", "action")
            if name in attributes
        ]
        assert loads == ["data:,"]
        style = next(text for text in Tags(html).content.values() if "--paper" in text)
        assert "url(" not in style and "@import" not in style

    def test_the_policy_forbids_loads_and_foreign_scripts(self, html):
        found = Tags(html)
        (policy,) = [a["content"] for tag, a in found.tags if a.get("http-equiv") == "Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; ") and "unsafe-eval" not in policy and "http" not in policy
        scripts = [found.content[i + 1] for i, (tag, a) in enumerate(found.tags) if tag == "script" and "type" not in a]
        hashes = ["'sha256-" + base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() + "'" for s in scripts]
        assert len(hashes) == 2 and f"script-src {' '.join(hashes)};" in policy

    def test_texts_are_data_and_nothing_else(self, html, gathered):
        found = Tags(html)
        (number,) = [i + 1 for i, (tag, a) in enumerate(found.tags) if a.get("id") == "data"]
        assert json.loads(found.content[number]) == json.loads(json.dumps(gathered))
        assert [tag for tag, _ in found.tags].count("script") == 3 and "img" not in [tag for tag, _ in found.tags]
        texts = [one["text"] for table in gathered["tables"] for one in table["documents"]]
        assert NASTY in texts
        assert NASTY not in html and "</script><script>window" not in html

    @pytest.mark.parametrize("text", ["</script>", "<!--<script>", "]]>", "&lt;", "\u2028\u2029", "\ud800"])
    def test_json_cannot_end_its_element(self, text):
        made = embeddable_json({"text": text})
        assert json.loads(made) == {"text": text} and not set(made) & set("<>&\u2028\u2029\ud800") and made.isascii()

    def test_numbers_without_a_value_are_null(self, gathered):
        assert row_of(gathered, "org/plain", "arc")["worst_certificate"] is None
        json.dumps(gathered, allow_nan=False)

    def test_labels(self, tmp_path):
        models = ["/home/someone/models/small", "org/name", r"C:\models\other"]
        for model in models:
            folder = tmp_path / str(models.index(model))
            save(folder, {"arc": task_summary()}, model="any", coupling=False)
            file = next(folder.rglob("results_*.json"))
            run = json.loads(file.read_text())
            file.write_text(json.dumps(run | {"model_name": model}))
        assert {row["model"]: row["label"] for row in gather(tmp_path)["rows"]} == dict(
            zip(models, ["small", "org/name", "other"], strict=True)
        )

    def test_folders_of_one_last_name_keep_the_rest_of_their_paths_to_themselves(self, tmp_path):
        """Regression: their labels were the whole paths."""
        for model in ("/home/someone/a/base", "/home/someone/b/base"):
            save(tmp_path, {"arc": task_summary()}, model=model, coupling=False)
        assert [row["label"] for row in gather(tmp_path)["rows"]] == ["a/base", "b/base"]


class TestErrors:
    def test_no_runs(self, tmp_path):
        with pytest.raises(CouplingError, match="no results_"):
            write_report(tmp_path, tmp_path / "r.html")
        with pytest.raises(CouplingError, match="does not exist"):
            write_report([tmp_path / "nowhere"], tmp_path / "r.html")
        assert not (tmp_path / "r.html").exists()

    def test_results_without_tasks(self, tmp_path):
        (tmp_path / "results_x.json").write_text('{"results": {}}')
        with pytest.raises(CouplingError, match="no task"):
            gather(tmp_path)

    def test_unwritable(self, saved, tmp_path):
        with pytest.raises(CouplingError, match="cannot be written"):
            write_report(saved, tmp_path)

    def test_negative_documents(self, saved):
        with pytest.raises(CouplingError, match="documents=-1"):
            gather(saved, documents=-1)

    def test_different_settings(self, saved, tmp_path):
        other = save(tmp_path, {"arc": task_summary()}, model="org/other", settings={"ranks": [20]})
        with pytest.raises(CouplingError, match="different coupling settings"):
            gather([saved, other])
        assert len(gather([saved, other], mixed="keep")["rows"]) == 6

    def test_without_plotly(self, saved, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "plotly.offline", None)
        with pytest.raises(CouplingError, match=r"pip install 'lm-eval-coupling\[analysis\]'"):
            write_report(saved, tmp_path / "r.html")

    def test_command(self, saved, tmp_path, capsys):
        out = tmp_path / "deep" / "r.html"
        assert cli.main(["report", str(saved / "org__tiny"), str(saved / "org__plain"), "-o", str(out)]) == 0
        assert "r.html" in capsys.readouterr().out and out.stat().st_size > 10_000
        assert cli.main(["report", str(tmp_path / "none"), "-o", str(out)]) == 2
        assert capsys.readouterr().err.startswith("lm-eval-coupling: got ")

    def test_no_torch_is_loaded(self):
        code = "import sys, lm_eval_coupling.report.page; sys.exit('torch' in sys.modules or 'lm_eval' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture(scope="module")
def report(saved, tmp_path_factory):
    if reason := browser.reason_to_skip():
        pytest.skip(reason)
    return write_report(saved, tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture
def opened(report):
    """The page in a browser; whatever a test does there, nothing may be logged, fetched or executed."""
    with browser.Browser() as window:
        window.open(report)
        yield window
        assert window.console == []
        assert window.requests == [report.as_uri()]
        assert window.run("window.pwned === undefined")


def table(window, holder):
    """Texts of a table's cells, row by row."""
    return window.run(
        f"[...document.querySelectorAll('#{holder} tbody tr')].map(tr => [...tr.cells].map(cell => cell.innerText.trim()))"
    )


def column(window, holder, name):
    names = window.run(f"[...document.querySelectorAll('#{holder} th button')].map(button => button.dataset.name)")
    return [row[names.index(name)] for row in table(window, holder)]


def set_value(window, selector, value, event="change"):
    window.run(
        f"(() => {{ const e = document.querySelector('{selector}'); e.value = {json.dumps(value)};"
        f"e.dispatchEvent(new Event('{event}', {{bubbles: true}})); }})()"
    )


def open_row(window, model, task):
    set_value(window, "#level", "all")
    index = table(window, "rows").index(next(r for r in table(window, "rows") if r[0].endswith(model) and r[1] == task))
    window.click(f"#rows tbody tr:nth-child({index + 1}) button")
    window.until("!document.querySelector('#layers').hidden")


class TestInABrowser:
    def test_every_view_opens(self, opened):
        views = ["overview", "layers", "documents", "provenance"]
        for name in [*views[1:], views[0]]:
            opened.click(f"#tab-{name}")
            opened.until(f"!document.querySelector('#{name}').hidden")
            assert opened.run("[...document.querySelectorAll('[role=tabpanel]')].filter(p => !p.hidden).map(p => p.id)") == [
                name
            ]
            assert opened.run(f"document.querySelector('#tab-{name}').getAttribute('aria-selected')") == "true"

    def test_the_keyboard_suffices(self, opened):
        opened.press("Tab")
        opened.until("document.activeElement.id === 'tab-overview'")
        assert opened.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        opened.press("Right")
        opened.until("document.activeElement.id === 'tab-layers' && !document.querySelector('#layers').hidden")
        opened.press("End")
        opened.until("document.activeElement.id === 'tab-provenance'")
        opened.press("Home")
        opened.until("document.activeElement.id === 'tab-overview'")
        opened.run("document.querySelector('#rows tbody tr:last-child button').focus()")
        opened.press("Return")
        opened.until("document.activeElement.id === 'tab-layers' && !document.querySelector('#layers').hidden")

    @pytest.mark.parametrize("rank", [10, 30])
    def test_the_table_shows_what_load_runs_has(self, saved, opened, rank):
        runs = load_runs(saved)
        set_value(opened, "#level", "all")
        set_value(opened, "#rank", str(rank))
        assert len(table(opened, "rows")) == len(runs)
        expected = [
            "–" if math.isnan(mean) else f"{mean:.4f} ± {error:.4f}"
            for mean, error in zip(runs[f"coupling@{rank}"], runs[f"coupling_stderr@{rank}"], strict=True)
        ]
        assert column(opened, "rows", "Coupling") == expected and len(set(expected)) > 2
        assert column(opened, "rows", "Excess") == [
            "–" if math.isnan(x) else f"{x:+.4f}" for x in runs[f"coupling_excess@{rank}"]
        ]
        assert column(opened, "rows", "Score") == [f"{x:.4f} ± 0.0200" for x in runs["acc,none"]]
        assert column(opened, "rows", "Task") == list(runs["task"])

    def test_headers_sort(self, opened):
        set_value(opened, "#level", "all")
        header = "#rows th:nth-child(6)"
        for direction, order in (("descending", -1), ("ascending", 1)):
            opened.click(f"{header} button")
            opened.until(f"document.querySelector('{header}').getAttribute('aria-sort') === '{direction}'")
            values = column(opened, "rows", "Coupling")
            assert values[-1] == "–"  # what is missing comes last
            numbers = [float(value.split()[0]) for value in values[:-1]]
            assert numbers == sorted(numbers, reverse=order < 0) and len(set(numbers)) > 1
        assert opened.run(f"document.activeElement.parentElement === document.querySelector('{header}')")

    def test_rows_are_filtered(self, opened):
        assert sorted(column(opened, "rows", "Task")) == ["arc", "arc", "both"]
        set_value(opened, "#level", "leaf")
        assert sorted(column(opened, "rows", "Task")) == ["arc", "arc", "arc", "gsm"]
        opened.click("#row-filter")
        opened.until("document.activeElement.id === 'row-filter'")
        opened.type("tiny GSM")
        opened.until("document.querySelectorAll('#rows tbody tr').length === 1")
        assert column(opened, "rows", "Task") == ["gsm"]

    def test_the_scatter_plot(self, saved, opened):
        set_value(opened, "#level", "leaf")
        traces = opened.run(
            "document.querySelector('#scatter').data.filter(t => t.showlegend !== false)"
            ".map(t => ({name: t.name, x: t.x, y: t.y, dx: t.error_x.array, dy: t.error_y.array}))"
        )
        runs = load_runs(saved).query("not is_group and `coupling@10` == `coupling@10`")
        for trace in traces:
            rows = runs[runs["task"] == trace["name"]]
            for key, name in (
                ("x", "coupling@10"),
                ("dx", "coupling_stderr@10"),
                ("y", "acc,none"),
                ("dy", "acc_stderr,none"),
            ):
                assert trace[key] == pytest.approx(list(rows[name]), rel=1e-5)
        assert sum(len(trace["x"]) for trace in traces) == len(runs) == 3
        opened.click("#scatter .points path:last-of-type")
        opened.until("!document.querySelector('#layers').hidden")

    def test_the_heat_map_is_the_mean_matrix(self, opened, gathered):
        open_row(opened, "tiny", "arc")
        found = np.array(opened.run("document.querySelector('#heat').data[0].z"), dtype=float)
        table = gathered["tables"][row_of(gathered, "org/tiny", "arc")["tables"][0]]
        expected = packed(table["mean"]["10"], 4)
        np.fill_diagonal(expected, np.nan)
        np.testing.assert_allclose(found, expected, atol=1e-9)
        assert f"chance {math.sqrt(1 - 1 / 10):.3f}" in opened.text("#heat")
        opened.run("document.querySelector('#layers details').open = true")
        assert column(opened, "layer-numbers", "Its Jacobian, others' bases") == [
            f"{x:.4f}" for x in np.nanmean(expected, axis=1)
        ]

    def test_a_groups_heat_map_pools_its_tasks(self, opened):
        open_row(opened, "tiny", "both")
        found = np.array(opened.run("document.querySelector('#heat').data[0].z"), dtype=float)
        documents = [
            np.mean([r["normalized_miscoupling"][0] for r in RECORDS["arc"][2 * i : 2 * i + 2]], axis=0) for i in range(3)
        ]
        documents += [record("arc", 5)["normalized_miscoupling"][0]] + [
            r["normalized_miscoupling"][0] for r in RECORDS["gsm"]
        ]
        off = ~np.eye(4, dtype=bool)
        np.testing.assert_allclose(found[off], np.mean(documents, axis=0)[off], atol=1e-4)

    def test_models_are_compared_layer_by_layer(self, opened):
        open_row(opened, "tiny", "arc")
        assert opened.run("document.querySelector('#profile').data.length") == 2
        opened.click("#compare")
        opened.until("document.querySelector('#profile').data[0].name.startsWith('org/')")
        lines = opened.run("document.querySelector('#profile').data.map(t => [t.name, t.x])")
        assert [len(x) for _, x in lines] == [6, 4] and all(x[0] == 0 and x[-1] == 1 for _, x in lines)

    def test_a_run_without_tables_says_so(self, opened):
        open_row(opened, "plain", "arc")
        assert "No coupling table" in opened.text("#layers-missing")
        assert opened.text("#heat").strip() == "No layer-by-layer matrix was measured."
        set_value(opened, "#model", opened.run("document.querySelector('#model').options[2].value"))
        opened.until("document.querySelector('#heat').data && !document.querySelector('#heat .note')")

    def test_documents(self, opened):
        open_row(opened, "tiny", "arc")
        opened.click("#tab-documents")
        opened.until("!document.querySelector('#documents').hidden")
        assert column(opened, "document-list", "Right?") == ["✗ wrong"] * 2 + ["✓ right"] * 2 + ["–"] * 2 + ["✗ wrong", "–"]
        opened.click("#document-list tbody tr:nth-child(3) button")
        opened.until("document.querySelector('#document-heat')")
        shown, expected = opened.text("#document"), record("arc", 1)
        off = ~np.eye(4, dtype=bool)
        for at, rank in enumerate((10, 30)):
            value = 1 - expected["normalized_miscoupling"][at][off].mean(dtype=float)
            assert f"coupling {value:.4f} at K = {rank} (chance {1 - CHANCE[rank]:.4f})" in shown
        assert expected["text"] in shown and "measured at token 5 of 5" in shown and "✓ right" in shown and "-2.50" in shown
        found = np.array(opened.run("document.querySelector('#document-heat').data[0].z"), dtype=float)
        np.testing.assert_allclose(found[off], expected["normalized_miscoupling"][0][off], atol=6e-5)
        set_value(opened, "#answer", "right")
        assert column(opened, "document-list", "Document") == ["1", "1, prompt 2"]
        opened.click("#document-filter")
        opened.until("document.activeElement.id === 'document-filter'")
        opened.type("nowhere")
        opened.until("document.querySelectorAll('#document-list tbody tr').length === 0")
        assert opened.text("#documents-note").startswith("0 of 8 measured prompts.")

    def test_a_document_that_failed_says_why(self, opened):
        open_row(opened, "tiny", "arc")
        opened.click("#tab-documents")
        opened.click("#document-list tbody tr:last-child button")
        opened.until("document.querySelector('#document h2')")
        assert "Note: out of <b>memory</b>" in opened.text("#document")
        assert "No layer-by-layer matrix was measured." in opened.text("#document-heat")

    def test_other_peoples_text_is_text(self, opened):
        """A model's name, a prompt and an answer that would run scripts if they were markup."""
        assert BAD_MODEL in column(opened, "rows", "Model")
        assert BAD_MODEL in opened.text("#scatter")
        open_row(opened, "tiny", "arc")
        opened.click("#tab-documents")
        opened.click("#document-list tbody tr:nth-child(7) button")
        opened.until("document.querySelector('#document .prompt')")
        assert opened.run("document.querySelector('#document .prompt').textContent") == NASTY
        answer = opened.run("document.querySelectorAll('#document .prompt')[1].textContent")
        assert answer == "0" + NASTY.strip().replace("\x00", "\x00")
        opened.click("#tab-provenance")
        assert opened.run("document.querySelectorAll('img, iframe, main script').length") == 0

    def test_provenance(self, opened):
        opened.click("#tab-provenance")
        opened.until("!document.querySelector('#provenance').hidden")
        shown = opened.text("#provenance")
        for fact in (
            "f" * 64,
            "settings: seed",
            "versions: lm-eval",
            "0.4.13",
            "device",
            "cpu",
            "worst certificate",
            "2.5e-6",
        ):
            assert fact in shown
        assert "Scored without measuring coupling." in shown

    def test_the_policy_is_in_force(self, report):
        """Without it the inline scripts of a page could be joined by others."""
        with browser.Browser() as window:
            window.open(report)
            window.run("document.body.append(Object.assign(document.createElement('script'), {text: 'window.pwned = 4'}))")
            assert window.run("window.pwned === undefined")
            assert any("Content Security Policy" in line for line in window.console)

    def test_a_phone_never_scrolls_sideways(self, report):
        with browser.Browser(390, 844) as window:
            window.open(report)
            for name in ("overview", "layers", "documents", "provenance"):
                window.click(f"#tab-{name}")
                window.until(f"!document.querySelector('#{name}').hidden")
                assert window.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), name
            assert window.console == []

    @pytest.mark.parametrize("scheme, light", [(0, False), (1, True)])
    def test_the_dark(self, report, scheme, light):
        """Background and text, of the page and of its plots, follow the reader's setting."""
        expression = (
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,"
            "document.querySelector('#scatter').layout.font.color]"
        )
        flags = f"{browser.FLAGS} --blink-settings=preferredColorScheme={scheme}"
        ran = subprocess.run(
            [sys.executable, browser.__file__, str(report), expression],
            env=os.environ | {"QTWEBENGINE_CHROMIUM_FLAGS": flags},
            capture_output=True,
            text=True,
            check=True,
        )
        background, ink, plotted = (brightness(colour) for colour in json.loads(ran.stdout))
        assert (background > 200 and ink < 60) if light else (background < 60 and ink > 200)
        assert plotted == ink


def brightness(colour):
    if colour.startswith("#"):
        return sum(int(colour[i : i + 2], 16) for i in (1, 3, 5)) / 3
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3


def test_contrast():
    """Text and its background in both schemes differ by at least 4.5 to 1, as WCAG AA asks."""
    css = Path(cli.__file__).with_name("report").joinpath("assets", "page.css").read_text()
    schemes = re.findall(r":root \{(.*?)\}", css, re.S)
    assert len(schemes) == 2
    for scheme in schemes:
        colours = dict(re.findall(r"--(\w+): #(\w{6})", scheme))
        for ink in ("ink", "soft", "accent", "right", "wrong"):
            for paper in ("paper", "raised"):
                dark, light = sorted(map(luminance, (colours[ink], colours[paper])))
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, paper)


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]
