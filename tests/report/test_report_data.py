"""The report's numbers are those of `load_runs` and of the records."""

import numpy as np
import pytest
from report_pages import BAD_MODEL, packed, row_of
from saved_runs import CHANCE, record, save, task_summary

from lm_eval_coupling.errors import Reason
from lm_eval_coupling.measures.contract import MeasureResult
from lm_eval_coupling.measuring.record import PromptCoupling
from lm_eval_coupling.report.data import _Room
from lm_eval_coupling.report.page import build_page, embeddable_json, gather
from lm_eval_coupling.report.table_numbers import read_columns, table_numbers
from lm_eval_coupling.report.task_table import pack
from lm_eval_coupling.runs.rows import DocumentKey, DocumentPrompt, Row, worst_certificate
from lm_eval_coupling.saved.saved_run import find_runs
from lm_eval_coupling.saved.scores_table import load_runs
from lm_eval_coupling.saved.values import document_values, mean_and_error, prompt_values


class TestNumbers:
    def test_rows_are_those_of_load_runs(self, saved, gathered):
        runs = load_runs(saved)
        assert len(gathered["rows"]) == len(runs) == 5
        for row, expected in zip(gathered["rows"], runs.to_dict("records"), strict=True):
            assert (row["model"], row["task"]) == (expected["model"], expected["task"])
            assert row["scores"]["acc,none"] == pytest.approx(
                [expected["acc,none"], expected["acc_stderr,none"]]
            )
            assert row["scores"]["f1,strict"] == [0.4, None]
            assert set(row["coupling"]) == (set() if row["model"] == "org/plain" else {"10", "30"})
            for rank, actual in row["coupling"].items():
                assert actual["mean"] == pytest.approx(expected[f"coupling@{rank}"], rel=1e-5)
                assert actual["stderr"] == pytest.approx(
                    expected[f"coupling_stderr@{rank}"], rel=1e-5
                )
                assert actual["chance"] == pytest.approx(1 - CHANCE[int(rank)], rel=1e-5)
                assert actual["excess"] == pytest.approx(
                    expected[f"coupling_excess@{rank}"], rel=1e-5
                )
                assert actual["n"] == expected[f"coupling_n@{rank}"]
            assert [row["measured"], row["n_samples"]] == [
                expected["measured"],
                expected["n_samples"],
            ] or row["group"]

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
        ours, other = (
            row_of(gathered, model, "arc")["tables"] for model in ("org/tiny", BAD_MODEL)
        )
        assert ours != other and gathered["tables"][other[0]]["total"] == 1

    @pytest.mark.parametrize("rank", [10, 30])
    def test_the_mean_matrix_is_the_mean_over_documents(self, saved, gathered, rank):
        table = gathered["tables"][row_of(gathered, "org/tiny", "arc")["tables"][0]]
        actual = packed(table["mean"][str(rank)], 4)
        at = (10, 30).index(rank)
        documents = [
            np.mean([record("arc", i, p)["normalized_miscoupling"][at] for p in range(2)], axis=0)
            for i in range(3)
        ]
        documents.append(record("arc", 5)["normalized_miscoupling"][at])
        np.testing.assert_allclose(actual, np.mean(documents, axis=0), atol=6e-5)
        (own,) = [t for _, t in find_runs(saved / "org__tiny").newest_tables() if t.task == "arc"]
        mean, _, n = mean_and_error(document_values(prompt_values(own))[f"coupling@{rank}"])
        assert table["measured"] == n == 4
        assert 1 - actual[~np.eye(4, dtype=bool)].mean() == pytest.approx(mean, abs=1e-4)

    def test_documents(self, gathered):
        table = gathered["tables"][row_of(gathered, "org/tiny", "arc")["tables"][0]]
        assert [(item["id"], item["prompt"]) for item in table["documents"]][:3] == [
            (0, 0),
            (0, 1),
            (1, 0),
        ]
        item, expected = table["documents"][3], record("arc", 1, 1)
        off = ~np.eye(4, dtype=bool)
        np.testing.assert_allclose(
            packed(item["matrix"], 4), expected["normalized_miscoupling"][0], atol=6e-5
        )
        for at, rank in enumerate(("10", "30")):
            target = 1 - expected["normalized_miscoupling"][at][off].mean(dtype=float)
            assert item["coupling"][rank] == pytest.approx(target, rel=1e-5)
        np.testing.assert_allclose(item["norms"], expected["norms"], rtol=1e-5)
        failed = table["documents"][-1]
        assert (
            failed["reason"] == "out of <b>memory</b>"
            and failed["matrix"] is None
            and failed["coupling"] == {}
        )

    def test_undefined_pairs_are_left_out(self, tmp_path):
        rows = [record(doc_id=i) for i in range(2)]
        rows[0]["normalized_miscoupling"][0, 1, 2] = np.nan
        for row in rows:
            row["normalized_miscoupling"][0, 2, 3] = np.nan
        save(tmp_path, {"arc": task_summary()}, rows=rows)
        (table,) = gather(tmp_path)["tables"]
        actual = packed(table["mean"]["10"], 4)
        assert actual[1, 2] == pytest.approx(rows[1]["normalized_miscoupling"][0, 1, 2], abs=6e-5)
        assert np.isnan(actual[2, 3]) and np.isnan(actual).sum() == 1

    def test_documents_without_coupling_are_not_behind_its_mean(self, tmp_path):
        """A refused document with other numbers weighed in a group's mean as one with coupling."""
        rows = [record(doc_id=i) for i in range(3)]
        rows[2] |= {"normalized_miscoupling": None, "reason": "the Jacobian is off"}
        save(tmp_path, {"arc": task_summary()}, rows=rows)
        (table,) = gather(tmp_path)["tables"]
        assert table["measured"] == 2 and table["total"] == 3

    def test_packing_keeps_four_digits(self):
        matrix = np.array([[0, 1], [np.nan, 0.12344]], dtype=np.float32)
        np.testing.assert_array_equal(packed(pack(matrix), 2), [[0, 1], [np.nan, 0.1234]])


class TestLimits:
    def test_documents_are_capped_and_the_mean_is_not(self, saved, gathered):
        capped = gather(saved, documents=2)
        assert capped["limit"] == 2
        for table, full in zip(capped["tables"], gathered["tables"], strict=True):
            assert (
                len(table["documents"]) == min(2, full["total"]) and table["total"] == full["total"]
            )
            assert table["mean"] == full["mean"] and table["norms"] == full["norms"]
        assert gather(saved, documents=0)["tables"][0]["documents"] == []

    @pytest.mark.parametrize(
        ("totals", "documents", "limit"),
        [
            ([100] * 40, 200, 200),
            ([5] * 100 + [100] * 100, 200, 35),  # 500 + 3500
            ([50] * 5000, 200, 1),
            ([50] * 5000, 0, 0),
        ],
    )
    def test_many_tables_share_the_page(self, totals, documents, limit):
        room = _Room(documents)
        tables = []
        for total in totals:
            kept = [*range(min(total, room.limit))]
            tables.append({"total": total, "documents": kept})
            room.add(tables[-1])
        assert room.limit == limit
        assert all(table["documents"] == [*range(min(table["total"], limit))] for table in tables)

    def test_long_prompts_keep_their_end(self, tmp_path):
        save(
            tmp_path,
            {"arc": task_summary()},
            rows=[record() | {"text": "a" * 5000 + "the question"}],
        )
        (item,) = gather(tmp_path)["tables"][0]["documents"]
        assert (
            item["text"].endswith("athe question")
            and len(item["text"]) == 4000
            and item["cut"] == 1012
        )

    def test_a_full_page_stays_small(self, tmp_path):
        """200 documents of 32 layers: below 4 kB each, and plotly once."""
        save(
            tmp_path,
            {"arc": task_summary()},
            rows=[record(doc_id=i, layers=32) for i in range(250)],
        )
        data = gather(tmp_path)
        assert len(data["tables"][0]["documents"]) == 200
        assert len(embeddable_json(data)) < 200 * 4000
        assert build_page(data).count("plotly.js v") == 1


def _row(doc, certificate, weights="trained", place=0, measure="depth", is_refused=False):
    """Make a measured row; refused Jacobians leave their certificates only."""
    columns = {"certificate": np.float32([1e-7, certificate]), "method": ("closed",) * 2}
    if not is_refused:
        pairs = np.full((1, 2, 2), 0.5, np.float32)
        by_measure = {
            "depth": {"normalized_miscoupling": pairs},
            "controls": {"deflated": pairs, "deflated_coupling": np.float32([0.5])},
            "swapped": {"miscoupling_to_vju": pairs, "miscoupling_to_absolute_vju": pairs},
        }
        columns |= by_measure[measure]
    reasons = (Reason("certificate", "the Jacobian is off"),) if is_refused else ()
    measured = PromptCoupling((1, 2), 1, (2,), {measure: MeasureResult(columns, reasons)})
    document = DocumentKey("arc", f"d{doc}", f"p{doc}")
    prompt = DocumentPrompt(document, doc, 0, kind="context", tokens=(1, 2), text="x")
    return Row(prompt, weights, measured, place=place)


@pytest.mark.parametrize("measure", ["depth", "controls", "swapped"])
@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(0, 2e-6), (1, 0.5, "trained", 0, True)], 2e-6),
        ([(0, 2e-6), (0, 3e-6, "trained", 1), (1, 1e-6)], 3e-6),
        ([(0, 0.5, "trained", 0, True), (0, 3e-6, "trained", 1)], 3e-6),
        ([(0, 2e-6), (0, 5e-6, "untrained")], 2e-6),
        ([(0, 0.5, "trained", 0, True)], np.nan),
    ],
)
def test_the_worst_certificate_of_a_table_is_that_of_its_run(tmp_path, measure, rows, expected):
    """`show` and the page counted refused Jacobians, and left further tokens out."""
    measured = [
        _row(doc, certificate, *more[:2], measure=measure, is_refused=bool(more[2:]))
        for doc, certificate, *more in rows
    ]
    save(tmp_path, {"arc": task_summary()}, rows=[row.to_columns() for row in measured])
    (table,) = find_runs(tmp_path).runs[0].tables
    ((_, numbers),) = table_numbers(read_columns([table], []))
    np.testing.assert_allclose(numbers.worst_certificate, expected)
    np.testing.assert_equal(numbers.worst_certificate, worst_certificate(measured))
