"""Tables that other software wrote or changed: named and passed over, beside others that are read.

They have no checksums of ours. Each case was a traceback, or a number from parts that do not fit.
"""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from saved_runs import record, save, task_summary

from lm_eval_coupling import cli, load_records
from lm_eval_coupling.report.page import gather

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
