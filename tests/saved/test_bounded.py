"""Whatever a path leads to, reading ends, and JSON that could be read in two ways is refused."""

import json
import os

import pytest
from saved_runs import DATE, sample, save, task_summary, write_samples

from lm_eval_coupling import load_runs
from lm_eval_coupling.saved import bounded
from lm_eval_coupling.saved.facts import facts_beside
from lm_eval_coupling.saved.jsonlines import read_json_lines
from lm_eval_coupling.saved.saved_run import find_runs
from lm_eval_coupling.sweep import state


@pytest.mark.parametrize("kind", ["pipe", "device", "huge", "link to a device"])
def test_what_would_never_end_is_not_opened(tmp_path, kind):
    """A pipe waited for its writer, and a sparse file of 8 GB was read into memory."""
    file = tmp_path / "file"
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "huge":
        with file.open("wb") as sparse:
            sparse.truncate(8 << 30)
    elif kind == "link to a device":
        file.symlink_to("/dev/zero")
    file = file if file.exists() else "/dev/zero"
    with pytest.raises(OSError, match="no regular file|has 8.6 GB, at most 0.5"):
        bounded.read_text(file)
    assert state.read_json(tmp_path / "file") == {}
    assert list(read_json_lines(tmp_path / "file")) == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "a": 2}', "it has 'a' twice"),
        ('{"x": [{"b": 1, "c": 2, "b": 1}]}', "it has 'b' twice"),
        ('{"a": 1, "\\u0061": 1}', "it has 'a' twice"),
        ("[" * 200 + "]" * 200, "nested more than 100 deep"),
        ("[" * 100_000, "nested more than 100 deep"),
    ],
)
def test_json_of_no_one_meaning(text, reason):
    with pytest.raises(ValueError, match=reason):
        bounded.parse_json(text)
    assert bounded.parse_json('{"a": {"b": 1}, "c": {"b": 2}}') == {"a": {"b": 1}, "c": {"b": 2}}


def test_a_name_twice_is_refused_in_every_file_that_is_read(tmp_path, caplog):
    """Python keeps the last of two values: a score that somebody had mended by hand."""
    save(tmp_path, {"arc": task_summary()}, model="org/good")
    where = save(tmp_path, {"arc": task_summary()}, model="org/wrong")
    file = where / f"results_{DATE}.json"
    score = '"acc,none": 0.5'
    file.write_text(file.read_text().replace(score, f'{score}, "acc,none": 0.9'))
    (problem,) = find_runs(tmp_path).passed_over
    assert "it has 'acc,none' twice in one object" in problem and str(file) in problem
    assert load_runs(tmp_path)["model"].tolist() == ["org/good"]
    (where / "facts.json").write_text('{"family": "a", "family": "b"}')
    assert facts_beside(file) == {} and "it has 'family' twice" in caplog.text
    (where / "state.json").write_text('{"state": "done", "state": "failed"}')
    assert state.read(where) == {}
    lines = write_samples(where, "arc", [sample("a")])
    lines.write_text(lines.read_text() + json.dumps(sample("b"))[:-1] + ', "acc": 1.0}\n')
    assert [line["doc_hash"] for line in read_json_lines(lines)] == ["a"]
