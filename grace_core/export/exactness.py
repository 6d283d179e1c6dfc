"""The gate before publishing: a release must be the trained model, bit for bit.

Two independent comparisons. On disk: the codes unpacked from the release equal those that the
trained weights and scales give, scales and all other tensors are equal, and exactly the trained
layers are packed. In use: the bf16 logits of the release, loaded with plain ``from_pretrained``,
are ``torch.equal`` to those of the fake-quantized model on given batches.

Both models come from ``from_pretrained``, in which RoPE frequencies stay fp32; casting a model with
``.to(bfloat16)`` rounds them too and would show false differences.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from grace_core.errors import GraceError
from grace_core.export.checkpoint import WeightFiles, model_names, skeleton, weight_files
from grace_core.export.compressed import quantized_tensors
from grace_core.quantization.checkpoint import TrainedScales, is_quantized, load_scales
from grace_core.quantization.convert import convert_with_scales
from grace_core.quantization.lsq import quantize, stored_scale
from grace_core.quantization.packing import unpack_codes

SHOWN = 8
"""Differences that an error names before it only counts the rest."""


@dataclass(frozen=True)
class ExactnessReport:
    """What was compared and found equal.

    Attributes:
        layers: packed layers, 0 for a BF16 release.
        codes: integer codes in them.
        tensors: tensors compared as they are.
        batches: batches whose logits were compared.
        image_batches: those among them with pictures.
        positions: rows of logits compared, over all batches.
    """

    layers: int
    codes: int
    tensors: int
    batches: int
    image_batches: int
    positions: int


@dataclass
class _Counts:
    layers: int = 0
    codes: int = 0
    tensors: int = 0


def check_release(
    source: Path,
    release: Path,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    device: torch.device | str = "cpu",
) -> ExactnessReport:
    """Prove that ``release`` computes what was trained in ``source``.

    Args:
        source: the trained checkpoint; with scales (QAT) or without (BF16).
        release: what the export made of it.
        batches: keyword arguments of the model's forward pass, at least one batch, better some
            with and some without pictures.
        device: where the logits are computed; one model at a time is held there.

    Raises:
        GraceError: names the first differences.
    """
    assert batches, "the gate needs at least one batch"
    trained = load_scales(source) if is_quantized(source) else None
    counts = _Counts()
    _refuse(release, list(_differences(source, release, trained, counts)))

    expected = _logits(_load_trained(source, trained, device), batches, device)
    actual = _logits(_load_release(release, trained), batches, device)
    _refuse(release, list(_logit_differences(expected, actual)))
    return ExactnessReport(
        layers=counts.layers,
        codes=counts.codes,
        tensors=counts.tensors,
        batches=len(batches),
        image_batches=sum("pixel_values" in batch for batch in batches),
        positions=sum(logits.shape[:-1].numel() for logits in expected),
    )


def _refuse(release: Path, differences: list[str]) -> None:
    if not differences:
        return
    shown = [f"  - {difference}" for difference in differences[:SHOWN]]
    if len(differences) > SHOWN:
        shown.append(f"  - and {len(differences) - SHOWN} more")
    raise GraceError(
        f"{release} is not the trained model; do not publish it. Delete it and export again.\n"
        + "\n".join(shown)
    )


def _differences(
    source: Path, release: Path, trained: TrainedScales | None, counts: _Counts
) -> Iterator[str]:
    ours, theirs = weight_files(source), weight_files(release)
    layer_of: Mapping[str, str] = {}
    if trained is not None:
        names = model_names(skeleton(source), ours.names)
        layer_of = quantized_tensors(names, trained.scales, source)
    unseen = set(theirs.names)
    for name, tensor in chain.from_iterable(map(ours.tensors, ours.files)):
        if name in layer_of:
            assert trained is not None
            parts = {f"{name}_packed", f"{name}_scale", f"{name}_shape"}
            if not parts <= unseen:
                yield f"{name}: not packed, {', '.join(sorted(parts - unseen))} missing"
            else:
                counts.layers += 1
                counts.codes += tensor.numel()
                yield from _packed_differences(name, tensor, layer_of[name], trained, theirs)
            unseen -= parts
        elif name not in unseen:
            yield f"{name}: missing"
        else:
            counts.tensors += 1
            yield from _tensor_difference(name, tensor, theirs.read(name))
            unseen.discard(name)
    yield from (f"{name}: not in the trained model" for name in sorted(unseen))


def _packed_differences(
    name: str, weight: Tensor, layer: str, trained: TrainedScales, release: WeightFiles
) -> Iterator[str]:
    scale = stored_scale(trained.scales[layer])
    shape = release.read(f"{name}_shape").tolist()
    if shape != list(weight.shape):
        yield f"{name}_shape: {shape}, trained {list(weight.shape)}"
        return
    yield from _tensor_difference(f"{name}_scale", scale, release.read(f"{name}_scale"))
    words = release.read(f"{name}_packed")
    codes = quantize(weight, scale, trained.bits, trained.group_size)
    width = -(-weight.shape[1] * trained.bits // 32)
    if words.dtype != torch.int32 or words.shape != (weight.shape[0], width):
        yield f"{name}_packed: {words.dtype} {tuple(words.shape)} cannot hold the codes"
        return
    released = unpack_codes(words, trained.bits, weight.shape[1])
    yield from _tensor_difference(f"{name} codes", codes, released)


def _tensor_difference(name: str, expected: Tensor, actual: Tensor) -> Iterator[str]:
    if expected.dtype != actual.dtype or expected.shape != actual.shape:
        yield (
            f"{name}: {actual.dtype} {tuple(actual.shape)}, "
            f"trained {expected.dtype} {tuple(expected.shape)}"
        )
    elif not torch.equal(expected, actual):
        where = (expected != actual).nonzero()
        first = tuple(where[0].tolist())
        yield (
            f"{name}: {len(where)} of {expected.numel()} values differ, first at {list(first)}: "
            f"{actual[first].item()}, trained {expected[first].item()}"
        )


def _load_trained(source: Path, trained: TrainedScales | None, device: torch.device | str) -> Any:
    model = AutoModelForImageTextToText.from_pretrained(source, trust_remote_code=False)
    model = model.to(device)  # first: the scales, no part of the model, go where its weights are
    if trained is not None:
        convert_with_scales(model, trained.scales, bits=trained.bits, group_size=trained.group_size)
    return model


def _load_release(release: Path, trained: TrainedScales | None) -> Any:
    model, info = AutoModelForImageTextToText.from_pretrained(
        release, trust_remote_code=False, output_loading_info=True
    )
    problems = [
        f"{name}: {kind.removesuffix('_keys')} on loading"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        for name in sorted(map(str, info[kind]))
    ]
    loaded = {name for name, module in model.named_modules() if _is_compressed(module)}
    expected = set() if trained is None else set(trained.scales)
    problems += [f"{name}: loaded as quantized" for name in sorted(loaded - expected)]
    problems += [f"{name}: not loaded as quantized" for name in sorted(expected - loaded)]
    _refuse(release, problems)
    return model


def _is_compressed(module: torch.nn.Module) -> bool:
    # compressed-tensors marks a module it has taken over by this attribute.
    return getattr(module, "quantization_scheme", None) is not None


@torch.no_grad()
def _logits(
    model: Any, batches: Sequence[Mapping[str, Tensor]], device: torch.device | str
) -> list[Tensor]:
    """Logits of each batch on the CPU. Always the top-level forward: it unpacks a release."""
    model.to(device).eval()
    return [
        model(**{name: value.to(device) for name, value in batch.items()}, use_cache=False)
        .logits.detach()
        .cpu()
        for batch in batches
    ]


def _logit_differences(expected: list[Tensor], actual: list[Tensor]) -> Iterator[str]:
    for number, (ours, theirs) in enumerate(zip(expected, actual, strict=True)):
        if not torch.isfinite(ours).all():
            yield f"batch {number}: the trained model's logits are not finite"
        elif ours.dtype != theirs.dtype or ours.shape != theirs.shape:
            yield f"batch {number}: logits {theirs.dtype} {tuple(theirs.shape)}, not {ours.dtype}"
        elif not torch.equal(ours, theirs):
            gap = (ours.float() - theirs.float()).abs()
            differing = int((gap > 0).sum())
            yield (
                f"batch {number}: {differing} of {gap.numel()} logits differ, by up to "
                f"{gap.max().item():.3g}"
            )
