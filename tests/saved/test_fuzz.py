"""Damaged files of a run give no traceback, no hang, and no other number without a word.

Each damage is chosen by a seed that the failure names.
"""

import json
import random
import shutil

import numpy as np
import pytest
from saved_runs import DATE, record, sample, save, task_summary, write_samples

from lm_eval_coupling import load_records, load_runs
from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.fit.scores import scored_rows
from lm_eval_coupling.saved.csv_file import read_csv
from lm_eval_coupling.saved.facts import add_facts
from lm_eval_coupling.saved.names import label_rows
from lm_eval_coupling.saved.samples import answers_of_run
from lm_eval_coupling.saved.saved_run import find_runs
from lm_eval_coupling.saved.saved_table import passing_over
from lm_eval_coupling.saved.values import prompt_values

FLIPS, MUTATIONS = 600, 60
ODD = [None, 3, -1, 1e400, True, "", "x", "10", [], {}, [[]], [None], {"": {}}, "\ud800", 10**30]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two tasks in a group, with tables, twins and samples; and what is read of it."""
    folder = tmp_path_factory.mktemp("run")
    tasks = {"arc": task_summary(n=3), "gsm": task_summary(n=3)}
    rows = [record(task, number, layers=3, ranks=(2,)) for task in tasks for number in range(3)]
    rows += [row | {"weights": "untrained"} for row in rows]
    where = save(folder, tasks, rows=rows, groups={"all": ["arc", "gsm"]})
    for task in tasks:
        write_samples(where, task, [sample(f"d{number}") for number in range(3)])
    file = where / f"results_{DATE}.json"
    content = json.loads(file.read_text())
    content["configs"] = {"arc": {"doc_to_text": "x", "metadata": {"version": 1}}}
    content["versions"] = {"arc": 1.0}
    content["n-samples"] = {task: {"original": 100, "effective": 3} for task in tasks}
    file.write_text(json.dumps(content))
    return where


def read(folder):
    """Read everything there is, with the sentences on what is wrong."""
    runs = find_runs(folder)
    problems, values = list(runs.passed_over), []
    for saved in runs.runs:
        for table in saved.tables:
            with passing_over(problems):
                values.append(prompt_values(table, "all").to_json())
            if saved.file:
                values.append(json.dumps(answers_of_run(saved, table.task, "acc,none", problems)))
    if any(saved.file for saved in runs.runs):
        rows = load_runs(folder)
        label_rows(rows)
        values.append(rows.drop(columns=["file"]).to_json(default_handler=str))
        with_coupling = rows["measured"] > 0
        if with_coupling.any() and rows["metric"].notna().any():
            scored_rows(rows[rows["metric"].notna()], [], mixed="keep")
    return values, problems


def attempt(folder):
    try:
        return read(folder)
    except CouplingError as error:
        assert "\n" not in str(error)
        return [], [str(error)]


def copied(run, folder):
    shutil.rmtree(folder, ignore_errors=True)
    return shutil.copytree(run, folder)


def test_a_flipped_bit_of_a_table_is_refused_or_changes_nothing(run, tmp_path):
    """39 of 200 flipped bits changed a value without a word."""
    (file,) = run.glob("coupling_arc*.parquet")
    target = tmp_path / file.name
    intact = file.read_bytes()
    target.write_bytes(intact)
    expected = load_records(target)
    generator = random.Random(0)
    # Half of them in the footer, which is small beside the pages of a real table.
    places = [generator.randrange(8 * len(intact)) for _ in range(FLIPS // 2)]
    places += [8 * len(intact) - 1 - generator.randrange(8 * 20_000) for _ in range(FLIPS // 2)]
    refused = 0
    for bit in places:
        damaged = bytearray(intact)
        damaged[bit // 8] ^= 1 << bit % 8
        target.write_bytes(damaged)
        try:
            records = load_records(target)
        except CouplingError:
            refused += 1
            continue
        for name in expected:
            for old, new in zip(expected[name], records[name], strict=True):
                assert np.array_equal(old, new, equal_nan=isinstance(old, float)), (bit, name)
    assert refused > FLIPS / 2


def test_flipped_bits_of_results_and_samples(run, tmp_path):
    """Coupling in results is held to the tables; lm-eval's own numbers have no checksum."""
    generator = random.Random(1)
    expected = load_runs(run).set_index("task")["coupling@10"]
    for number in range(MUTATIONS // 2):
        folder = copied(run, tmp_path / "copy")
        file = generator.choice([*folder.glob("*.json*")])
        damaged = bytearray(file.read_bytes())
        bit = generator.randrange(8 * len(damaged))
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        values, problems = attempt(folder)
        if not problems:
            coupling = load_runs(folder).set_index("task")["coupling@10"]
            for task in {"arc", "gsm"} & {*coupling.index}:
                assert coupling[task] == expected[task], (number, file.name, bit)


def mutate(value, generator):
    """Replace one part of nested data, or drop it."""
    if isinstance(value, dict) and value and generator.random() < 0.9:
        name = generator.choice(sorted(value))
        if generator.random() < 0.1:
            return {key: part for key, part in value.items() if key != name}
        return value | {name: mutate(value[name], generator)}
    if isinstance(value, list) and value and generator.random() < 0.9:
        place = generator.randrange(len(value))
        return [*value[:place], mutate(value[place], generator), *value[place + 1 :]]
    return generator.choice(ODD)


@pytest.mark.parametrize("pattern", ["results*.json", "samples_arc*.jsonl"])
def test_json_of_other_shapes(run, tmp_path, pattern):
    for seed in range(MUTATIONS):
        generator = random.Random(seed)
        folder = copied(run, tmp_path / "copy")
        (file,) = folder.glob(pattern)
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for _ in range(generator.choice([1, 1, 1, 5])):
            place = generator.randrange(len(lines))
            lines[place] = mutate(lines[place], generator)
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        try:
            attempt(folder)
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error


@pytest.mark.parametrize("how", ["cut", "junk", "zeros", "empty"])
def test_files_that_were_cut_or_overwritten(run, tmp_path, how):
    generator = random.Random(how)
    expected, _ = read(run)
    for file in sorted(run.iterdir()):
        for _ in range(2):
            folder = copied(run, tmp_path / "copy")
            content = (folder / file.name).read_bytes()
            at = generator.randrange(len(content))
            damaged = {
                "cut": content[:at],
                "junk": content[:at] + generator.randbytes(50) + content[at + 50 :],
                "zeros": content[:at] + bytes(100) + content[at + 100 :],
                "empty": b"",
            }[how]
            (folder / file.name).write_bytes(damaged)
            values, problems = attempt(folder)
            if file.suffix == ".parquet":
                assert problems or values == expected, (file.name, at)


def test_csv_files_of_facts(run, tmp_path):
    rows, file = load_runs(run), tmp_path / "facts.csv"
    text = "model,revision,tuned,training_tokens,loss\norg/tiny,main,yes,3e11,2.5\n\n,,,,\n"
    assert len(read_csv(_write(file, text), ["model"], "facts").rows) == 1
    for seed in range(MUTATIONS):
        generator = random.Random(seed)
        characters = list(text)
        for _ in range(generator.choice([1, 1, 3, 10])):
            place = generator.randrange(len(characters))
            characters[place] = generator.choice(
                ["", ",", '"', "\n", "\0", "é", "=", "-", "1", " "]
            )
        try:
            add_facts(rows, _write(file, "".join(characters)))
        except CouplingError as error:
            assert str(file) in str(error), f"seed {seed}"


def _write(file, text):
    file.write_text(text, encoding="utf-8")
    return file
