"""A packed release as an ordinary bf16 model, whatever its form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from grace_core.errors import GraceError
from grace_core.export.checkpoint import skeleton, weight_files
from grace_core.export.formats import PackedForm
from grace_core.quantization.lsq import dequantize


def load_dense(release: Path, form: PackedForm, *, bits: int, group_size: int) -> Any:
    """The model of a release with every packed weight multiplied out, on the CPU.

    The files are read by us; transformers renames the tensors and builds the model, as it does for
    any checkpoint.

    Raises:
        GraceError: tensors are missing, too many or of a wrong shape.
    """
    files = weight_files(release)
    packed = form.weights(files.names)
    state = {}
    for name in packed:
        stored = form.read(files, name, bits, group_size)
        state[name] = dequantize(stored.codes, stored.scale, torch.bfloat16)
    parts = {part for name in packed for part in form.parts(name)}
    state |= {name: files.read(name) for name in files.names if name not in parts}

    return dense_model(release, state)


def dense_model(folder: Path, state: dict[str, Tensor]) -> Any:
    """The bf16 model that a folder's configuration describes, with the given tensors.

    Args:
        state: bf16 tensors by their names on disk.

    Raises:
        GraceError: tensors are missing, too many or of a wrong shape.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model, info = type(skeleton(folder)).from_pretrained(
        None, config=config, state_dict=state, dtype=torch.bfloat16, output_loading_info=True
    )
    problems = [
        f"{name}: {kind.removesuffix('_keys')}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        for name in sorted(map(str, info[kind]))
    ]
    if problems:
        raise GraceError(f"{folder} does not load: " + "; ".join(problems))
    return model
