"""Sweeps: models × revisions × tasks of one plan, on this machine or on SLURM, without torch."""
