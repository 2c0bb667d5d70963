"""Several processes, and processes that are killed."""

import json
import os
from pathlib import Path

import kills
import numpy as np
import pytest
from evaluations import (
    EVALUATE,
    command,
    environment,
    numbers,
    run,
    run_python,
    stored,
    written,
)

from lm_eval_coupling import load_records

MEASURES = 2  # by default, each stored on its own


# Each process evaluates three times; in the second, then in the third, process 1 fails somewhere.
EVALUATIONS = f"""
import logging, os, sys
from unittest import mock
logging.basicConfig(level=logging.INFO)
from lm_eval_coupling.harness import plugin
plugin.install()
import lm_eval_coupling.harness.documents, lm_eval_coupling.runs.session
*words, out = sys.argv
FAILING = {{"measure": "runs.session.Session.measure"}}
FAILING["documents"] = "harness.documents.Requested.documents"
for name in ("plain", *FAILING):
    sys.argv = [*words, f"{{out}}/{{name}}", f"{{out}}/{{name}}.sqlite"]
    broken = mock.Mock(side_effect=RuntimeError("this process is broken"))
    if name in FAILING and os.environ["RANK"] == "1":
        with mock.patch("lm_eval_coupling." + FAILING[name], broken):
            exec({EVALUATE!r}, {{}})
    else:
        exec({EVALUATE!r}, {{}})
from lm_eval_coupling.harness.ranks import Ranks
for _ in range(40):  # torch before 2.8 waits for itself where Gloo holds the last tensor
    with Ranks(int(os.environ["RANK"]), 2) as ranks:
        assert ranks.everywhere(lambda: "part") == ["part"] * 2
"""


@pytest.fixture(scope="module")
def two(home, tmp_path_factory):
    """Folder and words of the evaluations by two processes."""
    folder, script = tmp_path_factory.mktemp("two"), home / "evaluations.py"
    script.write_text(EVALUATIONS)
    launch = "-m torch.distributed.run --standalone --nproc_per_node 2".split()
    words = run([*launch, script, home, "choice", "float32", folder])
    return folder, " ".join(words.split())


@pytest.mark.slow
def test_two_processes_measure_what_one_does(evaluate, two, tmp_path):
    folder, words = two
    arguments = {"coupling_limit": "all", "coupling_out": str(tmp_path / "one")}
    first = evaluate(kinds=("choice",), arguments=arguments)["results"]
    assert "on this process 4 prompts" in words
    one, both = (
        load_records(out).set_index("doc_hash").sort_index()
        for out in (tmp_path / "one", folder / "plain")
    )
    assert list(one.index) == list(both.index) and len(both) == 8
    assert len(stored(folder / "plain.sqlite")) == 8 * MEASURES
    for name in ("normalized_miscoupling", "singular_values"):
        for a, b in zip(one[name], both[name], strict=True):
            assert np.allclose(numbers(a), numbers(b), rtol=1e-4, atol=1e-5)
    found = written(folder / "plain")
    assert found["config"]["coupling"]["measured"] == 8
    second = found["results"]
    assert first["tiny_choice"]["acc,none"] == second["tiny_choice"]["acc,none"]
    assert first["tiny_choice"]["coupling,none"] == pytest.approx(
        second["tiny_choice"]["coupling,none"], abs=1e-5
    )


@pytest.mark.slow
def test_an_error_in_one_process_ends_the_run_in_all(two):
    """Those that waited for it waited for a year, and nothing was written."""
    folder, words = two
    assert "process 1: RuntimeError: this process is broken; run again" in words
    assert 0 <= written(folder / "documents")["results"]["tiny_choice"]["acc,none"] <= 1


@pytest.mark.slow
def test_what_the_other_processes_measured_is_kept(two):
    folder, words = two
    assert (
        "process 1 failed, its documents are not measured: RuntimeError: this process is broken"
        in words
    )
    info = written(folder / "measure")["config"]["coupling"]
    assert len(load_records(folder / "measure")) == info["measured"] == 4


LAUNCHERS = {
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
    "torchrun": ["torch.distributed.run", "--nproc_per_node", "2"],
}


@pytest.fixture(scope="module")
def alone(home, tmp_path_factory):
    """The output of the command in one process."""
    folder = tmp_path_factory.mktemp("alone")
    run(command(home, folder / "out", folder / "store.sqlite"))
    return folder / "out"


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHERS)
def test_both_launchers_run_the_command_as_documented(home, alone, tmp_path, name):
    """One set of results and tables, of the documents and values of one process."""
    launcher = ["-m", *LAUNCHERS[name]]
    port = {"accelerate": ["--main_process_port", 29592], "torchrun": ["--master_port", 29593]}
    double = command(home, tmp_path / "two", tmp_path / "two.sqlite")
    said = run([*launcher, *port[name], *double])
    assert said.count("Coupling at K = 2") == 1 and "on this process 4 prompts" in said
    one, two = written(alone), written(tmp_path / "two")
    assert len(list((tmp_path / "two").rglob("coupling_*.parquet"))) == 1
    assert one["results"]["tiny_choice"]["acc,none"] == two["results"]["tiny_choice"]["acc,none"]
    records = [
        load_records(out).set_index("doc_hash").sort_index() for out in (alone, tmp_path / "two")
    ]
    assert list(records[0].index) == list(records[1].index) and len(records[1]) == 8
    for a, b in zip(*(frame.normalized_miscoupling for frame in records), strict=True):
        assert np.allclose(numbers(a), numbers(b), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_killed_runs_lose_nothing_and_measure_nothing_twice(tmp_path):
    """Killed at random moments while they measure; the last one's tables are those of a run left
    alone.
    """
    words = [kills.__file__, "--kills", "3", "--documents", "60"]
    path = os.pathsep.join([environment()["PYTHONPATH"], str(Path(kills.__file__).parent)])
    done = run_python(words, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (
        found["kills"] == 3
        and found["kills_that_found_progress"] == 3
        and found["found_by_the_last_run"] >= 8
    )
