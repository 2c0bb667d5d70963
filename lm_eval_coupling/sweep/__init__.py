"""Sweeps: models × revisions × tasks from one plan, on this machine or on a SLURM cluster. Imports neither torch nor lm-eval."""
