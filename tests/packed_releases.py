"""Tiny releases with packed weights, and the same weights multiplied out."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText

from grace_core.export.compressed import COMPRESSED
from grace_core.export.formats import PackedForm
from grace_core.export.release import export_packed
from grace_core.quantization.checkpoint import save_scales
from grace_core.quantization.convert import convert
from tests.tiny_models import DECODER, FAMILIES, save_tiny


def packed_release(
    folder: Path,
    family: str,
    bits: int,
    *,
    group_size: int = 128,
    form: PackedForm = COMPRESSED,
) -> Path:
    """A release as `grace release` leaves it, of two decoder layers."""
    source = folder / "trained"
    save_tiny(FAMILIES[family](seed=bits, layers=2), source)
    latent = AutoModelForImageTextToText.from_pretrained(source)
    bank = convert(latent, decoder_prefix=DECODER, bits=bits, group_size=group_size)
    save_scales(source, bank, bits=bits, group_size=group_size)
    export_packed(source, folder / "release", form)
    return folder / "release"


def random_codes(outputs: int, inputs: int, bits: int, *, seed: int = 0) -> torch.Tensor:
    """int8 codes, the extreme ones included."""
    generator = torch.Generator().manual_seed(seed)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    codes = torch.randint(low, high + 1, (outputs, inputs), generator=generator)
    codes[0, :2] = torch.tensor([low, high])
    return codes.to(torch.int8)


def random_scales(outputs: int, groups: int, *, seed: int = 0) -> torch.Tensor:
    """bf16, of different sizes."""
    generator = torch.Generator().manual_seed(seed + 1)
    return (torch.rand(outputs, groups, generator=generator) * 0.1 + 1e-3).bfloat16()


def multiplied_out(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """code * scale in float64, exact."""
    group_size = codes.shape[1] // scales.shape[1]
    return codes.double() * scales.double().repeat_interleave(group_size, dim=1)
