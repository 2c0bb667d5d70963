"""Tables that other software wrote or changed: named and passed over, beside others that are read.

They have no checksums of ours. Each case was a traceback, or a number from parts that do not fit.
"""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from saved_runs import record, save, task_summary

from lm_eval_coupling import cli, load_records
from lm_eval_coupling.report.page import gather
from lm_eval_coupling.saved.saved_run import find_runs

ROWS = 3
# Columns and their values in every row.
UNFIT = {
    "no ranks": ("ranks", None),
    "a rank below 1": ("ranks", [-10, 30]),
    "a rank that is null": ("ranks", [10, None]),
    "a rank twice": ("ranks", [10, 10]),
    "more ranks than values": ("ranks", [10, 30, 50]),
    "fewer values than ranks": ("coupling", [0.5]),
    "matrices that are not square": ("normalized_miscoupling", [[[0.1, 0.2]]] * 2),
}


def change(folder, column, values):
    """Write the table again as pyarrow does, with other values in one column."""
    (file,) = folder.glob("coupling_*.parquet")
    table = pq.read_table(file)
    place = table.schema.get_field_index(column)
    field = table.schema.field(column)
    changed = table.set_column(place, field, pa.array(values, field.type))
    pq.write_table(changed.replace_schema_metadata(table.schema.metadata), file)


@pytest.fixture
def runs(tmp_path):
    """Two runs; the first one's folder comes with the root of both."""
    folders = [
        save(
            tmp_path / "runs",
            {"arc": task_summary()},
            model=model,
            rows=[record(doc_id=i) for i in range(ROWS)],
            fingerprint=model,
            run_id=model,
        )
        for model in ("org/changed", "org/intact")
    ]
    return tmp_path / "runs", folders[0]


@pytest.mark.parametrize("case", UNFIT)
def test_rows_that_do_not_fit_together(runs, case, capsys):
    root, changed = runs
    column, value = UNFIT[case]
    change(changed, column, [value] * ROWS)
    assert set(load_records(root)["model"]) == {"org/intact"}
    assert cli.main(["show", str(root), "--csv"]) == 0
    shown = capsys.readouterr().out
    assert "org/intact" in shown
    assert ("org/changed" in shown) == (
        column == "normalized_miscoupling"
    )  # which it does not read
    pytest.importorskip("plotly")
    page = gather(root)
    assert len(page["tables"]) == 1 and "do not fit together" in " ".join(page["passed_over"])


def write_again(folder, change):
    (file,) = folder.glob("coupling_*.parquet")
    table = pq.read_table(file)
    pq.write_table(change(table).replace_schema_metadata(table.schema.metadata), file)


@pytest.mark.parametrize("column", ["ranks", "normalized_miscoupling", "norms", "certificate"])
def test_a_column_that_is_missing_or_there_twice(runs, column):
    """It ended every command in a KeyError."""
    root, changed = runs
    write_again(changed, lambda table: table.append_column(column, table[column]))
    problems = find_runs(root).passed_over
    assert any(f"with two columns {column}" in problem for problem in problems)
    assert set(load_records(root)["model"]) == {"org/intact"}
    (file,) = changed.glob("coupling_*.parquet")
    file.unlink()
    where = save(root, {"arc": task_summary()}, model="org/changed", rows=[record()])
    write_again(where, lambda table: table.drop_columns([column]))
    assert any(f"without the column {column}" in text for text in find_runs(root).passed_over)
    assert cli.main(["show", str(root), "--csv"]) == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.slice(0, 1),
        lambda table: pa.concat_tables([table, table]),
        lambda table: table.set_column(
            table.schema.get_field_index("coupling"), "coupling", pa.array([[7.0, 7.0]] * ROWS)
        ),
    ],
    ids=["fewer rows", "rows twice", "other numbers"],
)
def test_a_table_that_was_written_again_is_named(runs, change):
    """Fewer rows, or each twice, were other numbers of show than of load_runs without a word."""
    root, changed = runs
    assert not find_runs(root).passed_over
    write_again(changed, change)
    (problem,) = find_runs(root).passed_over
    assert "which other software wrote again" in problem and str(changed) in problem
