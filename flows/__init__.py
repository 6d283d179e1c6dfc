"""Prefect flows: they wire the tasks and do nothing else."""
