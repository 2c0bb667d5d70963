"""The report in a real browser: every view, number and picture."""

import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import browser
import numpy as np
import pandas as pd
import pytest
from report_pages import (
    BAD_MODEL,
    NASTY,
    RECORDS,
    column,
    headers,
    open_row,
    packed,
    row_of,
    set_value,
    table,
)
from saved_runs import CHANCE, record, save, task_summary

from lm_eval_coupling import cli
from lm_eval_coupling.report.page import build_page, gather, write_report
from lm_eval_coupling.saved.scores_table import load_runs


class TestInABrowser:
    def test_every_view_opens(self, opened):
        views = ["overview", "layers", "documents", "provenance"]
        for name in [*views[1:], views[0]]:
            opened.click(f"#tab-{name}")
            opened.until(f"!document.querySelector('#{name}').hidden")
            assert opened.run(
                "[...document.querySelectorAll('[role=tabpanel]')]"
                ".filter(p => !p.hidden).map(p => p.id)"
            ) == [name]
            assert (
                opened.run(f"document.querySelector('#tab-{name}').getAttribute('aria-selected')")
                == "true"
            )

    def test_the_keyboard_suffices(self, opened):
        opened.press("Tab")
        opened.until("document.activeElement.id === 'tab-overview'")
        assert opened.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        opened.press("Right")
        opened.until(
            "document.activeElement.id === 'tab-layers'"
            " && !document.querySelector('#layers').hidden"
        )
        opened.press("End")
        opened.until("document.activeElement.id === 'tab-provenance'")
        opened.press("Home")
        opened.until("document.activeElement.id === 'tab-overview'")
        opened.run("document.querySelector('#rows tbody tr:last-child button').focus()")
        opened.press("Return")
        opened.until(
            "document.activeElement.id === 'tab-layers'"
            " && !document.querySelector('#layers').hidden"
        )

    @pytest.mark.parametrize("rank", [10, 30])
    def test_the_table_shows_what_load_runs_has(self, saved, opened, rank):
        runs = load_runs(saved)
        set_value(opened, "#level", "all")
        set_value(opened, "#rank", str(rank))
        assert len(table(opened, "rows")) == len(runs)
        expected = [
            "–" if math.isnan(mean) else f"{mean:.4f} ± {error:.4f}"
            for mean, error in zip(
                runs[f"coupling@{rank}"], runs[f"coupling_stderr@{rank}"], strict=True
            )
        ]
        assert column(opened, "rows", "Coupling") == expected and len(set(expected)) > 2
        assert column(opened, "rows", "Excess") == [
            "–" if math.isnan(x) else f"{x:+.4f}" for x in runs[f"coupling_excess@{rank}"]
        ]
        assert column(opened, "rows", "Score") == [f"{x:.4f} ± 0.0200" for x in runs["acc,none"]]
        assert column(opened, "rows", "Task") == list(runs["task"])

    @pytest.mark.usefixtures("report")  # skips where there is no browser
    def test_of_a_group_without_a_score_the_tasks_are_seen_at_once(self, saved, tmp_path):
        """Regression: the first view was one row without a score, and no picture."""
        gathered = gather(saved)
        for row in gathered["rows"]:
            if row["group"]:
                row["scores"], row["main"] = {}, None
        (tmp_path / "report.html").write_text(build_page(gathered))
        with browser.Browser() as window:
            window.open(tmp_path / "report.html")
            assert len(table(window, "rows")) == len(gathered["rows"])
            assert window.run("document.querySelector('#level').value") == "all"

    def test_headers_sort(self, opened):
        set_value(opened, "#level", "all")
        header = "#rows th:nth-child(3)"
        for direction, order in (("descending", -1), ("ascending", 1)):
            opened.click(f"{header} button")
            opened.until(
                f"document.querySelector('{header}').getAttribute('aria-sort') === '{direction}'"
            )
            values = column(opened, "rows", "Coupling")
            assert values[-1] == "–"  # what is missing comes last
            numbers = [float(value.split()[0]) for value in values[:-1]]
            assert numbers == sorted(numbers, reverse=order < 0) and len(set(numbers)) > 1
        assert opened.run(
            f"document.activeElement.parentElement === document.querySelector('{header}')"
        )

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
            "document.querySelector('#scatter').data.filter(t => t.error_x)"
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
        actual = np.array(opened.run("document.querySelector('#heat').data[0].z"), dtype=float)
        table = gathered["tables"][row_of(gathered, "org/tiny", "arc")["tables"][0]]
        expected = packed(table["mean"]["10"], 4)
        np.fill_diagonal(expected, np.nan)
        np.testing.assert_allclose(actual, 1 - expected, atol=1e-9)
        assert f"chance {1 - CHANCE[10]:.3f}" in opened.text("#heat")
        assert opened.text("#heat-caption").startswith("Coupling of every pair of layers")
        for details in opened.run("[...document.querySelectorAll('#layers details')].keys()"):
            opened.run(f"document.querySelectorAll('#layers details')[{details}].open = true, 0")
        layers = gathered["tables"][row_of(gathered, "org/tiny", "arc")["tables"][0]]["profile"][
            "10"
        ]
        np.testing.assert_allclose(layers["jacobian"], np.nanmean(expected, axis=1), atol=6e-5)
        assert column(opened, "layer-numbers", "Its Jacobian, others' bases") == [
            f"{1 - x:.4f} ± {e:.4f}"
            for x, e in zip(layers["jacobian"], layers["jacobian_stderr"], strict=True)
        ]
        opened.click("#miscoupling")
        opened.until("document.querySelector('#heat-caption').textContent.startsWith('Misc')")
        actual = np.array(opened.run("document.querySelector('#heat').data[0].z"), dtype=float)
        np.testing.assert_allclose(actual, expected, atol=1e-9)
        assert f"chance {CHANCE[10]:.3f}" in opened.text("#heat")

    def test_a_groups_heat_map_pools_its_tasks(self, opened):
        open_row(opened, "tiny", "both")
        actual = np.array(opened.run("document.querySelector('#heat').data[0].z"), dtype=float)
        documents = [
            np.mean(
                [r["normalized_miscoupling"][0] for r in RECORDS["arc"][2 * i : 2 * i + 2]], axis=0
            )
            for i in range(3)
        ]
        documents += [record("arc", 5)["normalized_miscoupling"][0]] + [
            r["normalized_miscoupling"][0] for r in RECORDS["gsm"]
        ]
        off = ~np.eye(4, dtype=bool)
        np.testing.assert_allclose(actual[off], 1 - np.mean(documents, axis=0)[off], atol=1e-4)

    def test_models_are_compared_layer_by_layer(self, opened):
        open_row(opened, "tiny", "arc")
        drawn = (
            "document.querySelector('#profile').data"
            ".filter(t => t.showlegend !== false && !t.name.startsWith('chance'))"
        )
        assert opened.run(f"{drawn}.length") == 2
        assert "dashed" not in opened.text("#profile-caption"), "nothing is dashed"
        opened.click("#compare")
        opened.until(f"{drawn}[0].name.startsWith('org/')")
        lines = opened.run(f"{drawn}.map(t => [t.name, t.x])")
        assert [len(x) for _, x in lines] == [6, 4] and all(
            x[0] == 0 and x[-1] == 1 for _, x in lines
        )

    def test_a_run_without_tables_says_so(self, opened):
        open_row(opened, "plain", "arc")
        assert "no coupling table" in opened.text("#layers-missing")
        assert opened.text("#heat").strip() == "No layer-by-layer matrix was measured."
        set_value(opened, "#model", opened.run("document.querySelector('#model').options[2].value"))
        opened.until(
            "document.querySelector('#heat').data && !document.querySelector('#heat .note')"
        )

    def test_documents(self, opened):
        open_row(opened, "tiny", "arc")
        opened.click("#tab-documents")
        opened.until("!document.querySelector('#documents').hidden")
        assert column(opened, "document-list", "Right?") == ["✗ wrong"] * 2 + ["✓ right"] * 2 + [
            "–"
        ] * 2 + ["✗ wrong", "–"]
        opened.click("#document-list tbody tr:nth-child(3) button")
        opened.until("document.querySelector('#document-heat')")
        shown, expected = opened.text("#document"), record("arc", 1)
        off = ~np.eye(4, dtype=bool)
        for at, rank in enumerate((10, 30)):
            value = 1 - expected["normalized_miscoupling"][at][off].mean(dtype=float)
            assert f"coupling {value:.4f} at K = {rank} (chance {1 - CHANCE[rank]:.4f})" in shown
        assert (
            expected["text"] in shown
            and "measured at token 5 of 5" in shown
            and "✓ right" in shown
            and "-2.50" in shown
        )
        actual = np.array(
            opened.run("document.querySelector('#document-heat').data[0].z"), dtype=float
        )
        np.testing.assert_allclose(
            actual[off], 1 - expected["normalized_miscoupling"][0][off], atol=6e-5
        )
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
        set_value(opened, "#model", "org/tiny")
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
        set_value(opened, "#model", "org/plain")
        assert "Scored without measuring coupling." in opened.text("#provenance")
        height = opened.run("document.querySelector('#provenance').getBoundingClientRect().height")
        assert height < 900, "a run's provenance was 12,000 pixels high"

    def test_a_view_can_be_sent(self, report, opened):
        """Place and selection are in the address: who opens it sees the same."""
        set_value(opened, "#level", "all")
        set_value(opened, "#rank", "30")
        open_row(opened, "tiny", "gsm")
        opened.click("#tab-documents")
        opened.click("#document-list tbody tr:nth-child(2) button")
        opened.until("document.querySelector('#document h2')")
        link = opened.run("location.hash")
        with browser.Browser() as other:
            other.open(report)
            other.run(f"location.hash = {json.dumps(link)}")
            other.until("document.querySelector('#document h2')")
            assert (
                other.text("#document h2") == "gsm, document 1"
                and other.run("document.querySelector('#rank').value") == "30"
            )
            other.run(
                "location.hash = '#tab=nowhere&rank=7&axis=__proto__&model=%3Cimg%3E&document=x'"
            )
            other.until("!document.querySelector('#overview').hidden")
            assert (
                other.run("document.querySelector('#rank').value") == "10" and other.console == []
            )

    def test_tables_are_downloaded_as_csv(self, opened):
        opened.run(
            "HTMLAnchorElement.prototype.click = () => {},"
            "URL.createObjectURL = (blob) => {"
            "blob.text().then(t => { window.saved = t }); return 'data:text/csv,' }, 0"
        )
        opened.click("#rows .save")
        opened.until("window.saved")
        table = pd.read_csv(io.StringIO(opened.run("window.saved").removeprefix("\ufeff")))
        assert {
            "Model",
            "Task",
            "Score",
            "Score stderr",
            "Coupling",
            "Coupling stderr",
            "Worst error",
        } <= set(table)
        assert len(table) == opened.count("#rows tbody tr")

    def test_columns_are_chosen(self, opened):
        assert "Chance" not in headers(opened, "rows") and "Parameters" not in headers(
            opened, "rows"
        )
        opened.click(".choice summary")
        opened.click("#columns label:nth-child(3) input")
        opened.until(
            "document.querySelectorAll('#rows thead th button')[2].dataset.name === 'Parameters'"
        )

    def test_one_axis_per_metric(self, tmp_path):
        """Regression: perplexity and accuracy shared an axis, and neither could be read."""
        for i in range(3):
            where = save(
                tmp_path,
                {"arc": task_summary(0.1 * i), "wiki": task_summary()},
                model=f"m{i}",
                run_id=str(i),
            )
            (file,) = where.glob("results_*.json")
            run = json.loads(file.read_text())
            run["results"]["wiki"] = {"alias": "wiki", "word_perplexity,none": 20.0 + i}
            file.write_text(json.dumps(run))
        with browser.Browser() as window:
            window.open(write_report(tmp_path, tmp_path / "page.html"))
            drawn = (
                "document.querySelector('#scatter').data.filter(t => t.error_x).map(t => t.name)"
            )
            assert window.run(drawn) == [
                "arc"
            ] and "not the 3 rows of other metrics" in window.text("#scatter-note")
            set_value(window, "#score", "word_perplexity,none")
            assert window.run(drawn) == ["wiki"]

    def test_names_of_points_stay_in_the_picture_and_clear_of_each_other(self, tmp_path):
        """Regression: a phone cut them off, error bars crossed them, the chance line was short."""
        for i in range(6):
            summary = {"arc": task_summary(0.9 - 0.02 * (i % 3))}
            save(
                tmp_path,
                summary,
                model=f"org/a-longer-name-{i}",
                run_id=str(i),
                fingerprint=f"f{i}",
            )
        box = "(r => [r.left, r.right, r.top, r.bottom])(e.getBoundingClientRect())"
        for width in (390, 1300):
            with browser.Browser(width, 900) as window:
                window.open(write_report(tmp_path, tmp_path / "page.html"))
                (plot,) = window.run(f"[...document.querySelectorAll('#scatter')].map(e => {box})")
                texts = "[...document.querySelectorAll('#scatter .textpoint text')]"
                texts += ".filter(e => e.textContent)"
                names = window.run(f"{texts}.map(e => {box})")
                assert names and all(
                    plot[0] <= left and right <= plot[1] for left, right, *_ in names
                )
                apart = [
                    a[1] <= b[0] or b[1] <= a[0] or a[3] <= b[2] or b[3] <= a[2]
                    for a, b in itertools.combinations(names, 2)
                ]
                assert all(apart)
                chance = window.run("document.querySelector('#scatter').data.find(t => t.chance).y")
                assert chance == window.run("document.querySelector('#scatter').layout.yaxis.range")
                assert window.text("#summary").startswith("6 models, 1 task")

    def test_one_model_prompted_in_two_ways_is_one(self, tmp_path):
        for i, shots in enumerate((0, 5)):
            where = save(tmp_path / str(i), {"arc": task_summary()}, rows=[record()], run_id=str(i))
            (file,) = where.glob("results_*.json")
            file.write_text(json.dumps(json.loads(file.read_text()) | {"n-shot": {"arc": shots}}))
        with browser.Browser() as window:
            window.open(write_report(tmp_path, tmp_path / "page.html"))
            assert window.count("#rows tbody tr") == 2 and window.text("#summary").startswith(
                "1 model, 1 task"
            )
            window.click("#tab-layers")
            window.until("document.querySelector('#regularity tbody tr')")
            assert "Line-shape score" in window.text("#regularity")
            assert "1 where the stream moves in a straight line" in window.text("#regularity")

    def test_untrained_weights_are_drawn_dashed_and_their_difference_told(self, tmp_path):
        """Regression: the untrained twin was nowhere on the page."""
        rows = [record("arc", i) for i in range(4)]
        twins = [record("arc", i, seed=3) | {"weights": "untrained"} for i in range(4)]
        save(tmp_path, {"arc": task_summary()}, rows=[*rows, *twins], untrained={"seed": 0})
        off = ~np.eye(4, dtype=bool)
        own, other = (
            [1 - r["normalized_miscoupling"][0][off].mean(dtype=float) for r in part]
            for part in (rows, twins)
        )
        difference = np.subtract(own, other)
        expected = f"{difference.mean():.4f} ± {difference.std(ddof=1) / 2:.4f}"
        with browser.Browser() as window:
            window.open(write_report(tmp_path, tmp_path / "page.html"))
            assert column(window, "rows", "Less untrained") == [expected]
            window.click("#tab-layers")
            window.until("document.querySelector('#profile').data")
            dashed = window.run(
                "document.querySelector('#profile').data"
                ".filter(t => t.line.dash === 'dash').map(t => t.y)"
            )
            layers = np.mean(
                [np.where(off, r["normalized_miscoupling"][0], np.nan) for r in twins], axis=0
            )
            np.testing.assert_allclose(
                dashed, [1 - np.nanmean(layers, axis=1), 1 - np.nanmean(layers, axis=0)], atol=1e-5
            )
            assert "dashed: untrained" in window.text("#profile-caption")
            assert window.console == []

    def test_the_policy_is_in_force(self, report):
        """A script that is added to the page does not run."""
        with browser.Browser() as window:
            window.open(report)
            window.run(
                "document.body.append(Object.assign("
                "document.createElement('script'), {text: 'window.pwned = 4'}))"
            )
            assert window.run("window.pwned === undefined")
            assert any("Content Security Policy" in line for line in window.console)

    def test_a_phone_shows_coupling_without_scrolling(self, report):
        """Regression: the column of coupling was beyond the edge of the screen."""
        with browser.Browser(390, 844) as window:
            window.open(report)
            box = (
                "(b => { const r = b.getBoundingClientRect(); return [r.left, r.right] })"
                "([...document.querySelectorAll('%s th button')]"
                ".find(e => e.dataset.name === 'Coupling'))"
            )
            left, right = window.run(box % "#rows")
            assert 0 <= left < right <= 390
            open_row(window, "tiny", "arc")
            window.click("#tab-documents")
            window.until("document.querySelector('#document-list tbody tr')")
            left, right = window.run(box % "#document-list")
            assert 0 <= left < right <= 390

    def test_no_half_of_a_wide_page_is_empty(self, report):
        """Regression: prompts took 160 pixels beside an empty half of the page."""
        with browser.Browser(1300, 900) as window:
            window.open(report)
            open_row(window, "tiny", "arc")
            window.click("#tab-documents")
            window.until("document.querySelector('#document-list tbody tr')")
            width = "document.querySelector('#document-list').getBoundingClientRect().width"
            assert window.run(width) > 1000
            window.click("#document-list tbody tr:nth-child(1) button")
            window.until("document.querySelector('#document h2')")
            assert window.run(width) < 800

    def test_logarithmic_axes_have_whole_numbers_in_order(self, report):
        """Regression: the labels of an axis were 5, 2, 10k, 5, 2."""
        with browser.Browser() as window:
            window.open(report)
            open_row(window, "tiny", "arc")
            texts = "[...document.querySelectorAll('#norms .ytick text')].map(e => e.textContent)"
            labels = [float(text) for text in window.run(texts)]
            assert len(labels) >= 2 and labels == sorted(labels)

    def test_a_phone_never_scrolls_sideways(self, report):
        with browser.Browser(390, 844) as window:
            window.open(report)
            for name in ("overview", "layers", "documents", "provenance"):
                window.click(f"#tab-{name}")
                window.until(f"!document.querySelector('#{name}').hidden")
                assert window.run(
                    "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
                ), name
            assert window.console == []

    @pytest.mark.parametrize("scheme, light", [(0, False), (1, True)])
    def test_the_dark(self, report, scheme, light):
        """Background and text, of the page and of its plots, follow the reader's setting."""
        expression = (
            "[getComputedStyle(document.body).backgroundColor,"
            "getComputedStyle(document.body).color,"
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
        background, ink, plotted = (brightness(color) for color in json.loads(ran.stdout))
        assert (background > 200 and ink < 60) if light else (background < 60 and ink > 200)
        assert plotted == ink


def brightness(color):
    if color.startswith("#"):
        return sum(int(color[i : i + 2], 16) for i in (1, 3, 5)) / 3
    return sum(map(int, re.findall(r"\d+", color)[:3])) / 3


def test_contrast():
    """Text and its background in both schemes differ by at least 4.5 to 1, as WCAG AA asks."""
    css = Path(cli.__file__).with_name("report").joinpath("assets", "page.css").read_text()
    schemes = re.findall(r":root \{(.*?)\}", css, re.S)
    assert len(schemes) == 2
    for scheme in schemes:
        colors = dict(re.findall(r"--(\w+): #(\w{6})", scheme))
        for ink in ("ink", "soft", "accent", "right", "wrong"):
            for paper in ("paper", "raised"):
                dark, light = sorted(map(luminance, (colors[ink], colors[paper])))
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, paper)


def luminance(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]
