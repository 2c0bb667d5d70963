"""Options for SLURM and answers from it, without one; test_sweep_real.py has the real thing."""

import threading

import pytest

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.sweep import cluster, slurm, state
from lm_eval_coupling.sweep.board import Board
from lm_eval_coupling.sweep.cluster import Job
from lm_eval_coupling.sweep.command import survey
from lm_eval_coupling.sweep.lock import lock
from lm_eval_coupling.sweep.plan import Slurm

ANSWERS = {
    "squeue": "7_0 RUNNING None\n7_1 PENDING JobHeldUser, Priority\n9 COMPLETING\n",
    "scontrol": "JobId=7 JobState=OUT_OF_MEMORY Reason=x\n",
}


def test_options_of_a_job():
    run = Slurm(
        hours=0.51, partition="gpu", gpus=2, memory_gb=1.5, setup=("a", "b"), options={"nice": 5}
    )
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
    assert (
        slurm.parameters(Slurm(hours=0.01), 1)["signal_delay_s"] == 15
    )  # a job of a minute has little to give


def test_submitit_takes_these_options(tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit")
    monkeypatch.setattr(submitit.SlurmExecutor, "affinity", classmethod(lambda cls: 2))
    words = {"partition": "p", "account": "a", "qos": "q", "constraint": "c"}
    full = Slurm(hours=1.0, **words, gpus=1, cpus=2, memory_gb=3.0, options={"nice": 5})
    submitit.SlurmExecutor(tmp_path).update_parameters(**slurm.parameters(full, 2))


def test_the_queue_and_how_a_job_ended(monkeypatch):
    monkeypatch.setattr(cluster, "_ask", lambda *command: ANSWERS[command[0]])
    assert cluster.jobs() == {
        "7_0": Job("RUNNING"),
        "7_1": Job("PENDING", "JobHeldUser, Priority"),
        "9": Job("COMPLETING"),
    }
    assert cluster.state("7") == "OUT_OF_MEMORY"
    monkeypatch.setattr(cluster, "_ask", lambda *command: None)
    assert cluster.jobs() is None and cluster.state("7") is None


def test_without_sbatch_it_is_said(monkeypatch):
    monkeypatch.setattr(cluster.shutil, "which", lambda name: None)
    with pytest.raises(CouplingError, match="no sbatch"):
        cluster.require()


class Cluster:
    """Stands in for SLURM: what the queue holds look by look (then nothing), and how jobs end.

    A job leaves its worker's state: it ``begins`` (and says no more), or ``fails`` with a reason.
    """

    def __init__(self, monkeypatch, looks=(), ends=("FAILED",), leaves="begins"):
        self.looks, self.ends, self.leaves, self.sizes = list(looks), list(ends), leaves, []
        monkeypatch.setattr(slurm, "_submit", self.submit)
        monkeypatch.setattr(cluster, "largest_array", lambda: 1000)
        monkeypatch.setattr(cluster, "jobs", lambda: self.looks.pop(0) if self.looks else {})
        monkeypatch.setattr(
            cluster, "state", lambda job: self.ends.pop(0) if len(self.ends) > 1 else self.ends[0]
        )
        monkeypatch.setattr(slurm, "_POLL_SECONDS", 0)

    def submit(self, plan, works, board):
        for work in works:
            self.sizes.append(work.batch_size)
            left = {"begins": "running", "fails": "failed"}.get(self.leaves, "waiting")
            state.write(
                plan.folder(work.unit),
                state=left,
                job=f"1_{len(self.sizes)}",
                reason="its own word",
            )

    def run(self, plan):
        slurm.run(plan, plan.units, Board(plan, survey(plan)))
        return state.read(plan.folder(plan.units[0]))["reason"]


@pytest.fixture
def on_slurm(folder_of, make_plan):
    return make_plan([folder_of("a")], run={"on": "slurm", "hours": 1, "requeues": 2})


def test_a_job_killed_for_its_memory_is_submitted_once_more_with_half_the_batch(
    on_slurm, monkeypatch
):
    """The system kills the whole job, so that it cannot try again itself."""
    there = Cluster(monkeypatch, ends=["OUT_OF_MEMORY"])
    assert there.run(on_slurm) == "job 1_2 ended as OUT_OF_MEMORY" and there.sizes == [None, 2]


@pytest.mark.parametrize(
    ("end", "leaves", "submitted"),
    [
        ("NODE_FAIL", "begins", 3),  # as often as the plan lets it be queued again
        ("PREEMPTED", "begins", 3),  # where a cluster cancels what it preempts
        (
            "FAILED",
            "",
            2,
        ),  # the node could not start it: once more, for it may be the node's fault or the plan's
        ("FAILED", "fails", 1),
        ("CANCELLED", "begins", 1),
        ("TIMEOUT", "begins", 3),
    ],
)
def test_a_job_that_was_lost_through_no_fault_of_its_own_is_submitted_again(
    on_slurm, monkeypatch, end, leaves, submitted
):
    there = Cluster(monkeypatch, ends=[end], leaves=leaves)
    reason = there.run(on_slurm)
    assert len(there.sizes) == submitted
    assert reason == ("its own word" if leaves == "fails" else f"job 1_{submitted} ended as {end}")


def test_a_controller_that_does_not_answer_says_nothing_of_the_jobs(on_slurm, monkeypatch):
    """Its silence was once taken for an empty queue, and all its jobs submitted a second time."""
    state.write(on_slurm.folder(on_slurm.units[0]), state="waiting", job="5")
    there = Cluster(
        monkeypatch, [None, None, {"5": Job("PENDING")}, None, {"5": Job("PENDING")}], ["CANCELLED"]
    )
    said = []
    monkeypatch.setattr(slurm.Board, "say", lambda board, text: said.append(text))
    there.run(on_slurm)
    silences = [text for text in said if "does not answer" in text]
    assert not there.sizes and len(silences) == 2  # once for each silence


def test_a_job_that_the_queue_does_not_show_between_two_of_its_states_is_not_over(
    on_slurm, monkeypatch
):
    there = Cluster(
        monkeypatch, [{}, {}, {}, {}, {}], ["REQUEUED", "PENDING", "RUNNING", "CANCELLED"]
    )
    there.run(on_slurm)
    assert there.ends == ["CANCELLED"] and len(there.sizes) == 1


def test_a_unit_that_another_process_has_is_waited_for_and_then_gone_on_with(on_slurm, monkeypatch):
    there, folder = Cluster(monkeypatch, ends=["CANCELLED"]), on_slurm.folder(on_slurm.units[0])
    state.write(folder, state="stopped", reason="by Ctrl-C")
    with lock(folder / state.LOCK):
        head = threading.Thread(target=there.run, args=(on_slurm,), daemon=True)
        head.start()
        head.join(0.5)
        assert head.is_alive() and not there.sizes
    head.join(20)
    assert not head.is_alive() and len(there.sizes) == 1


def test_jobs_that_are_in_the_queue_are_not_submitted_again(folder_of, make_plan, monkeypatch):
    plan = make_plan([folder_of("a"), folder_of("b")], run={"on": "slurm", "hours": 1})
    state.write(plan.folder(plan.units[0]), state="waiting", job="5_0")
    submitted = []
    monkeypatch.setattr(
        slurm, "_submit", lambda plan, works, board: submitted.extend(work.unit for work in works)
    )
    monkeypatch.setattr(slurm, "_watch", lambda plan, units, board: [])
    monkeypatch.setattr(cluster, "jobs", lambda: {"5_0": Job("PENDING")})
    slurm.run(plan, plan.units, Board(plan, survey(plan)))
    assert submitted == [plan.units[1]]
