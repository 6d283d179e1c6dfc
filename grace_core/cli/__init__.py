"""The command line `grace`: the pipeline without Prefect."""

from grace_core.cli.app import main
from grace_core.cli.bench import bench
from grace_core.cli.bench_decode import decode
from grace_core.cli.benchmarks import benchmark
from grace_core.cli.chat_command import chat
from grace_core.cli.checkpoints import import_, pack
from grace_core.cli.kubernetes import kubernetes
from grace_core.cli.publish import publish
from grace_core.cli.report import report
from grace_core.cli.scoring import extract, score

__all__ = [
    "bench",
    "benchmark",
    "chat",
    "decode",
    "extract",
    "import_",
    "kubernetes",
    "main",
    "pack",
    "publish",
    "report",
    "score",
]
