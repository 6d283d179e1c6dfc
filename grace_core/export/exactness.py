"""The gate before publishing: a release must be the trained model, bit for bit.

Two independent comparisons. On disk: the codes unpacked from the release equal those that the
trained weights and scales give, scales and all other tensors are equal, exactly the trained layers
are packed, and ``config.json`` says how; tokenizer, chat template, processor and generation
settings are the same bytes, and no other file is there. In use: the release's own tokenizer and
processor make the inputs that the trained model's make, and its bf16 logits on them are
``torch.equal`` to those of the fake-quantized model. The release is loaded with plain
``from_pretrained`` where that runs on any machine, else (AWQ) from codes and scales as read.

Both models come from ``from_pretrained``, in which RoPE frequencies stay fp32; casting a model with
``.to(bfloat16)`` rounds them too and would show false differences.
"""

from __future__ import annotations

import filecmp
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from grace_core.errors import GraceError
from grace_core.export.checkpoint import (
    INDEX_FILE,
    WeightFiles,
    companions,
    model_names,
    read_config,
    skeleton,
    weight_files,
)
from grace_core.export.compressed import COMPRESSED
from grace_core.export.dense import load_dense
from grace_core.export.formats import PackedForm, PackedLayer
from grace_core.export.gate_batches import gate_batches
from grace_core.export.release import packed_layers
from grace_core.quantization.checkpoint import TrainedScales, is_quantized, load_scales
from grace_core.quantization.convert import convert_with_scales

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
    *,
    form: PackedForm = COMPRESSED,
    device: torch.device | str = "cpu",
) -> ExactnessReport:
    """Prove that ``release`` computes what was trained in ``source``.

    Args:
        source: the trained checkpoint; with scales (QAT) or without (BF16).
        release: what the export made of it.
        form: in which a quantized model is released.
        device: where the logits are computed; one model at a time is held there.

    Raises:
        GraceError: names the first differences.
    """
    trained = load_scales(source) if is_quantized(source) else None
    counts = _Counts()
    _refuse(release, list(_differences(source, release, trained, form, counts)))

    batches = gate_batches(release)
    _refuse(release, list(_input_differences(gate_batches(source), batches)))
    expected = logits_of(_load_trained(source, trained, device), batches, device)
    actual = logits_of(_load_release(release, trained, form), batches, device)
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
    source: Path,
    release: Path,
    trained: TrainedScales | None,
    form: PackedForm,
    counts: _Counts,
) -> Iterator[str]:
    ours, theirs = weight_files(source), weight_files(release)
    layers: Mapping[str, PackedLayer] = {}
    model = skeleton(source)
    if trained is not None:
        layers = packed_layers(ours, model_names(model, ours.names), trained)
    yield from _file_differences(source, release, ours)
    yield from _config_differences(source, release, model, trained, form)
    unseen = set(theirs.names)
    for name in ours.names:
        if name in layers:
            parts = set(form.parts(name))
            if not parts <= unseen:
                yield f"{name}: not packed, {', '.join(sorted(parts - unseen))} missing"
            else:
                counts.layers += 1
                counts.codes += layers[name].out_features * layers[name].in_features
                yield from _packed_differences(layers[name], form, theirs)
            unseen -= parts
        elif name not in unseen:
            yield f"{name}: missing"
        else:
            counts.tensors += 1
            yield from _tensor_difference(name, ours.read(name), theirs.read(name))
            unseen.discard(name)
    yield from (f"{name}: not in the trained model" for name in sorted(unseen))


def _file_differences(source: Path, release: Path, weights: WeightFiles) -> Iterator[str]:
    """What is read beside the weights must be the trained model's to the byte, and all there is."""
    same = companions(source)
    expected = {"config.json", *weights.files, *same}
    if (source / INDEX_FILE).is_file():
        expected.add(INDEX_FILE)
    present = {p.relative_to(release).as_posix() for p in release.rglob("*") if not p.is_dir()}
    yield from (f"{name}: missing" for name in sorted(expected - present))
    yield from (f"{name}: no file of a release" for name in sorted(present - expected))
    for name in same:
        if name in present and not filecmp.cmp(source / name, release / name, shallow=False):
            yield f"{name}: not the trained model's"


def _config_differences(
    source: Path,
    release: Path,
    model: Any,
    trained: TrainedScales | None,
    form: PackedForm,
) -> Iterator[str]:
    """config.json must be the trained one and, where packed, say so as the form does."""
    expected = read_config(source)
    if trained is not None:
        expected["quantization_config"] = form.quantization_config(
            model, trained.scales, trained.bits, trained.group_size
        )
    file = release / "config.json"
    try:
        actual = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        yield f"config.json: {type(error).__name__}: {error}"
        return
    yield from _json_differences("config.json", expected, actual)


def _json_differences(where: str, expected: Any, actual: Any) -> Iterator[str]:
    if isinstance(expected, dict) and isinstance(actual, dict):
        for key in sorted(expected.keys() | actual.keys()):
            if key not in actual:
                yield f"{where}: {key} is missing"
            elif key not in expected:
                yield f"{where}: {key} is not the trained model's"
            else:
                yield from _json_differences(f"{where}: {key}", expected[key], actual[key])
    elif expected != actual:
        yield f"{where} is {json.dumps(actual)}, not {json.dumps(expected)}"


def _packed_differences(
    layer: PackedLayer, form: PackedForm, release: WeightFiles
) -> Iterator[str]:
    words, *others = form.tensors(layer)
    for tensor in others:
        yield from _tensor_difference(tensor.name, tensor.make(), release.read(tensor.name))
    dtype, shape = release.headers[words.name]
    if (dtype, shape) != (words.dtype, words.shape):
        yield f"{words.name}: {dtype} {shape} cannot hold the codes"
        return
    released = form.codes(release.read(words.name), layer.bits, layer.in_features)
    yield from _tensor_difference(f"{layer.name} codes", layer.codes(), released)


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


def _load_release(release: Path, trained: TrainedScales | None, form: PackedForm) -> Any:
    if trained is not None and form is not COMPRESSED:
        return load_dense(release, form, bits=trained.bits, group_size=trained.group_size)
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


def _input_differences(
    expected: Sequence[Mapping[str, Tensor]], actual: Sequence[Mapping[str, Tensor]]
) -> Iterator[str]:
    for number, (ours, theirs) in enumerate(zip(expected, actual, strict=True)):
        for name in sorted(ours.keys() | theirs.keys()):
            if name not in ours or name not in theirs or not torch.equal(ours[name], theirs[name]):
                yield f"batch {number}: its own tokenizer and processor make another {name}"


@torch.no_grad()
def logits_of(
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
