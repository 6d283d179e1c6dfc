"""An evaluation of the toy student in a process of its own, to be killed.

python -m tests.evaluation_process RUN_DIR [SETTING=VALUE ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from grace_core.config import GraceConfig, load_config
from grace_core.stages.evaluation import evaluate
from grace_core.stages.once import StageContext

TOY = Path(__file__).resolve().parent.parent / "configs" / "toy.yaml"


def toy_config(run_dir: Path, *settings: str) -> GraceConfig:
    """The demo's configuration, cut to small batches of fewer questions."""
    small = ("evaluation.items=40", "evaluation.batch_tokens=200", "data.held_out_share=0")
    return load_config(TOY, [f"run_dir={run_dir}", *small, *settings])


if __name__ == "__main__":
    torch.set_num_threads(1)
    evaluate(toy_config(Path(sys.argv[1]), *sys.argv[2:]), "baseline", None, StageContext())
