"""The command line `grace`: the pipeline without Prefect."""

from grace_core.cli.app import main
from grace_core.cli.bench import bench
from grace_core.cli.kubernetes import kubernetes

__all__ = ["bench", "kubernetes", "main"]
