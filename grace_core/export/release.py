"""Write releases: BF16 as plain safetensors, quantized weights in one of the packed forms."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from grace_core.errors import GraceError
from grace_core.export.checkpoint import (
    INDEX_FILE,
    WeightFiles,
    copy_companions,
    model_names,
    new_directory,
    read_config,
    skeleton,
    weight_files,
)
from grace_core.export.formats import PackedForm, PackedLayer
from grace_core.export.lazy_tensors import LazyTensor, save_lazily
from grace_core.quantization.checkpoint import TrainedScales, is_quantized, load_scales
from grace_core.quantization.lsq import quantize, stored_scale

MODEL_FOLDER = "model"
"""In the artifact of a release: what plain transformers loads, and what is evaluated."""

AWQ_FOLDER = "awq"
"""The same codes and scales for AWQ's runtimes, where they are released in this form too."""


def release_folders(artifact: Path) -> dict[str, Path]:
    """The forms in a release's artifact, by what is appended to the release's name: "", "-AWQ"."""
    folders = {"": artifact / MODEL_FOLDER, "-AWQ": artifact / AWQ_FOLDER}
    return {suffix: folder for suffix, folder in folders.items() if folder.is_dir()}


def export_bf16(source: Path, destination: Path) -> None:
    """Release a trained bf16 checkpoint: its weights and companions, nothing else of the training.

    Raises:
        GraceError: the checkpoint is quantized, incomplete or not bf16, or the destination exists.
    """
    if is_quantized(source):
        raise GraceError(f"{source} comes from quantization-aware training; export it packed")
    read_config(source)
    weights = weight_files(source)
    for name, (dtype, _) in weights.headers.items():
        if dtype.is_floating_point and dtype != torch.bfloat16:
            raise GraceError(f"{source}: {name} is {dtype}, expected torch.bfloat16")
    with new_directory(destination) as folder:
        for file in ("config.json", INDEX_FILE, *weights.files):
            if (source / file).is_file():
                shutil.copyfile(source / file, folder / file)
        copy_companions(source, folder)


def export_packed(source: Path, destination: Path, form: PackedForm) -> None:
    """Release a checkpoint of quantization-aware training with its weights packed.

    Tensors keep their division into files, and memory holds one of them at a time. Whatever can be
    refused is, before the first of them is read. The directory appears under its name only when it
    is complete.

    Args:
        source: latent bf16 weights with ``scales.safetensors`` and ``quantization.json``.

    Raises:
        GraceError: the checkpoint is incomplete, scales and weights do not fit each other, the form
            cannot hold them, or the destination exists.
    """
    trained = load_scales(source)
    if trained.bits not in form.widths:
        held = " or ".join(map(str, form.widths))
        raise GraceError(f"{source}: {trained.bits}-bit codes; {form.title} holds {held} bits")
    config = read_config(source)
    weights = weight_files(source)
    model = skeleton(source)
    config["quantization_config"] = form.quantization_config(
        model, trained.scales, trained.bits, trained.group_size
    )
    layers = packed_layers(weights, model_names(model, weights.names), trained)
    for layer in layers.values():
        form.check(layer)
    with new_directory(destination) as folder:
        weight_map: dict[str, str] = {}
        total_size = 0
        for file, names in weights.files.items():
            released = [
                tensor for name in names for tensor in _released(name, weights, layers, form)
            ]
            save_lazily(released, folder / file)
            weight_map |= {tensor.name: file for tensor in released}
            total_size += sum(tensor.nbytes for tensor in released)
        if (source / INDEX_FILE).is_file():
            index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
            _write_json(folder / INDEX_FILE, index)
        _write_json(folder / "config.json", config)
        copy_companions(source, folder)


def packed_layers(
    weights: WeightFiles, names: Mapping[str, str], trained: TrainedScales
) -> dict[str, PackedLayer]:
    """The quantized layers of a trained checkpoint, by their latent weights' names on disk.

    Args:
        names: names on disk -> names in the model, of all tensors.

    Raises:
        GraceError: a layer has no weight in the checkpoint, or one of another dtype or shape.
    """
    headers = weights.headers
    layers = {}
    for name, layer in _quantized_tensors(names, trained.scales, weights.folder).items():
        dtype, shape = headers[name]
        theta = trained.scales[layer]
        if dtype != torch.bfloat16:
            raise GraceError(f"{name} is {dtype}; codes are trained from torch.bfloat16 weights")
        if len(shape) != 2 or theta.shape != (shape[0], shape[1] / trained.group_size):
            raise GraceError(
                f"{layer}: scales of shape {tuple(theta.shape)} do not fit a weight of shape "
                f"{shape} at group size {trained.group_size}"
            )
        scale = stored_scale(theta)
        layers[name] = PackedLayer(
            name,
            out_features=shape[0],
            in_features=shape[1],
            bits=trained.bits,
            group_size=trained.group_size,
            scale=scale,
            codes=partial(_codes, weights, name, scale, trained),
        )
    return layers


def _codes(
    weights: WeightFiles, name: str, scale: torch.Tensor, trained: TrainedScales
) -> torch.Tensor:
    return quantize(weights.read(name), scale, trained.bits, trained.group_size)


def _released(
    name: str, weights: WeightFiles, layers: Mapping[str, PackedLayer], form: PackedForm
) -> list[LazyTensor]:
    if name in layers:
        return form.tensors(layers[name])
    dtype, shape = weights.headers[name]
    return [LazyTensor(name, dtype, shape, partial(weights.read, name))]


def _quantized_tensors(
    names: Mapping[str, str], layers: Collection[str], source: Path
) -> dict[str, str]:
    """Names on disk of the quantized layers' latent weights -> layer names."""
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


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
