"""Quantized checkpoints as others publish them: their layers by code and scale.

Read are the official sidecar (:mod:`~grace_core.importing.sidecar`), the official packed form
(AWQ's tensors, listed in `awq_quantized_modules.json`), and this project's packed releases.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from grace_core.errors import GraceError
from grace_core.export.awq import AWQ
from grace_core.export.checkpoint import WeightFiles, model_names, weight_files
from grace_core.export.compressed import COMPRESSED
from grace_core.export.formats import PackedForm
from grace_core.importing.sidecar import SIDECAR, SidecarLayer, read_sidecar
from grace_core.quantization.lsq import MIN_SCALE, SCALE_DTYPE, code_range, dequantize, grouped

PACKED_LIST = "awq_quantized_modules.json"
GRID_TOLERANCE = 2.0**-8
"""Relative rounding of a weight that was stored in bf16, and as much again for its scale's exp."""


@dataclass(frozen=True)
class SourceLayer:
    """One quantized layer.

    Attributes:
        codes: (O, I) int8.
        scale: as in the source, (O, I / group_size) fp64.
        theta: its logarithm, fp32, that the quantizer starts from.
        weight: what the source multiplies with, (O, I) bf16.
    """

    codes: Tensor
    scale: Tensor
    theta: Tensor
    weight: Tensor


class Source(Protocol):
    """A quantized checkpoint. Names are those of tensors on disk and end in `.weight`."""

    kind: str
    bits: int
    group_size: int
    files: WeightFiles
    weights: tuple[str, ...]
    """Of the quantized layers."""

    parts: frozenset[str]
    """Tensors on disk that stand for these weights."""

    def place(self, name: str) -> str:
        """The tensor on disk in whose file the weight belongs."""

    def facts(self) -> dict[str, int]:
        """What else is worth writing down of the source."""

    def layer(self, name: str) -> SourceLayer:
        """Raises GraceError where its values make no layer."""


def open_source(folder: Path, model: Any) -> Source:
    """Find out what a directory holds.

    Args:
        model: its skeleton, which says how transformers renames tensors.

    Raises:
        GraceError: it holds none of the forms, or one that is inconsistent.
    """
    files = weight_files(folder)
    if (folder / SIDECAR).is_file():
        return SidecarSource(files, model, read_sidecar(folder / SIDECAR))
    if (folder / PACKED_LIST).is_file():
        listed = _read_json(folder / PACKED_LIST)
        try:
            bits, group_size = int(listed["bits"]), int(listed["group_size"])
            modules = {str(name) for name in listed["modules"]}
        except (KeyError, TypeError, ValueError) as error:
            raise GraceError(
                f"{folder / PACKED_LIST}: holds no bits, group_size and modules; damaged"
            ) from error
        source = PackedSource(files, AWQ, bits, group_size, kind=PACKED_LIST)
        found = {name.removesuffix(".weight") for name in source.weights}
        if found != modules:
            raise GraceError(
                f"{folder}: {PACKED_LIST} and the weights disagree about {min(found ^ modules)}, "
                f"and {len(found ^ modules)} modules in all"
            )
        return source
    quantization = _read_json(folder / "config.json").get("quantization_config", {})
    try:
        if quantization.get("quant_method") == "awq":
            bits, group_size = int(quantization["bits"]), int(quantization["group_size"])
            return PackedSource(files, AWQ, bits, group_size, kind=AWQ.title)
        if quantization.get("format") == "pack-quantized":
            (group,) = quantization["config_groups"].values()
            bits, group_size = (int(group["weights"][key]) for key in ("num_bits", "group_size"))
            return PackedSource(files, COMPRESSED, bits, group_size, kind=COMPRESSED.title)
    except (KeyError, TypeError, ValueError) as error:
        raise GraceError(
            f"{folder}/config.json: quantization_config names no bits and one group size; only "
            "models with one quantizer for all layers are read"
        ) from error
    raise GraceError(
        f"{folder}: no quantized checkpoint that can be read: there is neither {SIDECAR} nor "
        f"{PACKED_LIST}, and config.json describes neither AWQ nor pack-quantized weights. An "
        "ordinary BF16 checkpoint needs no import: name it as models.student"
    )


class SidecarSource:
    """Weights on the grid beside a sidecar, which is what counts where they differ."""

    kind = SIDECAR

    def __init__(self, files: WeightFiles, model: Any, layers: Mapping[str, SidecarLayer]) -> None:
        self.files = files
        on_disk = {inside: outside for outside, inside in model_names(model, files.names).items()}
        inside = model_names(model, [f"{module}.weight" for module in layers])
        unknown = [name for name in inside.values() if name not in on_disk]
        if unknown:
            raise GraceError(
                f"{files.folder}: {SIDECAR} has {len(unknown)} modules that the weights beside it "
                f"lack, first {unknown[0]}; the two belong to different models"
            )
        self._layers = {on_disk[inside[f"{module}.weight"]]: layers[module] for module in layers}
        self.weights = tuple(self._layers)
        self.parts = frozenset(self.weights)
        sizes = sorted({layer.group_size for layer in layers.values()})
        if len(sizes) > 1:
            raise GraceError(
                f"{files.folder}: {SIDECAR} has groups of {', '.join(map(str, sizes))}; all layers "
                "must share one group size"
            )
        for name, layer in self._layers.items():
            if layer.weight.shape != files.headers[name][1]:
                raise GraceError(
                    f"{files.folder}: {name} has shape {files.headers[name][1]}, in {SIDECAR} "
                    f"{tuple(layer.weight.shape)}; the two belong to different models"
                )
        self.group_size = sizes[0]
        self.bits = self._width()

    def place(self, name: str) -> str:
        return name

    def layer(self, name: str) -> SourceLayer:
        stored = self._layers[name]
        codes = _grid_codes(f"{self.files.folder}/{SIDECAR}: {name}", stored)
        scale = stored.log_scale.double().exp()
        return SourceLayer(codes, scale, stored.log_scale, stored.weight.to(torch.bfloat16))

    def facts(self) -> dict[str, int]:
        """How many layers' weights on disk are the sidecar's; where they differ, that counts."""
        same = (
            torch.equal(self.files.read(name), layer.weight) for name, layer in self._layers.items()
        )
        return {"weights_equal_to_the_sidecar": sum(same)}

    def _width(self) -> int:
        """The sidecar does not say it; 8-bit codes leave the range of 4 bits in any layer."""
        low, high = code_range(4)
        for name in self.weights:
            codes = self.layer(name).codes
            if codes.min() < low or codes.max() > high:
                return 8
        return 4


class PackedSource:
    """Codes and scales as a packed form stores them."""

    def __init__(
        self, files: WeightFiles, form: PackedForm, bits: int, group_size: int, *, kind: str
    ) -> None:
        self.files, self.form, self.kind = files, form, kind
        self.bits, self.group_size = bits, group_size
        self.weights = tuple(form.weights(files.names))
        self.parts = frozenset(part for name in self.weights for part in form.parts(name))
        if bits not in form.widths or group_size < 1:
            raise GraceError(
                f"{files.folder}: {bits}-bit codes in groups of {group_size} are no {form.title}"
            )
        lacking = sorted(self.parts - set(files.names))
        if lacking or not self.weights:
            raise GraceError(
                f"{files.folder}: {lacking[0] if lacking else 'every packed weight'} is missing; "
                "no complete checkpoint"
            )

    def place(self, name: str) -> str:
        return self.form.parts(name)[0]

    def facts(self) -> dict[str, int]:
        return {}

    def layer(self, name: str) -> SourceLayer:
        stored = self.form.read(self.files, name, self.bits, self.group_size)
        if not (torch.isfinite(stored.scale) & (stored.scale >= 0)).all():
            raise GraceError(f"{self.files.folder}: scales of {name} are not all positive numbers")
        # Of bf16(scale), not of the scale: half-way between two bf16 numbers, as fp16 often is, the
        # logarithm's rounding would decide which of them is stored.
        theta = stored.scale.clamp(min=MIN_SCALE).to(SCALE_DTYPE).double().log().float()
        weight = dequantize(stored.codes, stored.scale, torch.bfloat16)
        return SourceLayer(stored.codes, stored.scale.double(), theta, weight)


def _grid_codes(what: str, layer: SidecarLayer) -> Tensor:
    """The codes of weights that lie on a grid, up to the rounding of their dtype."""
    ratio = grouped(layer.weight.float(), layer.group_size) / layer.log_scale.exp().unsqueeze(-1)
    codes = ratio.round()
    low, high = code_range(8)
    away = (ratio - codes).abs() > GRID_TOLERANCE * codes.abs()
    wrong = away | (codes < low) | (codes > high)
    if wrong.any():
        raise GraceError(
            f"{what}: {int(wrong.sum())} of {codes.numel()} weights are no multiples of their "
            "scales; the two do not belong together"
        )
    return codes.to(torch.int8).flatten(1)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GraceError(f"{file} cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(content, dict):
        raise GraceError(f"{file}: not a JSON object")
    return content
