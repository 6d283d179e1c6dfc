"""Reading a release so that its quantized layers stay packed.

Transformers reads the same directory too, but unpacks it in its first forward pass. Here the model
is built without weights, its quantized layers are replaced, and tensors are read one by one and put
into their places; no quantized layer ever exists unpacked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig, PreTrainedModel

from grace_core.errors import GraceError
from grace_core.export.checkpoint import WeightFiles, model_names, weight_files
from grace_core.inference.packed_store import PackedStore
from grace_core.models.loading import CheckpointFolder, load_model, read_checkpoint
from grace_core.quantization.lsq import SCALE_DTYPE
from grace_core.quantization.packing import PACKABLE_BITS

_PACKED, _SCALE, _SHAPE = ".weight_packed", ".weight_scale", ".weight_shape"


@dataclass(frozen=True)
class Packing:
    """How a release's layers are packed."""

    bits: int
    group_size: int


def load_release(
    folder: Path, device: torch.device | str, *, dtype: torch.dtype = torch.bfloat16
) -> Any:
    """Any release or checkpoint, in evaluation mode: packed ones stay packed.

    Raises:
        GraceError: the directory is no checkpoint, or packed in a way that is not read here.
    """
    checkpoint = read_checkpoint(folder)
    if packing_of(checkpoint) is None:
        return load_model(checkpoint, device=device, dtype=dtype)
    return load_packed(folder, device, dtype=dtype)


def load_packed(
    folder: Path, device: torch.device | str, *, dtype: torch.dtype = torch.bfloat16
) -> Any:
    """A W8 or W4 release with its quantized layers packed: an ordinary transformers model.

    Its linear layers are `PackedLinear`s; everything else is as `from_pretrained` makes it.

    Args:
        dtype: of everything that is not packed; inputs of packed layers have it too.

    Raises:
        GraceError: the directory is no packed release, is incomplete, or its layers do not fit.
    """
    checkpoint = read_checkpoint(folder)
    packing = packing_of(checkpoint)
    if packing is None:
        raise GraceError(f"{folder} is not packed; load_release reads every kind of checkpoint")
    where = torch.device(device)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(
            config, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False
        )
    make_buffers(model, where)
    files = weight_files(folder)
    _fill(model, files, _packed_layers(model, files, packing), packing, where, dtype)
    model.tie_weights()
    missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if missing:
        raise GraceError(
            f"{folder} lacks {len(missing)} of the model's tensors, first {missing[0]}; "
            "the release is incomplete"
        )
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.requires_grad_(False).eval()


def packing_of(checkpoint: CheckpointFolder) -> Packing | None:
    """How the checkpoint is packed, or None for a dense one.

    Raises:
        GraceError: quantized otherwise than in groups of symmetric 4 or 8 bit codes.
    """
    described = checkpoint.config.get("quantization_config")
    if described is None:
        return None
    problem = None
    groups = list(described.get("config_groups", {}).values())
    weights = groups[0].get("weights", {}) if groups else {}
    if described.get("format") != "pack-quantized":
        problem = f"its format is {described.get('format', described.get('quant_method'))!r}"
    elif described.get("quantization_status") != "compressed":
        problem = f"its quantization_status is {described.get('quantization_status')!r}"
    elif len(groups) != 1 or groups[0].get("input_activations"):
        problem = "it has several schemes, or quantized activations"
    elif not weights.get("symmetric") or weights.get("strategy") != "group":
        problem = "its codes are not symmetric with a scale a group"
    elif weights.get("num_bits") not in PACKABLE_BITS:
        problem = f"its codes have {weights.get('num_bits')} bits"
    if problem is not None:
        raise GraceError(
            f"{checkpoint.path} cannot be kept packed: {problem}. Read here are compressed-tensors "
            "`pack-quantized` releases, 4 or 8 bits, symmetric, by group, as `grace release` "
            "writes them"
        )
    return Packing(int(weights["num_bits"]), int(weights["group_size"]))


@dataclass(frozen=True)
class _Place:
    """Where a packed layer goes."""

    name: str
    linear: nn.Linear


def _packed_layers(model: Any, files: WeightFiles, packing: Packing) -> dict[str, _Place]:
    """Packed layers by their name on disk, in the model's order.

    Raises:
        GraceError: one is no linear layer of the model.
    """
    on_disk = [name.removesuffix(_PACKED) for name in files.names if name.endswith(_PACKED)]
    renamed = model_names(model, [f"{name}.weight" for name in on_disk])
    by_name = {renamed[f"{name}.weight"].removesuffix(".weight"): name for name in on_disk}
    linears = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    unknown = sorted(by_name.keys() - linears.keys())
    if unknown or not by_name:
        told = f"{unknown[0]} is no linear layer of the model" if unknown else "it packs no layer"
        raise GraceError(f"{files.folder} does not fit its own config.json: {told}")
    return {by_name[name]: _Place(name, linears[name]) for name in linears if name in by_name}


def _fill(
    model: Any,
    files: WeightFiles,
    layers: dict[str, _Place],
    packing: Packing,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Put every tensor of the files into its place."""
    store = PackedStore(
        {name: place.linear for name, place in layers.items()},
        device,
        bits=packing.bits,
        group_size=packing.group_size,
    )
    parts: dict[str, dict[str, Tensor]] = {}
    biases: dict[str, Tensor] = {}
    plain = [name for name in files.names if not name.endswith((_PACKED, _SCALE, _SHAPE))]
    names = model_names(model, plain)
    for file in files.files:
        for name, tensor in files.tensors(file):
            if name in names:
                target = names[name]
                moved = tensor.to(device, dtype if tensor.is_floating_point() else None)
                layer, _, own = target.rpartition(".")
                if own == "bias" and any(place.name == layer for place in layers.values()):
                    biases[layer] = moved
                else:
                    _set(model, target, moved)
                continue
            layer, _, kind = name.rpartition(".")
            if layer not in layers:
                raise GraceError(f"{files.folder}: {name} belongs to no packed layer")
            found = parts.setdefault(layer, {})
            found[f".{kind}"] = tensor
            if len(found) == 3:
                place = layers[layer]
                _check(files.folder, layer, found, place.linear, packing)
                words, scales = found[_PACKED].to(device), found[_SCALE].to(device)
                model.set_submodule(place.name, store.layer(layer, words, scales))
                del parts[layer]
    for layer, bias in biases.items():
        model.get_submodule(layer).bias = bias
    if parts:
        layer, found = next(iter(parts.items()))
        raise GraceError(f"{files.folder}: {layer} has only {', '.join(sorted(found))}")


def _check(
    folder: Path, layer: str, found: dict[str, Tensor], linear: nn.Linear, packing: Packing
) -> None:
    size = (linear.out_features, linear.in_features)
    expected = {
        _PACKED: ((size[0], -(-size[1] * packing.bits // 32)), torch.int32),
        _SCALE: ((size[0], size[1] / packing.group_size), SCALE_DTYPE),
        _SHAPE: ((2,), torch.int64),
    }
    for kind, (shape, dtype) in expected.items():
        tensor = found[kind]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise GraceError(
                f"{folder}: {layer}{kind} is {tensor.dtype} {tuple(tensor.shape)}, expected "
                f"{dtype} {shape} for {size[1]} inputs and {size[0]} outputs"
            )
    if tuple(found[_SHAPE].tolist()) != size:
        raise GraceError(f"{folder}: {layer}{_SHAPE} is {found[_SHAPE].tolist()}, not {size}")


def _set(model: Any, name: str, tensor: Tensor) -> None:
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    if own in module._parameters:
        _check_shape(name, module._parameters[own], tensor)
        module._parameters[own] = nn.Parameter(tensor, requires_grad=False)
    elif own in module._buffers:
        _check_shape(name, module._buffers[own], tensor)
        module._buffers[own] = tensor
    else:
        raise GraceError(f"the checkpoint has {name}, which the model has not")


def _check_shape(name: str, expected: Tensor | None, tensor: Tensor) -> None:
    if expected is None or expected.shape != tensor.shape:
        shape = None if expected is None else tuple(expected.shape)
        raise GraceError(f"{name} is {tuple(tensor.shape)} on disk, {shape} in the model")


def make_buffers(model: Any, device: torch.device) -> None:
    """Compute what no checkpoint holds, such as rotary frequencies, as `from_pretrained` does.

    `_init_weights` of a module's own model fills them; weights are on the meta device, where its
    other assignments do nothing.
    """
    for owner, module in _with_owner(model):
        names = [
            name
            for name in module._non_persistent_buffers_set
            if module._buffers.get(name) is not None
        ]
        if not names:
            continue
        for name in names:
            buffer = module._buffers[name]
            fill = torch.nan if buffer.is_floating_point() else -1
            module._buffers[name] = torch.full(buffer.shape, fill, dtype=buffer.dtype)
        owner._init_weights(module)
        for name in names:
            buffer = module._buffers[name]
            unset = buffer.isnan() if buffer.is_floating_point() else buffer == -1
            assert not unset.any(), (
                f"transformers does not initialise {type(module).__name__}.{name}"
            )
            module._buffers[name] = buffer.to(device)


def _with_owner(module: Any, owner: Any = None) -> Iterator[tuple[Any, Any]]:
    """All modules, each with the innermost model of transformers' that holds it."""
    owner = module if isinstance(module, PreTrainedModel) else owner
    yield owner, module
    for child in module.children():
        yield from _with_owner(child, owner)


def describe(folder: Path) -> str:
    """One line on a release for people: bits and family."""
    checkpoint = read_checkpoint(folder)
    packing = packing_of(checkpoint)
    kind = "dense" if packing is None else f"W{packing.bits}G{packing.group_size}"
    return f"{checkpoint.config['model_type']}, {kind}"
