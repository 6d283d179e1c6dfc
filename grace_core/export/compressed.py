"""Write releases: BF16 as plain safetensors, W8 and W4 as compressed-tensors ``pack-quantized``.

The packed form of a linear layer P with O outputs, I inputs and b-bit codes, group size g:

    P.weight_packed   int32 (O, ceil(I b / 32))   codes, see grace_core.quantization.packing
    P.weight_scale    bf16  (O, I / g)            s; the weight is code * s
    P.weight_shape    int64 (2,)                  [O, I]
    P.bias            unchanged; there is no ``weight`` and no zero point

Transformers and vLLM load such a directory as it is. ``quantization_status`` in the configuration
matters: without it transformers loads with warnings only and computes wrong logits.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from grace_core.errors import GraceError
from grace_core.export.checkpoint import (
    INDEX_FILE,
    copy_companions,
    model_names,
    new_directory,
    read_config,
    skeleton,
    weight_files,
)
from grace_core.quantization.checkpoint import TrainedScales, is_quantized, load_scales
from grace_core.quantization.lsq import quantize, stored_scale
from grace_core.quantization.packing import PACKABLE_BITS, pack_codes


def export_bf16(source: Path, destination: Path) -> None:
    """Release a trained bf16 checkpoint: its weights and companions, nothing else of the training.

    Raises:
        GraceError: the checkpoint is quantized, incomplete or not bf16, or the destination exists.
    """
    if is_quantized(source):
        raise GraceError(f"{source} comes from quantization-aware training; export it compressed")
    read_config(source)
    weights = weight_files(source)
    for file in weights.files:
        for name, tensor in weights.tensors(file):
            if tensor.is_floating_point() and tensor.dtype != torch.bfloat16:
                raise GraceError(f"{source}: {name} is {tensor.dtype}, expected torch.bfloat16")
    with new_directory(destination) as folder:
        for file in ("config.json", INDEX_FILE, *weights.files):
            if (source / file).is_file():
                shutil.copyfile(source / file, folder / file)
        copy_companions(source, folder)


def export_compressed(source: Path, destination: Path) -> None:
    """Release a checkpoint of quantization-aware training with its weights packed.

    Tensors are streamed and keep their names and their division into files; one output file at a
    time is held in memory. The directory appears under its name only when it is complete.

    Args:
        source: latent bf16 weights with ``scales.safetensors`` and ``quantization.json``.

    Raises:
        GraceError: the checkpoint is incomplete, scales and weights do not fit each other, or the
            destination exists.
    """
    trained = load_scales(source)
    if trained.bits not in PACKABLE_BITS:
        raise GraceError(f"{source}: {trained.bits}-bit codes; releases hold {PACKABLE_BITS} bits")
    config = read_config(source)
    weights = weight_files(source)
    model = skeleton(source)
    layer_of = quantized_tensors(model_names(model, weights.names), trained.scales, source)
    config["quantization_config"] = quantization_config(
        trained.bits, trained.group_size, ignore_patterns(model, trained.scales)
    )
    with new_directory(destination) as folder:
        weight_map: dict[str, str] = {}
        total_size = 0
        for file in weights.files:
            released: dict[str, Tensor] = {}
            for name, tensor in weights.tensors(file):
                layer = layer_of.get(name)
                released |= {name: tensor} if layer is None else _pack(name, tensor, layer, trained)
            save_file(released, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(released, file)
            total_size += sum(tensor.nbytes for tensor in released.values())
        if (source / INDEX_FILE).is_file():
            index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
            _write_json(folder / INDEX_FILE, index)
        _write_json(folder / "config.json", config)
        copy_companions(source, folder)


def quantized_tensors(
    names: Mapping[str, str], layers: Collection[str], source: Path
) -> dict[str, str]:
    """Names on disk of the quantized layers' latent weights -> layer names.

    Args:
        names: names on disk -> names in the model, of all tensors.

    Raises:
        GraceError: a layer has no weight in the checkpoint.
    """
    found = {
        on_disk: in_model.removesuffix(".weight")
        for on_disk, in_model in names.items()
        if in_model.endswith(".weight") and in_model.removesuffix(".weight") in layers
    }
    missing = [layer for layer in layers if layer not in found.values()]
    if missing:
        raise GraceError(
            f"{source}: scales without weights for {len(missing)} layers, first {missing[0]}; "
            "the scales belong to another model"
        )
    assert len(found) == len(layers), "two tensors on disk map to one layer"
    return found


def ignore_patterns(model: nn.Module, quantized: Collection[str]) -> list[str]:
    """Regular expressions that match exactly the linear layers that are not quantized.

    Each covers a largest subtree without quantized layers (``visual``, ``lm_head``) by the end of
    its path only: vLLM renames modules but does not rename regular expressions, so an expression
    must not depend on what stands before.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    above = {"", *(prefix for name in quantized for prefix in _paths(name))}
    patterns = []
    for name in linears:
        if name in quantized:
            continue
        root = next(path for path in _paths(name) if path not in above).split(".")
        for length in range(1, len(root) + 1):
            tail = r"\.".join(re.escape(part) for part in root[-length:])
            pattern = rf"(.*\.)?{tail}(\..*)?$"
            if not any(re.match(pattern, layer) for layer in quantized):
                break
        if f"re:{pattern}" not in patterns:
            patterns.append(f"re:{pattern}")
    for name in linears:
        ignored = any(re.match(pattern.removeprefix("re:"), name) for pattern in patterns)
        assert ignored == (name not in quantized), f"{name}: ignored = {ignored}"
    return patterns


def quantization_config(bits: int, group_size: int, ignore: list[str]) -> dict[str, Any]:
    """``quantization_config`` of config.json, in compressed-tensors' schema."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": group_size,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ignore,
    }


def _paths(name: str) -> list[str]:
    """``a.b.c`` -> ``a``, ``a.b``, ``a.b.c``."""
    parts = name.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def _pack(name: str, weight: Tensor, layer: str, trained: TrainedScales) -> dict[str, Tensor]:
    theta = trained.scales[layer]
    if weight.dtype != torch.bfloat16:
        raise GraceError(f"{name} is {weight.dtype}; codes are trained from torch.bfloat16 weights")
    if theta.shape != (weight.shape[0], weight.shape[1] / trained.group_size):
        raise GraceError(
            f"{layer}: scales of shape {tuple(theta.shape)} do not fit a weight of shape "
            f"{tuple(weight.shape)} at group size {trained.group_size}"
        )
    scale = stored_scale(theta)
    codes = quantize(weight, scale, trained.bits, trained.group_size)
    return {
        f"{name}_packed": pack_codes(codes, trained.bits),
        f"{name}_scale": scale,
        f"{name}_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
