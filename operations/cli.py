"""The command line `grace`: the core's commands, and those that ask Prefect or MLflow.

Whatever is slow to import (both are) is imported when it is needed.
"""

from __future__ import annotations

from grace_core.cli.app import app, main

__all__ = ["app", "main"]
