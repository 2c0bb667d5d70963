"""What is told to SLURM and read from it, without one; the real thing is in test_sweep_slurm.py."""

import pytest

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.sweep import record, slurm
from lm_eval_coupling.sweep.board import Board
from lm_eval_coupling.sweep.command import survey
from lm_eval_coupling.sweep.plan import Slurm

ANSWERS = {"squeue": "7_0 RUNNING\n7_1 PENDING\n9 COMPLETING\n", "scontrol": "JobId=7 JobState=OUT_OF_MEMORY Reason=x\n"}


def test_options_of_a_job():
    run = Slurm(hours=0.51, partition="gpu", gpus=2, memory_gb=1.5, setup=("a", "b"), options={"nice": 5})
    asked = slurm.parameters(run, 7)
    assert asked == {
        "job_name": "coupling-sweep",
        "time": 31,
        "partition": "gpu",
        "gpus_per_node": 2,
        "mem": "1536MB",
        "array_parallelism": 7,
        "setup": ["a", "b"],
        "signal_delay_s": 90,
        "additional_parameters": {"nice": 5},
    }
    assert slurm.parameters(Slurm(hours=0.01, at_once=3), 7)["array_parallelism"] == 3
    assert slurm.parameters(Slurm(hours=0.01), 1)["signal_delay_s"] == 15  # a job of a minute has little to give


def test_submitit_takes_these_options(tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit")
    monkeypatch.setattr(submitit.SlurmExecutor, "affinity", classmethod(lambda cls: 2))
    words = {"partition": "p", "account": "a", "qos": "q", "constraint": "c"}
    full = Slurm(hours=1.0, **words, gpus=1, cpus=2, memory_gb=3.0, options={"nice": 5})
    submitit.SlurmExecutor(tmp_path).update_parameters(**slurm.parameters(full, 2))


def test_the_queue_and_how_a_job_ended(monkeypatch):
    monkeypatch.setattr(slurm, "_ask", lambda *command: ANSWERS[command[0]])
    assert slurm.jobs() == {"7_0": "RUNNING", "7_1": "PENDING", "9": "COMPLETING"}
    assert slurm.ended_as("7") == "OUT_OF_MEMORY"
    monkeypatch.setattr(slurm, "_ask", lambda *command: None)
    assert slurm.jobs() is None and slurm.ended_as("7") is None


def test_without_sbatch_it_is_said(monkeypatch):
    monkeypatch.setattr(slurm.shutil, "which", lambda name: None)
    with pytest.raises(CouplingError, match="no sbatch"):
        slurm.require()


def test_a_job_killed_for_its_memory_is_submitted_once_more_with_half_the_batch(folder_of, make_plan, monkeypatch):
    """The system kills the whole job, so that it cannot try again itself; the controller not answering says nothing."""
    plan = make_plan([folder_of("a")], run={"on": "slurm", "hours": 1})
    sizes, silent = [], [None, {}, None, {}]

    def submit(plan, works, board):
        for work in works:
            sizes.append(work.batch_size)
            record.write(plan.folder(work.unit), state="running", job=f"1_{len(sizes)}")

    monkeypatch.setattr(slurm, "_submit", submit)
    monkeypatch.setattr(slurm, "jobs", lambda: silent.pop(0) if silent else {})
    monkeypatch.setattr(slurm, "ended_as", lambda job: "OUT_OF_MEMORY")
    monkeypatch.setattr(slurm, "_POLL_SECONDS", 0)
    slurm.run(plan, plan.units, Board(plan, survey(plan)))
    assert sizes == [None, 2]
    assert record.read(plan.folder(plan.units[0]))["reason"] == "job 1_2 ended as OUT_OF_MEMORY"


def test_jobs_that_are_in_the_queue_are_not_submitted_again(folder_of, make_plan, monkeypatch):
    plan = make_plan([folder_of("a"), folder_of("b")], run={"on": "slurm", "hours": 1})
    record.write(plan.folder(plan.units[0]), state="waiting", job="5_0")
    submitted = []
    monkeypatch.setattr(slurm, "_submit", lambda plan, works, board: submitted.extend(work.unit for work in works))
    monkeypatch.setattr(slurm, "_watch", lambda plan, units, board: [])
    monkeypatch.setattr(slurm, "jobs", lambda: {"5_0": "PENDING"})
    slurm.run(plan, plan.units, Board(plan, survey(plan)))
    assert submitted == [plan.units[1]]
