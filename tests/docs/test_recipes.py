"""Every recipe of docs/measures.md reads matrices without the package, run as printed."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from saved_runs import record, save, task_summary

PAGE = Path(__file__).parents[2] / "docs" / "measures.md"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A table of two documents, and the matrices of the first."""
    rows = [record(doc_id=i) for i in range(2)]
    folder = save(tmp_path_factory.mktemp("run"), {"arc": task_summary()}, rows=rows)
    return str(next(folder.glob("coupling_*.parquet"))), rows[0]["normalized_miscoupling"]


def recipe(reader):
    """The lines of one reader, the last of which gives ``m``."""
    blocks = re.findall(
        r"```(?:python|r)\n# (\w+).*?\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL
    )
    (code,) = [code for name, code in blocks if name == reader]
    assert code.count("\n") == 2
    return code


@pytest.mark.parametrize("reader", ["pandas", "polars", "duckdb"])
def test_in_python(saved, reader):
    file, expected = saved
    names = {"FILE": file, "numpy": np, reader: pytest.importorskip(reader)}
    exec(recipe(reader), names)
    assert names["m"].shape == expected.shape
    np.testing.assert_array_equal(names["m"].astype(np.float32), expected)


def test_in_r(saved):
    file, expected = saved
    if not shutil.which("Rscript"):
        pytest.skip("there is no R here")
    if subprocess.run(
        ["Rscript", "-e", "library(arrow)"], capture_output=True, check=False
    ).returncode:
        pytest.skip("R has no package arrow here")
    code = f"FILE <- '{file}'\n{recipe('R')}cat(dim(m), sprintf('%.9g', aperm(m, c(2, 1, 3))))"
    output = subprocess.run(
        ["Rscript", "-e", code], capture_output=True, text=True, check=True
    ).stdout.split()
    ranks, layers, _ = expected.shape
    assert list(map(int, output[:3])) == [layers, layers, ranks]
    np.testing.assert_array_equal(np.float32(output[3:]).reshape(expected.shape), expected)
