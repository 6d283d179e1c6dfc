"""Model surgery: which layers are quantized, and their replacement in place.

Quantized are the attention and MLP projections of the language decoder only. The vision tower, the
merger or projector, embeddings, ``lm_head`` and norms stay bf16 (GRACE, section 3.4). Layers are
chosen by their place under the decoder, not by their own name alone: CLIP's vision tower in
LLaVA-1.5 also has ``self_attn.q_proj``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from grace_core.errors import GraceError
from grace_core.models.families import PROJECTIONS
from grace_core.quantization.linear import QuantizedLinear
from grace_core.quantization.lsq import initial_scale
from grace_core.quantization.scales import ScaleBank


def quantizable_linears(model: nn.Module, decoder_prefix: str) -> dict[str, nn.Linear]:
    """The decoder's projections by full module name, in model order.

    Args:
        decoder_prefix: name of the language decoder, whose ``layers`` hold the projections, for
            example ``model.language_model``.

    Raises:
        GraceError: nothing matches.
    """
    projections = "|".join(re.escape(name) for name in PROJECTIONS)
    pattern = re.compile(rf"{re.escape(decoder_prefix)}\.layers\.\d+\.(?:{projections})")
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and pattern.fullmatch(name)
    }
    if not linears:
        lists = [
            name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)
        ]
        raise GraceError(
            f"No layer to quantize: {type(model).__name__} has no "
            f"{decoder_prefix}.layers.<number>.{{{', '.join(PROJECTIONS)}}}. Name the language "
            f"decoder; this model's lists of layers are: {', '.join(lists) or 'none'}."
        )
    return linears


def check_group_size(linears: Mapping[str, nn.Linear], group_size: int) -> None:
    """Require that ``group_size`` divides the input features of every layer.

    Raises:
        GraceError: lists every layer that does not fit, with its sizes.
    """
    bad = {name: layer for name, layer in linears.items() if layer.in_features % group_size}
    if not bad:
        return
    lines = [
        f"  - {name}: {layer.in_features} -> {layer.out_features}, "
        f"{layer.in_features} = {layer.in_features // group_size} x {group_size} "
        f"+ {layer.in_features % group_size}"
        for name, layer in bad.items()
    ]
    raise GraceError(
        f"Group size {group_size} does not divide the input features of {len(bad)} of "
        f"{len(linears)} layers. Choose a group size that divides them all, or a model whose "
        f"hidden and intermediate sizes are multiples of {group_size}:\n" + "\n".join(lines)
    )


def convert(model: nn.Module, *, decoder_prefix: str, bits: int, group_size: int) -> ScaleBank:
    """Replace the decoder's projections by quantized ones with freshly initialised scales.

    The weight parameters stay the very same objects. Scales are computed on each weight's device;
    the weights must be whole (convert before the model is sharded).

    Returns:
        The bank that owns the scales; the caller trains and saves it beside the model.

    Raises:
        GraceError: nothing matches, or the group size does not fit some layers.
    """
    linears = quantizable_linears(model, decoder_prefix)
    check_group_size(linears, group_size)
    thetas = {}
    for name, linear in linears.items():
        assert not isinstance(linear, QuantizedLinear), f"{name} is already quantized"
        assert linear.weight.shape == (linear.out_features, linear.in_features), (
            f"{name}: the weight is sharded; convert the model first"
        )
        thetas[name] = torch.log(initial_scale(linear.weight, group_size, bits))
    return _swap(model, linears, ScaleBank(thetas), bits=bits, group_size=group_size)


def convert_with_scales(
    model: nn.Module, scales: Mapping[str, Tensor], *, bits: int, group_size: int
) -> ScaleBank:
    """Replace exactly the layers named in ``scales`` by quantized ones with these log-scales.

    Args:
        scales: theta, (O, I / group_size) fp32, by layer name, as a trained checkpoint holds them.

    Raises:
        GraceError: a name is no linear layer of the model, or a shape does not fit; all are listed.
    """
    modules = dict(model.named_modules())
    linears: dict[str, nn.Linear] = {}
    problems = []
    for name, theta in scales.items():
        layer = modules.get(name)
        if not isinstance(layer, nn.Linear):
            problems.append(f"{name}: the model has no such linear layer")
        elif theta.shape != (layer.out_features, layer.in_features / group_size):
            problems.append(
                f"{name}: scales of shape {tuple(theta.shape)} do not fit "
                f"{layer.in_features} -> {layer.out_features} at group size {group_size}"
            )
        else:
            linears[name] = layer
    if problems:
        raise GraceError(
            "These scales belong to another model or group size:\n"
            + "\n".join(f"  - {problem}" for problem in problems)
        )
    device = next(iter(linears.values())).weight.device
    bank = ScaleBank({name: theta.to(device) for name, theta in scales.items()})
    return _swap(model, linears, bank, bits=bits, group_size=group_size)


def _swap(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    bank: ScaleBank,
    *,
    bits: int,
    group_size: int,
) -> ScaleBank:
    for name, linear in linears.items():
        layer = QuantizedLinear(linear, bank.layer(name), bits=bits, group_size=group_size)
        model.set_submodule(name, layer)
    return bank
