"""What quantization-aware training leaves beside the latent bf16 weights.

A trained directory is an ordinary Hugging Face checkpoint holding the latent weights, plus

    scales.safetensors    theta = log s of every quantized layer, (O, G) fp32, by layer name
    quantization.json     {"bits": 4, "group_size": 128, "layers": [names, in model order]}

``quantization.json`` is written last, so a directory that has it has the scales as well.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from grace_core.errors import GraceError
from grace_core.quantization.scales import ScaleBank
from grace_core.whole_files import write_whole

SCALES_FILE = "scales.safetensors"
QUANTIZATION_FILE = "quantization.json"


@dataclass(frozen=True)
class TrainedScales:
    """The quantizer of a trained checkpoint.

    Attributes:
        bits: width of a code.
        group_size: consecutive weights along the input dimension that share a scale.
        scales: theta, (O, I / group_size) fp32 on the CPU, by layer name in model order.
    """

    bits: int
    group_size: int
    scales: dict[str, Tensor]


def is_quantized(folder: Path) -> bool:
    """Whether a trained directory holds scales, that is whether it comes from QAT."""
    return (folder / QUANTIZATION_FILE).is_file()


def save_scales(folder: Path, bank: ScaleBank, *, bits: int, group_size: int) -> None:
    """Write the scales into an existing checkpoint directory; files there are replaced whole."""
    scales = {name: theta.cpu() for name, theta in bank.state_dict().items()}
    partial = folder / f".{SCALES_FILE}.partial"
    save_file(scales, partial)
    os.replace(partial, folder / SCALES_FILE)
    description = {"bits": bits, "group_size": group_size, "layers": list(scales)}
    write_whole(folder / QUANTIZATION_FILE, json.dumps(description, indent=2) + "\n")


def load_scales(folder: Path) -> TrainedScales:
    """Read what :func:`save_scales` wrote.

    Raises:
        GraceError: a file is missing or damaged, or the two do not belong together.
    """
    described, stored = folder / QUANTIZATION_FILE, folder / SCALES_FILE
    for file in (described, stored):
        if not file.is_file():
            raise GraceError(
                f"{folder}: no {file.name}. This is not the directory of a finished "
                "quantization-aware training; give that stage's output."
            )
    try:
        description = json.loads(described.read_text(encoding="utf-8"))
        bits, group_size = int(description["bits"]), int(description["group_size"])
        layers = [str(name) for name in description["layers"]]
        scales = load_file(stored)
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise GraceError(
            f"{folder}: {QUANTIZATION_FILE} or {SCALES_FILE} is damaged "
            f"({type(error).__name__}: {error}); run the training stage again."
        ) from error
    if set(layers) != set(scales):
        differing = sorted(set(layers) ^ set(scales))
        raise GraceError(
            f"{folder}: {QUANTIZATION_FILE} and {SCALES_FILE} name different layers, "
            f"{len(differing)} in all, first {differing[0]}; they come from different runs."
        )
    bad = [
        name
        for name, theta in scales.items()
        if theta.dtype != torch.float32 or not torch.isfinite(theta).all()
    ]
    if bad:
        raise GraceError(
            f"{stored}: log-scales must be finite fp32; {len(bad)} are not, first {bad[0]}. "
            "Go back to an earlier checkpoint."
        )
    return TrainedScales(bits, group_size, {name: scales[name] for name in layers})
