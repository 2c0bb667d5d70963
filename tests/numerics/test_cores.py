"""The cores that a scheduler gives: affinity, quotas of both versions, SLURM, OMP_NUM_THREADS."""

import os

import pytest

from lm_eval_coupling.numerics import cgroups
from lm_eval_coupling.numerics.cores import limit_spinning, usable_cores

VARIABLES = ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE", "OMP_NUM_THREADS")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine of 16 cores without limits, and files of control groups that a test writes."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    monkeypatch.setattr(cgroups, "_ROOT", tmp_path / "cgroup")
    monkeypatch.setattr(cgroups, "_OWN", tmp_path / "own")

    def write(path, text):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    return write


def test_without_limits_those_of_the_affinity(machine, monkeypatch):
    assert usable_cores() == 16
    machine("cgroup/cpu.max", "max 100000\n")
    machine("cgroup/cpu/cpu.cfs_quota_us", "-1\n")
    machine("cgroup/cpu/cpu.cfs_period_us", "100000\n")
    assert usable_cores() == 16
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 7})
    assert usable_cores() == 2


def test_a_system_without_affinity(machine, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores() == 1


@pytest.mark.parametrize(
    ("quota", "cores"), [("400000 100000", 4), ("250000 100000", 2), ("50000 100000", 1)]
)
@pytest.mark.parametrize("folder", ["", "kubepods/pod7/", "kubepods/"])
def test_a_quota_of_the_second_version_on_any_level(machine, folder, quota, cores):
    """A quota below one core works."""
    machine("own", "0::/kubepods/pod7\n")
    machine(f"cgroup/{folder}cpu.max", f"{quota}\n")
    assert usable_cores() == cores


@pytest.mark.parametrize("folder", ["", "docker/abc/"])
def test_a_quota_of_the_first_version(machine, folder):
    machine("own", "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n")
    machine(f"cgroup/cpu/{folder}cpu.cfs_quota_us", "350000\n")
    machine(f"cgroup/cpu/{folder}cpu.cfs_period_us", "100000\n")
    assert usable_cores() == 3


@pytest.mark.parametrize("name", VARIABLES)
def test_what_a_variable_allows(machine, monkeypatch, name):
    monkeypatch.setenv(name, "5")
    assert usable_cores() == 5
    monkeypatch.setenv(name, "64")
    assert usable_cores() == 16
    for nothing in ("", "0", "-2", "what", "2(x3)"):
        monkeypatch.setenv(name, nothing)
        assert usable_cores() == 16


def test_a_list_of_threads_by_nesting(machine, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4,2")
    assert usable_cores() == 4


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT": "10000"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        ({"GOMP_SPINCOUNT": "5"}, {"GOMP_SPINCOUNT": "5"}),
    ],
)
def test_threads_spin_briefly_unless_the_user_chose_how_they_wait(given, expected):
    limit_spinning(given)
    assert given == expected
