"""Sweeps: models × revisions × tasks from one plan, on this machine or on SLURM. Imports neither torch nor lm-eval."""
