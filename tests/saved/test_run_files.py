"""A folder's runs are listed once each, whatever links, copies and other things lie among them."""

import json
import os
import shutil
import threading
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from saved_runs import DATE, record, save, task_summary

from lm_eval_coupling import load_records, load_runs
from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.saved import run_files
from lm_eval_coupling.saved.run_files import list_run_files
from lm_eval_coupling.saved.saved_run import find_runs


def run(folder, model="org/m", seed=0, **more):
    rows = [record("t", number, seed=seed) for number in range(3)]
    return save(folder, {"t": task_summary()}, model=model, rows=rows, run_id=model, **more)


def names(listing):
    return [file.name.split("_")[0] for file in listing.files]


def test_links_are_followed_and_what_they_lead_to_counts_once(tmp_path):
    """Folders behind links were left out, and two links to one were one run by chance."""
    where = run(tmp_path / "elsewhere")
    collection = tmp_path / "collection"
    collection.mkdir()
    (collection / "a").symlink_to(tmp_path / "elsewhere")
    (collection / "b").symlink_to(where)
    (collection / f"results_{DATE}.json").symlink_to(where / f"results_{DATE}.json")
    listing = list_run_files([collection, where])
    assert sorted(names(listing)) == ["coupling", "results"] and not listing.passed_over
    assert len(load_runs(collection)) == 1 and len(load_records(collection)) == 3


def test_circles_of_links_end(tmp_path):
    where = run(tmp_path)
    (where / "self").symlink_to(where)
    (where / "up").symlink_to(tmp_path)
    (where / "results_x.json").symlink_to(where / "results_y.json")
    (where / "results_y.json").symlink_to(where / "results_x.json")
    listing = list_run_files([tmp_path])
    assert sorted(names(listing)) == ["coupling", "results"] and len(listing.passed_over) == 2


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints", ".backup"])
def test_hidden_folders_are_named_and_not_read(tmp_path, hidden):
    where = run(tmp_path)
    shutil.copytree(where, tmp_path / hidden)
    (tmp_path / ".cache").mkdir()
    listing = list_run_files([tmp_path])
    assert len(listing.files) == 2
    assert listing.passed_over == (
        f"got {tmp_path / hidden}, a hidden folder with 2 result files and tables; give its path "
        "to read them",
    )
    assert len(list_run_files([tmp_path / hidden]).files) == 2


def test_copies_count_once_and_the_complete_one_is_kept(tmp_path, caplog):
    where = run(tmp_path / "a")
    (where / f"samples_t_{DATE}.jsonl").write_text("{}\n")
    for copy in ("0 backup", "b"):
        (tmp_path / copy).mkdir()
        shutil.copy(where / f"results_{DATE}.json", tmp_path / copy)
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    listing = list_run_files([tmp_path])
    assert {file.parent for file in listing.files} == {where} and len(listing.passed_over) == 3
    assert len(load_records(tmp_path)) == 3 and len(load_runs(tmp_path, newest=False)) == 1
    assert "each counts once" in caplog.text


@pytest.mark.parametrize("count", [1, 2])
def test_copies_are_counted_by_folder(tmp_path, count):
    names = [f"results_2026-01-0{day}T00-00-00.1" for day in range(1, count + 1)]
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
    for name in names:
        for file in (f"a/{name}", f"b/{name}", f"c/{name}", f"c/{name} (1)"):
            (tmp_path / f"{file}.json").write_text(json.dumps({"results": {"t": name}}))
    words = ["1 copy of a file in", "1 copy of another file there"]
    if count == 2:
        words = ["2 copies of files in", "2 copies of other files there"]
    a, b, c = (tmp_path / folder for folder in ("a", "b", "c"))
    copies = list_run_files([a, b]).passed_over
    assert copies == (f"got {b} with {words[0]} {a}; each counts once",)
    copies = list_run_files([c]).passed_over
    assert copies == (f"got {c} with {words[1]}; each counts once",)


def test_files_of_equal_size_that_differ_are_no_copies(tmp_path):
    for model in ("org/a", "org/b"):
        run(tmp_path, model)
    assert len(list_run_files([tmp_path]).files) == 4
    assert sorted(load_runs(tmp_path)["model"]) == ["org/a", "org/b"]


def test_a_damaged_copy_does_not_stand_for_the_whole_one(tmp_path):
    where = run(tmp_path / "b")
    shutil.copytree(where, tmp_path / "a")
    (table,) = (tmp_path / "a").glob("*.parquet")
    damaged = bytearray(table.read_bytes())
    damaged[100] ^= 1
    table.write_bytes(damaged)
    assert len(load_records(tmp_path)) == 3


def test_what_is_no_regular_file_is_named(tmp_path):
    """Opening a pipe waits for its writer for ever."""
    where = run(tmp_path)
    os.mkfifo(where / "results_pipe.json")
    os.mkfifo(where / "coupling_pipe.parquet")
    (where / "results.json").mkdir()
    (where / "coupling_gone.parquet").symlink_to(where / "nothing")
    problems = []
    reading = threading.Thread(target=lambda: problems.extend(find_runs(tmp_path).passed_over))
    reading.daemon = True
    reading.start()
    reading.join(30)
    assert not reading.is_alive()
    assert [problem.split(", ", 1)[1] for problem in problems] == [
        "a link to nothing",
        "which is no regular file",
        "which is no regular file",
    ]
    with pytest.raises(CouplingError, match="neither a folder nor a regular file"):
        list_run_files([where / "results_pipe.json"])


def test_folders_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    where = run(tmp_path)
    (tmp_path / "private").mkdir()
    scandir = os.scandir

    def scan(folder):
        if "private" in str(folder):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(run_files.os, "scandir", scan)
    listing = list_run_files([tmp_path])
    assert {file.parent for file in listing.files} == {where}
    assert listing.passed_over == (
        f"got {tmp_path / 'private'}, which cannot be read (it is not permitted)",
    )
    with pytest.raises(CouplingError, match="cannot be read .it is not permitted"):
        list_run_files([tmp_path / "private"])


@pytest.mark.parametrize("root", ["nowhere", "x" * 300, "a\0b"])
def test_a_root_that_cannot_be_is_refused_in_a_sentence(tmp_path, root):
    with pytest.raises(CouplingError, match="give folders that lm-eval wrote"):
        list_run_files([tmp_path / root])


def test_names_that_are_no_text(tmp_path):
    folder = os.fsencode(tmp_path) + b"/\xff\xfe"
    os.mkdir(folder)
    where = run(tmp_path)
    for file in where.iterdir():
        shutil.copy(file, os.fsdecode(folder))
    with open(folder + b"/results_\xff.json", "w") as file:
        file.write("{}")
    runs = find_runs(tmp_path)
    assert len(runs.runs) == 1 and len(runs.passed_over) == 2


def test_deep_folders(tmp_path):
    deep = tmp_path
    for _ in range(300):
        deep = deep / "abcdefgh"
    deep.mkdir(parents=True)
    run(deep)
    assert len(list_run_files([tmp_path]).files) == 2


def test_a_file_brings_what_belongs_to_it(tmp_path):
    where = run(tmp_path / "a [1]")
    run(tmp_path / "a [1]", date="2025-07-01T00-00-00.5")
    for suffix in ("json", "parquet"):
        (file,) = where.glob(f"*{DATE}.{suffix}")
        assert len(list_run_files([file]).files) == 2
    assert len(load_records(file)) == 3


def test_an_output_path_that_is_a_file(tmp_path):
    """`--output_path NAME.json` makes NAME_<date>.json."""
    where = run(tmp_path)
    (where / f"results_{DATE}.json").rename(where / f"mine_{DATE}.json")
    (where / "other.json").write_text(json.dumps({"results": {}}))
    assert len(load_runs(tmp_path)) == 1


def test_a_run_that_was_written_again_counts_once(tmp_path, caplog):
    where = run(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (file,) = (tmp_path / "b").rglob("*.json")
    file.write_text(json.dumps(json.loads(file.read_text()), indent=4))
    assert len(load_records(tmp_path)) == 3 == len(load_records(where))
    assert "a copy of" in caplog.text
    (table,) = (tmp_path / "b").rglob("*.parquet")
    pq.write_table(pq.read_table(table), table)
    assert len(load_records(tmp_path)) == 3
    run(tmp_path / "b", seed=1)
    assert len(load_records(tmp_path)) == 6


def test_a_folder_whose_name_is_no_text_is_read(tmp_path):
    """Tables in it, or in any folder with an umlaut under LANG=C, were said to be none."""
    folder = os.fsencode(tmp_path) + b"/\xff\xfe"
    os.mkdir(folder)
    run(Path(os.fsdecode(folder)))
    runs = find_runs(tmp_path)
    assert len(runs.runs) == 1 and not runs.passed_over
    assert len(load_records(tmp_path)) == 3
