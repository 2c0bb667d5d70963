"""Words of directions in the report: joined with records, refused by name, shown as text."""

import browser
import pandas as pd
import pytest
from report_pages import NASTY, column, open_row, row_of
from saved_runs import record

from lm_eval_coupling import cli
from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.report.page import gather, write_report
from lm_eval_coupling.saved.words import read_words, tokens_hash

SIGMAS = {(layer, k): 10.0 * layer + 1 / k for layer in (1, 2) for k in (1, 2, 3, 4)}


def rows_of(measured, **changes):
    """The lines of a file of words for one record: two layers, four directions, both signs."""
    key = {
        name: measured[name] for name in ("task", "doc_id", "doc_hash", "prompt_hash", "position")
    }
    key |= {"fingerprint": "f" * 64, "tokens_hash": tokens_hash(measured["tokens"])} | changes
    return [
        key
        | {
            "layer": layer,
            "k": k,
            "sign": sign,
            "singular_value": sigma,
            "words": f"' {sign}{layer}{k}' {NASTY}",
        }
        for (layer, k), sigma in SIGMAS.items()
        for sign in "+-"
    ]


def write(file, rows):
    pd.DataFrame(rows).to_csv(file, index=False)
    return file


def with_words(data):
    """Task, document and prompt of what has words."""
    return [
        (table["task"], item["id"], item["prompt"])
        for table in data["tables"]
        for item in table["documents"]
        if "words" in item
    ]


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "words.csv", rows_of(record("arc", 5)))


class TestJoin:
    def test_documents_have_their_words_and_others_say_nothing(self, saved, file):
        data = gather(saved, words=file)
        assert with_words(data) == [("arc", 5, 0)]
        shown = data["tables"][row_of(data, "org/tiny", "arc")["tables"][0]]["documents"][6][
            "words"
        ]
        assert [(item["layer"], item["k"]) for item in shown] == [
            (layer, k) for layer in (1, 2) for k in (1, 2, 3)
        ]
        assert [item["sigma"] for item in shown] == pytest.approx(
            [SIGMAS[item["layer"], item["k"]] for item in shown], rel=1e-5
        )
        assert shown[1]["words"].startswith("' +12'") and shown[1]["opposite"].startswith("' -12'")
        assert with_words(gather(saved)) == []

    @pytest.mark.parametrize(
        "changes",
        [
            {"fingerprint": "e" * 64},
            {"doc_hash": "d9"},
            {"doc_hash": ""},
            {"prompt_hash": "p9"},
            {"position": 3},
            {"tokens_hash": tokens_hash([1, 2])},
        ],
    )
    def test_what_was_measured_otherwise_has_other_words(self, saved, tmp_path, changes):
        file = write(tmp_path / "words.csv", rows_of(record("arc", 5), **changes))
        count = 0 if changes == {"doc_hash": ""} else 1
        with pytest.raises(
            CouplingError,
            match=rf"words\.csv with words of {count} prompts, none of them on this page",
        ):
            gather(saved, words=file)

    def test_documents_that_the_page_has_no_room_for(self, saved, file):
        with pytest.raises(CouplingError, match="include more with --documents"):
            gather(saved, words=file, documents=1)

    def test_one_side_and_the_same_lines_twice(self, tmp_path):
        rows = [row for row in rows_of(record()) if row["sign"] == "-"]
        output = read_words(write(tmp_path / "words.csv", rows * 2)).of("f" * 64, record())
        assert len(output) == len(SIGMAS) and {item["words"] for item in output} == {None}


class TestRefusals:
    @pytest.mark.parametrize(
        "change, output",
        [
            (
                lambda rows: rows.drop(columns="tokens_hash"),
                "words.csv with the columns task, doc_id.* expected",
            ),
            (
                lambda rows: rows.assign(layer="first"),
                "'first' in the column layer .*, expected a whole number",
            ),
            (
                lambda rows: rows.assign(position=-1),
                "'-1' in the column position .*, expected a whole number",
            ),
            (
                lambda rows: rows.assign(singular_value="large"),
                "'large' in the column singular_value .*, expected a number",
            ),
            (lambda rows: rows.assign(sign="±"), "'±' in the column sign .*, expected"),
            (lambda rows: rows.assign(k=1), "layer 1, direction 1 of document d5 more than once"),
        ],
    )
    def test_files_of_another_kind(self, file, change, output):
        change(pd.read_csv(file)).to_csv(file, index=False)
        with pytest.raises(CouplingError, match=output):
            read_words(file)

    @pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00", b'a\n1,2\n"'])
    def test_files_that_cannot_be_read(self, tmp_path, content):
        file = tmp_path / "words.csv"
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(
            CouplingError, match=r"words\.csv, which is no readable CSV file of words"
        ):
            read_words(file)

    def test_the_command_says_it_in_a_sentence_and_leaves_no_page(self, saved, tmp_path, capsys):
        command = ["report", str(saved), "-o", str(tmp_path / "r.html"), "--words", str(tmp_path)]
        assert cli.main(command) == 2 and not (tmp_path / "r.html").exists()
        assert capsys.readouterr().err.startswith(f"lm-eval-coupling: got {tmp_path}, which")


@pytest.mark.usefixtures("report")  # skips where there is no browser
def test_words_are_seen_with_their_document_as_text(saved, file, tmp_path):
    page = write_report(saved, tmp_path / "report.html", words=file)
    with browser.Browser(390, 844) as window:
        window.open(page)
        open_row(window, "tiny", "arc")
        window.click("#tab-documents")
        window.click("#document-list tbody tr:nth-child(1) button")
        window.until("document.querySelector('#document h2')")
        assert window.count("#document-words") == 0
        window.click("#document-list tbody tr:nth-child(7) button")
        window.until("document.querySelector('#document-words')")
        assert column(window, "document-words", "Layer") == ["1"] * 3 + ["2"] * 3
        assert column(window, "document-words", "σ") == [
            "11",
            "10.5",
            "10.33",
            "21",
            "20.5",
            "20.33",
        ]
        expected = rows_of(record("arc", 5))
        cells = "[...document.querySelectorAll('#document-words tbody tr:first-child td')]"
        cells += ".map(e => e.textContent).slice(2)"
        assert window.run(cells) == [expected[0]["words"], expected[1]["words"]]
        window.run("document.querySelector('#document-words th:nth-child(3) button').click()")
        assert column(window, "document-words", "σ")[0] == "21"
        assert window.run(
            "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        )
        assert window.count("main script, main img, iframe") == 0 and window.run(
            "window.pwned === undefined"
        )
        assert window.console == [] and window.requests == [page.as_uri()]
