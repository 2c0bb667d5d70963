"""Children and jobs start from a built environment, wherever the sweep itself was called."""

import os
import sys

import pytest
from stand_in import STAND_IN

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.sweep import cluster, slurm
from lm_eval_coupling.sweep.child_environment import environment, environment_of_jobs
from lm_eval_coupling.sweep.command import sweep
from lm_eval_coupling.sweep.work import Worker

JOB = {
    "SLURM_JOB_ID": "998",
    "SLURM_ARRAY_JOB_ID": "77",
    "SLURM_ARRAY_TASK_ID": "3",
    "SLURM_MEM_PER_CPU": "500",
    "SLURM_EXPORT_ENV": "NONE",
    "SBATCH_EXPORT": "NONE",
    "SBATCH_TIMELIMIT": "1",
    "SQUEUE_STATES": "FAILED",
    "SQUEUE_FORMAT": "%u",
    "SRUN_CPUS_PER_TASK": "2",
    "SUBMITIT_EXECUTOR": "slurm",
    "_SLURM_SPANK_OPTION_pyxis_container": "of the job",
    "FLUX_TASK_RANK": "2",
    "PALS_RANKID": "2",
    "PMI_SIZE": "4",
    "OMPI_COMM_WORLD_SIZE": "4",
    "RANK": "1",
    "WORLD_SIZE": "4",
    "MASTER_ADDR": "node1",
    "TORCHELASTIC_RUN_ID": "x",
    "ACCELERATE_USE_FSDP": "1",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
}
CLUSTER = {"SLURM_CONF": "/etc/other.conf", "SLURM_JWT": "token of the controller"}


@pytest.fixture
def inside_a_job(monkeypatch):
    for name, value in (JOB | CLUSTER).items():
        monkeypatch.setenv(name, value)


def test_a_child_knows_the_cluster_and_not_the_job_it_was_started_in(inside_a_job):
    built = environment({"A": "1"}, {"A": "2"})
    assert not set(JOB) & set(built) and CLUSTER.items() <= built.items()
    assert built["A"] == "2" and built["PATH"] == os.environ["PATH"]


def test_a_job_gets_the_environment_and_the_defaults_that_the_plan_leaves(
    inside_a_job, monkeypatch
):
    monkeypatch.setenv("SBATCH_ACCOUNT", "project")
    monkeypatch.setenv("SBATCH_PARTITION", "of-the-user")
    before = dict(os.environ)
    with environment_of_jobs({"partition": "of-the-plan", "account": None}, {"HF_TOKEN": "x"}):
        passed = dict(os.environ)
    assert dict(os.environ) == before
    expected = {"SBATCH_EXPORT": "ALL", "SBATCH_ACCOUNT": "project", "HF_TOKEN": "x"} | CLUSTER
    assert expected.items() <= passed.items() and "SBATCH_PARTITION" not in passed
    assert not (set(JOB) - {"SBATCH_EXPORT"}) & set(passed)


def test_what_the_plan_exports_is_not_overridden(monkeypatch):
    monkeypatch.setenv("SBATCH_EXPORT", "NONE")
    with environment_of_jobs({"export": "PATH,HOME"}):
        assert "SBATCH_EXPORT" not in os.environ


def test_the_environment_is_put_back_after_an_error(inside_a_job):
    before = dict(os.environ)
    with pytest.raises(ZeroDivisionError), environment_of_jobs({}, {"B": "2"}):
        raise ZeroDivisionError
    assert dict(os.environ) == before


def test_the_queue_is_asked_without_the_users_habits(inside_a_job, tmp_path, monkeypatch):
    """SQUEUE_STATES hid waiting jobs, which were then submitted a second time."""
    program = tmp_path / "squeue"
    program.write_text(
        f'#!{sys.executable}\nimport os\nprint("7", "PENDING", "None")\n'
        'assert not any(n.startswith("SQUEUE_") for n in os.environ)\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert cluster.jobs() == {"7": cluster.Job("PENDING")}


def test_a_run_on_this_machine_is_no_part_of_an_allocation(inside_a_job, folder_of, make_plan):
    """A run that inherits RANK and WORLD_SIZE waits for other processes that never come."""
    plan = make_plan([folder_of("a", say=["WORLD_SIZE", "SLURM_JOB_ID", "SLURM_CONF"])])
    assert Worker(plan, command=STAND_IN).run(plan.units[0]).state == "done"
    folder = plan.folder(plan.units[0])
    log = (folder / "log.txt").read_text()
    assert "WORLD_SIZE is None" in log and "SLURM_JOB_ID is None" in log
    assert "SLURM_CONF is /etc/other.conf" in log
    assert '"job": null' in (folder / "state.json").read_text()


@pytest.mark.parametrize(
    ("answer", "size"),
    [("MaxArraySize            = 3\n", 3), ("MaxArraySize = 0\n", 1), ("x", 1000), (None, 1000),
     ("MaxArraySize            = 4000001\n", 1000)],
)  # fmt: skip
def test_the_size_of_an_array_is_the_clusters(monkeypatch, answer, size):
    monkeypatch.setattr(cluster, "_ask", lambda *command: answer)
    assert cluster.largest_array() == size


def test_the_queue_of_the_cluster_that_gets_the_jobs_is_asked(monkeypatch):
    """The jobs of another cluster than the default one were taken for ended."""
    monkeypatch.setenv("SBATCH_CLUSTERS", "other")
    assert environment()["SLURM_CLUSTERS"] == "other"
    with environment_of_jobs({}):
        assert os.environ["SBATCH_CLUSTERS"] == os.environ["SLURM_CLUSTERS"] == "other"


def test_a_missing_configuration_of_slurm_is_told_at_once(
    monkeypatch, tmp_path, folder_of, make_plan
):
    """SLURM's commands look for it for a minute each, and the sweep said nothing."""
    make_plan([folder_of("a")], run={"on": "slurm", "hours": 1})
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    monkeypatch.setattr(cluster, "_run", pytest.fail)
    with pytest.raises(CouplingError, match="got SLURM_CONF=.*slurm.conf, which is no file"):
        sweep(tmp_path / "plan.yaml", check=True)


def test_the_reason_for_silence_is_squeues(monkeypatch, tmp_path):
    program = tmp_path / "squeue"
    program.write_text("#!/bin/sh\necho 'squeue: error: no such controller' >&2; exit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert cluster.jobs() is None
    assert cluster.why_silent() == "squeue: error: no such controller"


def test_a_cluster_in_the_plan_is_refused(make_plan, folder_of):
    run = {"on": "slurm", "hours": 1, "options": {"clusters": "other"}}
    with pytest.raises(CouplingError, match=r"options\.clusters, expected SLURM_CLUSTERS in the"):
        make_plan([folder_of("a")], run=run)


def test_a_refusal_names_the_users_defaults(make_plan, folder_of, monkeypatch):
    """A partition that no plan named was said to be invalid."""
    submitit = pytest.importorskip("submitit")
    from submitit.core.utils import FailedJobError

    class Refusing(submitit.SlurmExecutor):
        def __init__(self, *_, **__):
            raise FailedJobError("sbatch: error: Invalid partition name specified")

    monkeypatch.setattr(submitit, "SlurmExecutor", Refusing)
    monkeypatch.setenv("SBATCH_PARTITION", "nope")
    with pytest.raises(CouplingError, match=r"specified \(with SBATCH_PARTITION=nope of the env"):
        plan = make_plan([folder_of("a")], run={"on": "slurm", "hours": 1})
        plan.output.mkdir()
        slurm._submit(plan, [], None)
