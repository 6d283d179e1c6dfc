"""An imported checkpoint: what quantization-aware training would have left, made from a source.

The source's scales are not rounded as ours are (method.md: the forward pass uses the scale as it is
stored, in bf16). Codes are kept to the bit. A weight becomes its code times the rounded scale, so
that its code is found again; how far this moves the logits is measured and written down.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from grace_core.artifacts import digest_folder
from grace_core.errors import GraceError
from grace_core.export.checkpoint import (
    INDEX_FILE,
    SINGLE_FILE,
    copy_companions,
    model_names,
    new_directory,
    skeleton,
    weight_files,
)
from grace_core.export.dense import dense_model
from grace_core.export.exactness import logits_of
from grace_core.export.gate_batches import gate_batches
from grace_core.export.lazy_tensors import LazyTensor, save_lazily
from grace_core.export.release import packed_layers
from grace_core.importing.original_llava import is_original_llava, open_original
from grace_core.importing.sources import SidecarSource, Source, open_source
from grace_core.models.families import family_of
from grace_core.models.loading import read_checkpoint
from grace_core.quantization.checkpoint import load_scales, save_scales
from grace_core.quantization.lsq import dequantize, stored_scale
from grace_core.quantization.scales import ScaleBank
from grace_core.whole_files import write_whole

MANIFEST = "import.json"
"""Beside the weights: where they are from, and what the import changed."""


def import_checkpoint(
    folder: Path,
    destination: Path,
    *,
    base: Path | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Make a checkpoint that stages evaluate, release and train on, and verify it.

    Args:
        folder: as published: weights on the grid with a sidecar, or packed.
        destination: appears when it is whole: bf16 weights, scales, companions and `import.json`.
        base: transformers checkpoint of the same model, for one in the original LLaVA layout; what
            is beside the trained weights comes from there.
        device: where logits are compared; one model at a time is held there.

    Returns:
        The content of `import.json`.

    Raises:
        GraceError: the source is damaged, unsafe, inconsistent or of an unknown family, or the
            destination exists.
    """
    layout = _layout(folder, base)
    checkpoint = read_checkpoint(layout)
    family_of(checkpoint.config["model_type"])  # raises for a family that is not supported
    batches = gate_batches(layout)
    model = skeleton(layout)
    source: Source
    if base is None:
        source = open_source(folder, model)
    else:
        files, layers = open_original(folder, base, model)
        source = SidecarSource(files, model, layers)
    modules = _modules(source, model)
    with new_directory(destination) as made:
        scales = _write_weights(source, made, model, modules)
        ordered = [name for name, _ in model.named_modules() if name in scales]
        bank = ScaleBank({name: scales[name].theta for name in ordered})
        save_scales(made, bank, bits=source.bits, group_size=source.group_size)
        _write_json(made / "config.json", _bf16_config(checkpoint.config))
        copy_companions(layout, made)
        manifest = {
            "format": 1,
            "source": {
                "folder": str(folder),
                "digest": digest_folder(folder),
                "kind": source.kind,
                **({} if base is None else {"base_digest": digest_folder(base)}),
                **source.facts(),
            },
            "bits": source.bits,
            "group_size": source.group_size,
            "layers": len(modules),
            "equal_codes": _verify_codes(source, made, model),
            "scales": _scale_changes(scales.values()),
            "tensors_rounded_to_bf16": _rounded(source),
            "logits": _logit_changes(source, layout, made, batches, device),
        }
        _write_json(made / MANIFEST, manifest)
    return manifest


def _layout(folder: Path, base: Path | None) -> Path:
    """The directory whose configuration, tokenizer and names count."""
    original = is_original_llava(folder)
    if original and base is None:
        raise GraceError(
            f"{folder}: in the layout of the original LLaVA code, without a tokenizer and names "
            "that transformers reads. Give the transformers checkpoint of the same model as "
            "--base, such as llava-hf/llava-1.5-7b-hf, downloaded"
        )
    if base is not None and not original:
        raise GraceError(f"{folder}: not in the original LLaVA layout; leave --base out")
    return base or folder


@dataclass(frozen=True)
class _Scales:
    """Of one layer: as in the source, and the logarithm that takes their place."""

    exact: Tensor
    theta: Tensor


def _modules(source: Source, model: Any) -> dict[str, str]:
    """Quantized weights on disk -> names of modules; raises GraceError for what the model lacks."""
    names = model_names(model, source.weights)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    modules = {name: inside.removesuffix(".weight") for name, inside in names.items()}
    unknown = [module for module in modules.values() if module not in linear]
    if unknown:
        raise GraceError(
            f"{source.files.folder}: {len(unknown)} quantized layers that "
            f"{type(model).__name__} lacks, first {unknown[0]}"
        )
    return modules


def _write_weights(
    source: Source, folder: Path, model: Any, modules: Mapping[str, str]
) -> dict[str, _Scales]:
    """Write bf16 weights in the source's division into files; returns scales by module name."""
    scales: dict[str, _Scales] = {}

    def on_our_grid(name: str, shape: tuple[int, ...]) -> Tensor:
        layer = source.layer(name)
        if layer.codes.shape != shape:
            raise GraceError(
                f"{source.files.folder}: {name} has shape {tuple(layer.codes.shape)}, in the model "
                f"that config.json describes {shape}"
            )
        scales[modules[name]] = _Scales(layer.scale, layer.theta)
        return dequantize(layer.codes, stored_scale(layer.theta), torch.bfloat16)

    shapes = {
        name: tuple(model.get_submodule(module).weight.shape) for name, module in modules.items()
    }
    places = {source.place(name): name for name in source.weights}
    weight_map: dict[str, str] = {}
    for file, stored in source.files.files.items():
        tensors = [
            LazyTensor(name, torch.bfloat16, shapes[name], partial(on_our_grid, name, shapes[name]))
            for name in (places[place] for place in stored if place in places)
        ]
        tensors += [_kept(source, name) for name in stored if name not in source.parts]
        save_lazily(tensors, folder / file)
        weight_map |= {tensor.name: file for tensor in tensors}
    if list(source.files.files) != [SINGLE_FILE]:
        _write_json(folder / INDEX_FILE, {"metadata": {}, "weight_map": weight_map})
    return scales


def _kept(source: Source, name: str) -> LazyTensor:
    dtype, shape = source.files.headers[name]
    if not dtype.is_floating_point:
        return LazyTensor(name, dtype, shape, partial(source.files.read, name))
    return LazyTensor(name, torch.bfloat16, shape, lambda: source.files.read(name).bfloat16())


def _bf16_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The source's configuration as that of an ordinary bf16 checkpoint."""
    kept = {}
    for key, value in config.items():
        if key in ("quantization_config", "awq_packing", "dtype", "torch_dtype"):
            continue
        kept[key] = _bf16_config(value) if isinstance(value, dict) and "dtype" in value else value
    return kept | {"dtype": "bfloat16"}


def _verify_codes(source: Source, made: Path, model: Any) -> int:
    """Read back what was written; returns how many codes are equal to the source's: all."""
    written = weight_files(made)
    layers = packed_layers(written, model_names(model, written.names), load_scales(made))
    for name in source.weights:
        differing = int((layers[name].codes() != source.layer(name).codes).sum())
        if differing:
            raise GraceError(
                f"{made}: {differing} codes of {name} are not the source's. Its scales are not "
                "what this import understands; please report the model"
            )
    return sum(layer.out_features * layer.in_features for layer in layers.values())


def _scale_changes(scales: Iterable[_Scales]) -> dict[str, int | float]:
    """What rounding the source's scales to bf16 does to them."""
    total = rounded = 0
    largest = 0.0
    for layer in scales:
        stored = stored_scale(layer.theta).double()
        total += stored.numel()
        rounded += int((stored != layer.exact).sum())
        changes = torch.where(layer.exact == stored, 0.0, stored / layer.exact - 1)
        largest = max(largest, float(changes.abs().max()))
    return {"total": total, "rounded": rounded, "largest_relative_change": largest}


def _rounded(source: Source) -> int:
    """How many tensors besides the quantized weights bf16 does not hold exactly."""
    rounded = 0
    for name in source.files.names:
        dtype, _ = source.files.headers[name]
        if name in source.parts or dtype == torch.bfloat16 or not dtype.is_floating_point:
            continue
        values = source.files.read(name)
        rounded += not torch.equal(values.bfloat16().to(dtype), values)
    return rounded


@torch.no_grad()
def _logit_changes(
    source: Source,
    layout: Path,
    made: Path,
    batches: Sequence[Mapping[str, Tensor]],
    device: torch.device | str,
) -> dict[str, int | float]:
    """bf16 logits of the imported model beside those of the source's own weights."""
    state = {name: source.layer(name).weight for name in source.weights}
    for name in source.files.names:
        if name not in source.parts:
            state[name] = _kept(source, name).make()
    before = logits_of(dense_model(layout, state), batches, device)
    del state
    model = AutoModelForImageTextToText.from_pretrained(made, trust_remote_code=False)
    after = logits_of(model, batches, device)
    pairs = list(zip(before, after, strict=True))
    gaps = torch.cat([(old.float() - new.float()).abs().flatten() for old, new in pairs])
    same = torch.cat([(old.argmax(-1) == new.argmax(-1)).flatten() for old, new in pairs])
    return {
        "batches": len(batches),
        "positions": same.numel(),
        "largest_difference": float(gaps.max()),
        "mean_difference": float(gaps.mean()),
        "same_best_token_percent": 100.0 * float(same.float().mean()),
    }


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    write_whole(file, json.dumps(content, indent=2) + "\n")
