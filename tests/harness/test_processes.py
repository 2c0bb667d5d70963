"""Several processes, and processes that are killed."""

import os
import signal
import subprocess
import time

import numpy as np
import pytest
from evaluations import environment, evaluation, numbers, run, stored, written

from lm_eval_coupling import load_records


@pytest.mark.slow
def test_two_processes_measure_what_one_does(home, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29591")
    run(evaluation(home, "choice", tmp_path / "one", tmp_path / "one.sqlite"))
    run(evaluation(home, "choice", tmp_path / "two", tmp_path / "two.sqlite", launcher=launcher))
    one, two = (load_records(tmp_path / name).set_index("doc_hash").sort_index() for name in ("one", "two"))
    assert list(one.index) == list(two.index) and len(two) == 8
    assert len(stored(tmp_path / "two.sqlite")) == 8
    for name in ("normalized_miscoupling", "singular_values"):
        for a, b in zip(one[name], two[name], strict=True):
            assert np.allclose(numbers(a), numbers(b), rtol=1e-4, atol=1e-5)
    first, second = written(tmp_path / "one")["results"], written(tmp_path / "two")["results"]
    assert first["tiny_choice"]["acc,none"] == second["tiny_choice"]["acc,none"]
    assert first["tiny_choice"]["coupling,none"] == pytest.approx(second["tiny_choice"]["coupling,none"], abs=1e-5)


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_stopped(home, tmp_path):
    store = tmp_path / "s.sqlite"
    words = evaluation(home, "winogrande", tmp_path / "out", store, dtype="float64")
    process = subprocess.Popen(
        words, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while len(stored(store)) < 2 and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = stored(store)
    assert 2 <= len(before) < 16
    run(words)
    after = stored(store)
    assert len(after) == 16  # eight documents, two contexts each
    assert all(after[key] == when for key, when in before.items())
    assert written(tmp_path / "out")["config"]["coupling"]["reused"] >= len(before)
