"""What may still be taken: within containers of both kinds, within a SLURM job, shared by the
processes of a machine.
"""

import psutil
import pytest
import torch

from lm_eval_coupling.numerics import cgroups, limits

MIB = 1 << 20


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with 8 GiB available, no limits, and files of control groups that a test writes."""
    for name in (
        "LOCAL_WORLD_SIZE",
        "SLURM_MEM_PER_NODE",
        "SLURM_MEM_PER_CPU",
        "SLURM_CPUS_ON_NODE",
    ):
        monkeypatch.delenv(name, raising=False)
    memory = psutil.virtual_memory()._replace(available=8192 * MIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(cgroups, "_ROOT", tmp_path / "cgroup")
    monkeypatch.setattr(cgroups, "_OWN", tmp_path / "own")

    def write(path, text):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    return write


def test_without_limits_all_that_is_available(machine):
    assert limits.free_on_host() == limits.free(torch.device("cpu")) == 8192 * MIB
    machine("cgroup/memory.max", "max\n")
    machine("cgroup/memory.current", "1\n")
    assert limits.free_on_host() == 8192 * MIB


@pytest.mark.parametrize("folder", ["", "slurm/job_7/step_0/", "slurm/"])
def test_a_limit_of_the_second_version_on_any_level(machine, folder):
    """Inside a container the group is the root; elsewhere it and those around it may have one.
    Files kept are no use.
    """
    machine("own", "0::/slurm/job_7/step_0\n")
    machine(f"cgroup/{folder}memory.max", f"{1000 * MIB}\n")
    machine(f"cgroup/{folder}memory.current", f"{600 * MIB}\n")
    machine(f"cgroup/{folder}memory.stat", f"anon 5\ninactive_file {100 * MIB}\n")
    assert limits.free_on_host() == 500 * MIB


def test_a_limit_of_the_first_version(machine):
    """These were not seen: a process in such a container was killed without a word."""
    machine("own", "5:cpu,cpuacct:/x\n4:memory:/docker/abc\n")
    machine("cgroup/memory/docker/abc/memory.limit_in_bytes", f"{1000 * MIB}\n")
    machine("cgroup/memory/docker/abc/memory.usage_in_bytes", f"{600 * MIB}\n")
    machine("cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    machine("cgroup/memory/memory.usage_in_bytes", "1\n")
    assert limits.free_on_host() == 400 * MIB


@pytest.mark.parametrize(
    "job",
    [{"SLURM_MEM_PER_NODE": "4096"}, {"SLURM_MEM_PER_CPU": "1024", "SLURM_CPUS_ON_NODE": "4"}],
    ids=["node", "cpu"],
)
def test_what_a_slurm_job_was_given(machine, monkeypatch, job):
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    assert limits.free_on_host() == pytest.approx(
        4096 * MIB - psutil.Process().memory_info().rss, abs=64 * MIB
    )
    monkeypatch.setenv(next(iter(job)), "0")  # all of the node's
    assert limits.free_on_host() == 8192 * MIB


def test_processes_of_one_machine_share(machine, monkeypatch):
    """Each of several ranks took half of what was free."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert limits.free_on_host() == 2048 * MIB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "what")
    assert limits.free_on_host() == 8192 * MIB


def test_a_gpu_is_asked(monkeypatch):
    """What torch holds of it for its next tensors can be taken as well."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 300)
    assert limits.free(torch.device("cuda")) == 1400
