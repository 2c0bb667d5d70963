"""Environments of child processes and jobs, without the variables of the caller's own job."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

# Variables of the job, allocation or launcher that the sweep was called in. A child that inherits
# them takes itself for a part of that job, or waits for the other processes of that launch.
_OF_A_JOB = (
    *(
        "_SLURM_",
        "SPANK_",
        "SLURM_",
        "SLURMD_",
        "SRUN_",
        "SALLOC_",
        "SBATCH_",
        "SQUEUE_",
        "SCONTROL_",
        "SCANCEL_",
    ),
    *("SINFO_", "SACCT_", "SPRIO_", "SUBMITIT_", "PMI_", "PMI2_", "PMIX_", "OMPI_", "PRTE_"),
    *("MV2_", "MPI_", "HYDRA_", "PALS_", "JSM_", "FLUX_", "TORCHELASTIC_", "ACCELERATE_"),
)
_OF_A_LAUNCH = {
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK"),
    *("ROLE_RANK", "ROLE_WORLD_SIZE", "GROUP_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
}
# A notebook's kernel names a backend of matplotlib that a child process may not have.
_OF_A_NOTEBOOK = {"MPLBACKEND"}
# Variables that say where the cluster is and how to talk to it, rather than what a job is like.
_OF_THE_CLUSTER = {"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT"}
# Defaults of a user or site for where jobs run, by the key of the plan that replaces each.
_DEFAULTS = {
    "SBATCH_ACCOUNT": "account",
    "SBATCH_PARTITION": "partition",
    "SBATCH_QOS": "qos",
    "SBATCH_CONSTRAINT": "constraint",
    "SBATCH_RESERVATION": "reservation",
    "SBATCH_CLUSTERS": "clusters",
    "SBATCH_WCKEY": "wckey",
}


def environment(*further: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment without its job's variables, updated by ``further``."""
    kept = {name: value for name, value in os.environ.items() if not _is_of_a_job(name)}
    if clusters := os.environ.get("SBATCH_CLUSTERS"):
        # `squeue` does not read it: jobs of another cluster would be missing in its list.
        kept["SLURM_CLUSTERS"] = clusters
    for variables in further:
        kept |= variables
    return kept


@contextmanager
def environment_of_jobs(
    chosen: Mapping[str, object], *further: Mapping[str, str]
) -> Iterator[None]:
    """Make this process's environment the one that ``sbatch`` passes on to the jobs it submits.

    Args:
        chosen: options of the plan. The user's defaults (``SBATCH_ACCOUNT`` and the like) stay,
            except where the plan chooses: they would override the options of a batch script.
        further: variables of the jobs.
    """
    before = dict(os.environ)
    # A site's SBATCH_EXPORT=NONE would start jobs, and `srun` in them, without any environment.
    export = {} if chosen.get("export") is not None else {"SBATCH_EXPORT": "ALL"}
    built = environment(*further, defaults_of_user(chosen), export)
    try:
        _replace(built)
        yield
    finally:
        _replace(before)


def defaults_of_user(chosen: Mapping[str, object]) -> dict[str, str]:
    """Return the variables that give ``sbatch`` the options that a plan does not choose."""
    return {
        name: os.environ[name]
        for name, option in _DEFAULTS.items()
        if name in os.environ and chosen.get(option) is None
    }


def _is_of_a_job(name: str) -> bool:
    if name in _OF_THE_CLUSTER:
        return False
    return name.startswith(_OF_A_JOB) or name in _OF_A_LAUNCH or name in _OF_A_NOTEBOOK


def _replace(variables: Mapping[str, str]) -> None:
    for name in [name for name in os.environ if name not in variables]:
        del os.environ[name]
    os.environ.update(variables)
