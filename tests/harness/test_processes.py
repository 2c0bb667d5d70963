"""Several processes, and processes that are killed."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from evaluations import HOOK, environment, evaluation, numbers, run, stored, written

from lm_eval_coupling import load_records

MEASURES = 2  # by default, each stored on its own
TOLD = "import logging; logging.basicConfig(level=logging.INFO)\n"


def two_processes(port):
    return ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port))


@pytest.mark.slow
def test_two_processes_measure_what_one_does(home, tmp_path):
    launcher = two_processes(29591)
    run(evaluation(home, "choice", tmp_path / "one", tmp_path / "one.sqlite"))
    told = evaluation(
        home, "choice", tmp_path / "two", tmp_path / "two.sqlite", launcher=launcher, before=TOLD
    )
    assert "on this process 4 prompts" in run(told)
    one, two = (
        load_records(tmp_path / name).set_index("doc_hash").sort_index() for name in ("one", "two")
    )
    assert list(one.index) == list(two.index) and len(two) == 8
    assert len(stored(tmp_path / "two.sqlite")) == 8 * MEASURES
    for name in ("normalized_miscoupling", "singular_values"):
        for a, b in zip(one[name], two[name], strict=True):
            assert np.allclose(numbers(a), numbers(b), rtol=1e-4, atol=1e-5)
    first, second = written(tmp_path / "one")["results"], written(tmp_path / "two")["results"]
    assert first["tiny_choice"]["acc,none"] == second["tiny_choice"]["acc,none"]
    assert first["tiny_choice"]["coupling,none"] == pytest.approx(
        second["tiny_choice"]["coupling,none"], abs=1e-5
    )


BROKEN = """
import os
if os.environ["RANK"] == "1":
    from {module} import {owner}
    def broken(*_):
        raise RuntimeError("this process is broken")
    {owner}.{name} = broken
"""


@pytest.mark.slow
def test_an_error_in_one_process_ends_the_run_in_all(home, tmp_path):
    """Those that waited for it waited for a year, and nothing was written."""
    broken = BROKEN.format(
        module="lm_eval_coupling.harness.documents", owner="Requested", name="documents"
    )
    words = evaluation(
        home,
        "choice",
        tmp_path / "out",
        tmp_path / "s",
        launcher=two_processes(29592),
        before=broken,
    )
    said = run(words)
    assert "process 1: RuntimeError: this process is broken; run again" in " ".join(said.split())
    assert 0 <= written(tmp_path / "out")["results"]["tiny_choice"]["acc,none"] <= 1


@pytest.mark.slow
def test_what_the_other_processes_measured_is_kept(home, tmp_path):
    broken = BROKEN.format(module="lm_eval_coupling.runs.session", owner="Session", name="measure")
    words = evaluation(
        home,
        "choice",
        tmp_path / "out",
        tmp_path / "s",
        launcher=two_processes(29593),
        before=broken,
    )
    said = " ".join(run(words).split())
    assert (
        "process 1 failed, its documents are not measured: RuntimeError: this process is broken"
        in said
    )
    assert (
        len(load_records(tmp_path / "out"))
        == written(tmp_path / "out")["config"]["coupling"]["measured"]
        == 4
    )


@pytest.mark.slow
def test_killed_runs_lose_nothing_and_measure_nothing_twice(tmp_path):
    """Killed at random moments while they measure; the last one's tables are those of a run left
    alone.
    """
    code = "import kills, pathlib, sys, json; print(json.dumps(kills.compare(pathlib.Path(sys.argv[1]), 3, 500)))"  # noqa: E501
    path = os.pathsep.join([str(HOOK.parent), str(HOOK.parent / "tests" / "support")])
    words = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(
        words, env=environment() | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (
        found["kills"] == 3
        and found["kills_that_found_progress"] == 3
        and found["found_by_the_last_run"] >= 8
    )
