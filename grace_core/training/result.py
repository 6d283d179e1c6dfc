"""What a finished training leaves: a checkpoint directory like the one it started from.

Weights, configuration, tokenizer, image processor and, for quantized training, theta beside the
latent weights. Written aside and renamed, so that the directory of the final name is whole.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from torch import distributed as dist

from grace_core.quantization.checkpoint import save_scales
from grace_core.quantization.scales import ScaleBank
from grace_core.training.checkpoint import whole_weights
from grace_core.training.job import TrainingJob

_PROCESSOR_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
"""Copied unchanged from the starting checkpoint: training changes none of them."""


def write_result(job: TrainingJob, model: Any, bank: ScaleBank | None) -> None:
    """Write `job.result`; called by every rank (weights are gathered under ZeRO-3)."""
    weights = whole_weights(model)
    if dist.get_rank() == 0:
        partial = job.work / ".trained.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write(partial, job, model, bank, weights)
        shutil.rmtree(job.result, ignore_errors=True)
        os.replace(partial, job.result)
    dist.barrier()


def _write(
    folder: Path, job: TrainingJob, model: Any, bank: ScaleBank | None, weights: dict[str, Any]
) -> None:
    model.save_pretrained(folder, state_dict=weights, max_shard_size="5GB")
    for name in _PROCESSOR_FILES:
        if (job.student / name).is_file():
            shutil.copyfile(job.student / name, folder / name)
    if bank is not None:
        save_scales(folder, bank, bits=job.bits, group_size=job.group_size)
