"""Sweeps by lm-eval itself: on this machine, killed and resumed, and on a SLURM of one node."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import real
import yaml
from stand_in import wait_for

from lm_eval_coupling import load_records
from lm_eval_coupling.sweep import cluster, state
from lm_eval_coupling.sweep import plan as plans
from lm_eval_coupling.sweep.cluster import Job
from lm_eval_coupling.sweep.command import survey

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix", reason="processes of POSIX systems"),
]
START = Path(__file__).parents[3] / "shared" / "slurm" / "start.sh"
NAMES = ("tiny-2", "tiny-long")
LOCAL = {"on": "local", "workers": 2}
ON_SLURM = {"on": "slurm", "hours": 0.2, "cpus": 1, "setup": ["export FROM_SETUP=yes"]}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    real.models_and_tasks(folder)
    return folder


@pytest.fixture(scope="module")
def locally(home):
    """The folder of a sweep in one go, which every other way must equal."""
    plan = real.write_plan(home, home / "local", NAMES, LOCAL)
    assert real.finish(real.start(plan)) == 0
    return plan.output


def test_killed_while_it_measures_and_gone_on_with(home, locally):
    """kill -9 of the sweep and of lm-eval: measurements are reused, the tables stay the same."""
    plan = real.write_plan(home, home / "killed", NAMES, LOCAL)
    head, long = real.start(plan), plan.units[1]
    wait_for(lambda: real.measured(plan, long) > 0, seconds=200)
    head.kill()
    os.killpg(state.read(plan.folder(long))["child"], signal.SIGKILL)
    assert real.finish(head) == -signal.SIGKILL
    wait_for(lambda: survey(plan)[0].state != "running", seconds=200)
    kept = real.measured(plan, long)

    assert real.finish(real.start(plan)) == 0
    (results,) = plan.folder(long).glob("*/results_*.json")
    assert state.read_json(results)["config"]["coupling"]["reused"] >= kept > 0
    runs, expected = real.table(plan.output), real.table(locally)
    pd.testing.assert_frame_equal(runs, expected, rtol=1e-4, atol=1e-6)
    assert set(runs["released"]) == {2024.5} and set(runs["family"]) == {"tiny"}
    assert len(load_records(plan.output)) == len(load_records(locally)) == 48


@pytest.fixture(scope="module")
def controller():
    """A SLURM that answers: the machine's own, or one of one node, installed and started here."""
    pytest.importorskip("submitit", reason="jobs go through submitit, of the extra `slurm`")
    if not _answers():
        if not START.exists():
            pytest.skip(f"no SLURM here and no script to start one ({START.name})")
        if os.geteuid() != 0:
            pytest.skip("there is no SLURM here, and only root can install one")
        started = subprocess.run(
            ["bash", str(START)], capture_output=True, text=True, timeout=600, check=False
        )
        if started.returncode or not _answers():
            pytest.skip(f"SLURM does not start here: {(started.stderr or started.stdout)[-200:]}")


def _answers():
    if shutil.which("sinfo") is None:
        return False
    return (
        "idle"
        in subprocess.run(["sinfo", "-h"], capture_output=True, text=True, check=False).stdout
    )


def _at_work(plan, unit):
    """Wait until a unit's job has stored a measurement, and return the job."""
    wait_for(lambda: real.measured(plan, unit) > 0, seconds=200)
    return state.read(plan.folder(unit))["job"]


def test_an_array_of_which_one_is_cancelled_started_again_equals_a_local_sweep(
    controller, home, locally
):
    plan = real.write_plan(home, home / "cluster", NAMES, ON_SLURM)
    head = real.start(plan)
    long = plan.units[-1]
    subprocess.run(["scancel", _at_work(plan, long)], check=True)
    assert real.finish(head) == 1
    found = survey(plan)
    assert [status.state for status in found] == ["done", "stopped"]
    assert "CANCELLED" in found[-1].detail
    kept = real.measured(plan, long)

    assert real.finish(real.start(plan)) == 0
    assert _reused(plan, long) == kept > 0
    pd.testing.assert_frame_equal(
        real.table(plan.output), real.table(locally), rtol=1e-4, atol=1e-6
    )


def test_a_job_measures_what_was_scored_elsewhere(controller, home, locally):
    """`samples:` instead of `tasks:`; values are those of the sweep that scored and measured."""
    content = {
        "models": [str(home / "tiny-2")],
        "samples": str(locally),
        "coupling": {"ranks": "2+4", "limit": "all", "measures": "depth"},
        "lm_eval": {"device": "cpu"},
        "output": str(home / "from-samples"),
        "run": ON_SLURM | {"environment": {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}},
    }
    file = home / "from-samples.yaml"
    file.write_text(yaml.safe_dump(content))
    plan = plans.read(file)
    assert real.finish(real.start(plan, command=())) == 0
    swept, expected = load_records(plan.output), load_records(locally)
    expected = expected[expected["model"].str.endswith("tiny-2")].reset_index(drop=True)
    prompt = ["task", "doc_hash", "prompt_index"]
    swept, expected = (
        rows.sort_values(prompt, ignore_index=True)[[*prompt, "coupling", "normalized_miscoupling"]]
        for rows in (swept, expected)
    )
    pd.testing.assert_frame_equal(swept, expected, rtol=1e-5, atol=1e-7)
    assert len(swept) == 24


LEAVE = {
    "out-of-time": [
        "scancel",
        "--signal=USR2",
    ],  # some time before the end, or a preemption for whom the plan's options say so
    "preempted": ["scontrol", "requeue"],  # SLURM ends the job
    "preempted-with-grace": [
        "scancel",
        "--signal=TERM",
    ],  # SLURM asks first, and the job runs on for a time
}


@pytest.mark.parametrize("way", LEAVE)
def test_a_job_that_has_to_leave_is_queued_again_and_goes_on(controller, home, locally, way):
    """The job keeps its number, nothing is measured twice, and a new sweep takes over."""
    plan = real.write_plan(home, home / way, ["tiny-long"], ON_SLURM)
    (unit,) = plan.units
    head = real.start(plan)
    job = _at_work(plan, unit)
    head.kill()
    head.wait()
    # SLURM refuses for a moment while it changes the job itself.
    wait_for(lambda: subprocess.run([*LEAVE[way], job], check=False).returncode == 0, seconds=60)
    wait_for(lambda: (cluster.jobs() or {}).get(job, Job("")).state == "PENDING", seconds=60)
    kept = real.measured(plan, unit)
    # SLURM waits for two minutes, because a node refuses a job in the second in which it was ended
    # there, and the job fails. Three seconds are enough for that.
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now+3"], check=True)
    assert real.finish(real.start(plan)) == 0
    assert state.read(plan.folder(unit))["job"] == job
    assert (
        _reused(plan, unit) == kept > 0
    )  # all that the first life had stored, and so nothing was measured twice
    log = (plan.folder(unit) / "log.txt").read_text()
    assert log.count("quick_lm_eval.py --config") == 2
    expected = real.table(locally)
    expected = expected[expected["model"].str.endswith("tiny-long")].reset_index(drop=True)
    pd.testing.assert_frame_equal(
        real.table(home / way), expected, rtol=1e-4, atol=1e-6, check_dtype=False
    )


def _reused(plan, unit):
    """How many measurements of the tables were found in the store."""
    return sum(
        pd.read_parquet(table)["reused"].sum()
        for table in plan.folder(unit).glob("*/coupling_*.parquet")
    )
