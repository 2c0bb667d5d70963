"""What the tests of studies share."""

import numpy as np
import pytest
import saved_runs
from studied import record, save

from lm_eval_coupling.measures.formulas.headline import chance_level


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Four documents with everything measured, and their untrained twin at chance."""
    at_chance = np.full((2, 3, 3), chance_level(10), np.float32)
    rows = [record(i, shift=i / 100) for i in range(4)]
    rows += [
        record(i, weights="untrained", normalized_miscoupling=at_chance, line_shape_score=2.0)
        for i in range(4)
    ]
    return save(tmp_path_factory.mktemp("run"), rows)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A file that a small model is trained on."""
    file = tmp_path_factory.mktemp("text") / "sky.txt"
    file.write_text("The sky is blue, the grass is green and the snow is white. " * 60)
    return file


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run of depth coupling alone, from before there were twins."""
    depth = ("normalized_miscoupling", "singular_values", "certificate", "seconds")
    rows = [saved_runs.record("arc", i, layers=3) for i in range(2)]
    about = (
        "task",
        "doc_id",
        "doc_hash",
        "prompt_hash",
        "prompt_index",
        "kind",
        "text",
        "n_tokens",
        "position",
        "ranks",
    )
    kept = [
        {name: row[name] for name in (*about, *depth) if name != "weights"}
        | {"measures": ("depth",)}
        for row in rows
    ]
    return save(tmp_path_factory.mktemp("plain"), kept)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A script without --out leaves its pictures where it was called."""
    monkeypatch.chdir(tmp_path)
