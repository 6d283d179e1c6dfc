"""Reading a release so that its quantized layers stay packed.

Transformers reads the same directory too, but unpacks it in its first forward pass. Here the model
is built without weights, its quantized layers are replaced, and tensors are read one by one and put
into their places; no quantized layer ever exists unpacked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig, PreTrainedModel

from grace_core.errors import GraceError
from grace_core.export.awq import AWQ
from grace_core.export.checkpoint import WeightFiles, model_names, weight_files
from grace_core.export.compressed import COMPRESSED
from grace_core.export.formats import PackedForm
from grace_core.inference.packed_store import PackedStore
from grace_core.models.loading import CheckpointFolder, load_model, read_checkpoint
from grace_core.quantization.lsq import SCALE_DTYPE
from grace_core.quantization.packing import PACKABLE_BITS, pack_codes


@dataclass(frozen=True)
class Packing:
    """How a release's layers are packed."""

    bits: int
    group_size: int
    form: PackedForm


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

    Its linear layers are `PackedLinear`s; everything else is as `from_pretrained` makes it. AWQ's
    words are dealt out as compressed-tensors', so both forms of a release give the same model.

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
    awq = described.get("quant_method") == "awq"
    problem, bits, group_size = (_as_awq if awq else _as_compressed)(described)
    if problem is not None:
        raise GraceError(
            f"{checkpoint.path} cannot be kept packed: {problem}. Read here are compressed-tensors "
            "`pack-quantized` and AWQ GEMM, 4 or 8 bits, symmetric, by group, as `grace release` "
            "writes them; `grace import` and `grace pack` make such a release of a published one"
        )
    return Packing(bits, group_size, AWQ if awq else COMPRESSED)


def _as_compressed(described: Mapping[str, Any]) -> tuple[str | None, int, int]:
    """Why a `quantization_config` is not read here, or None; bits and group size."""
    groups = list(described.get("config_groups", {}).values())
    weights = groups[0].get("weights", {}) if groups else {}
    problem = None
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
        return problem, 0, 0
    return None, int(weights["num_bits"]), int(weights["group_size"])


def _as_awq(described: Mapping[str, Any]) -> tuple[str | None, int, int]:
    """As `_as_compressed`, for AWQ; whether its codes are symmetric, its zero points tell."""
    bits, group_size = described.get("bits"), described.get("group_size")
    if described.get("version") != "gemm" or bits not in AWQ.widths:
        return f"it is AWQ {described.get('version')!r} of {bits} bits", 0, 0
    if not isinstance(group_size, int) or group_size < 1:
        return f"its group size is {group_size}", 0, 0
    return None, bits, group_size


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
    on_disk = [name.removesuffix(".weight") for name in packing.form.weights(files.names)]
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
    parts = {part for name in layers for part in packing.form.parts(f"{name}.weight")}
    names = model_names(model, [name for name in files.names if name not in parts])
    biases: dict[str, Tensor] = {}
    for name, place in layers.items():
        words, scales = _words(files, name, place.linear, packing)
        layer = store.layer(name, words.to(device), scales.to(device))
        model.set_submodule(place.name, layer)
    packed = {place.name for place in layers.values()}
    for name, target in names.items():
        tensor = files.read(name)
        moved = tensor.to(device, dtype if tensor.is_floating_point() else None)
        layer_name, _, own = target.rpartition(".")
        if own == "bias" and layer_name in packed:
            biases[layer_name] = moved
        else:
            _set(model, target, moved)
    for layer_name, bias in biases.items():
        model.get_submodule(layer_name).bias = bias


def _words(
    files: WeightFiles, name: str, linear: nn.Linear, packing: Packing
) -> tuple[Tensor, Tensor]:
    """A layer's words, (O, I bits / 32) int32, and scales, (O, I / group_size) bf16.

    Raises:
        GraceError: a part is missing or of another size, or a scale is no bf16 number.
    """
    parts = packing.form.parts(f"{name}.weight")
    found = [part for part in parts if part in files.headers]
    if len(found) != len(parts):
        told = ", ".join(sorted(part.removeprefix(name) for part in found))
        raise GraceError(f"{files.folder}: {name} has only {told}; the release is incomplete")
    size = (linear.out_features, linear.in_features)
    if packing.form is COMPRESSED:
        _check(files, name, size, packing)
        words, scales, shape = map(files.read, parts)
        if tuple(shape.tolist()) != size:
            raise GraceError(f"{files.folder}: {parts[2]} is {shape.tolist()}, not {size}")
        return words, scales
    stored = packing.form.read(files, f"{name}.weight", packing.bits, packing.group_size)
    if tuple(stored.codes.shape) != size:
        raise GraceError(f"{files.folder}: {name} is {tuple(stored.codes.shape)}, expected {size}")
    scales = stored.scale.to(SCALE_DTYPE)
    if not torch.equal(scales.float(), stored.scale.float()):
        raise GraceError(
            f"{files.folder}: {name} has scales that are no bf16 numbers, so it was not released "
            "by this project; make a release of it with `grace import` and `grace pack`"
        )
    return pack_codes(stored.codes, packing.bits), scales


def _check(files: WeightFiles, name: str, size: tuple[int, int], packing: Packing) -> None:
    words, scales, shape = packing.form.parts(f"{name}.weight")
    expected = {
        words: (torch.int32, (size[0], -(-size[1] * packing.bits // 32))),
        scales: (SCALE_DTYPE, (size[0], size[1] / packing.group_size)),
        shape: (torch.int64, (2,)),
    }
    for part, header in expected.items():
        if files.headers[part] != header:
            found = files.headers[part]
            raise GraceError(
                f"{files.folder}: {part} is {found[0]} {found[1]}, expected {header[0]} "
                f"{header[1]} for {size[1]} inputs and {size[0]} outputs"
            )


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


def describe(checkpoint: CheckpointFolder) -> str:
    """For people: family and weights, as in "qwen3_vl, W4G128"."""
    packing = packing_of(checkpoint)
    if packing is None:
        return f"{checkpoint.config['model_type']}, dense"
    awq = " as AWQ" if packing.form is AWQ else ""
    return f"{checkpoint.config['model_type']}, W{packing.bits}G{packing.group_size}{awq}"
