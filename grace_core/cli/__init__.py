"""The command line `grace`: the pipeline without Prefect."""

from grace_core.cli.app import main

__all__ = ["main"]
