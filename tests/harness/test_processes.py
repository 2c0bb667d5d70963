"""Several processes, and processes that are killed."""

import os
import signal
import subprocess
import time

import numpy as np
import pytest
from evaluations import environment, evaluation, numbers, run, stored, written

from lm_eval_coupling import load_records

MEASURES = 2  # by default, each stored on its own
TOLD = "import logging; logging.basicConfig(level=logging.INFO)\n"


def two_processes(port):
    return ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port))


@pytest.mark.slow
def test_two_processes_measure_what_one_does(home, tmp_path):
    launcher = two_processes(29591)
    run(evaluation(home, "choice", tmp_path / "one", tmp_path / "one.sqlite"))
    told = evaluation(home, "choice", tmp_path / "two", tmp_path / "two.sqlite", launcher=launcher, before=TOLD)
    assert "on this process 4 prompts" in run(told)
    one, two = (load_records(tmp_path / name).set_index("doc_hash").sort_index() for name in ("one", "two"))
    assert list(one.index) == list(two.index) and len(two) == 8
    assert len(stored(tmp_path / "two.sqlite")) == 8 * MEASURES
    for name in ("normalized_miscoupling", "singular_values"):
        for a, b in zip(one[name], two[name], strict=True):
            assert np.allclose(numbers(a), numbers(b), rtol=1e-4, atol=1e-5)
    first, second = written(tmp_path / "one")["results"], written(tmp_path / "two")["results"]
    assert first["tiny_choice"]["acc,none"] == second["tiny_choice"]["acc,none"]
    assert first["tiny_choice"]["coupling,none"] == pytest.approx(second["tiny_choice"]["coupling,none"], abs=1e-5)


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
    broken = BROKEN.format(module="lm_eval_coupling.harness.documents", owner="Requested", name="documents")
    words = evaluation(home, "choice", tmp_path / "out", tmp_path / "s", launcher=two_processes(29592), before=broken)
    said = run(words)
    assert "process 1: RuntimeError: this process is broken; run again" in " ".join(said.split())
    assert 0 <= written(tmp_path / "out")["results"]["tiny_choice"]["acc,none"] <= 1


@pytest.mark.slow
def test_what_the_other_processes_measured_is_kept(home, tmp_path):
    broken = BROKEN.format(module="lm_eval_coupling.measuring.session", owner="Session", name="measure")
    words = evaluation(home, "choice", tmp_path / "out", tmp_path / "s", launcher=two_processes(29593), before=broken)
    said = " ".join(run(words).split())
    assert "process 1 failed, its documents are not measured: RuntimeError: this process is broken" in said
    assert len(load_records(tmp_path / "out")) == written(tmp_path / "out")["config"]["coupling"]["measured"] == 4


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_stopped(home, tmp_path):
    store = tmp_path / "s.sqlite"
    words = evaluation(home, "winogrande", tmp_path / "out", store, dtype="float64")
    process = subprocess.Popen(
        words, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while len(stored(store)) < 2 * MEASURES and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = stored(store)
    assert 2 * MEASURES <= len(before) < 16 * MEASURES
    run(words)
    after = stored(store)
    assert len(after) == 16 * MEASURES  # eight documents, two contexts each
    assert all(after[key] == when for key, when in before.items())
    assert written(tmp_path / "out")["config"]["coupling"]["reused"] >= len(before) // MEASURES
