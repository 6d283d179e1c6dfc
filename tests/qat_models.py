"""Tiny checkpoints as quantization-aware training leaves them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from grace_core.quantization.checkpoint import save_scales
from grace_core.quantization.convert import convert
from tests.tiny_models import DECODER, FAMILIES, image_batch, save_tiny, text_batch


def trained(folder: Path, family: str, bits: int, *, layers: int = 2) -> Path:
    """A checkpoint as QAT leaves it: latent weights and scales that moved away from their start."""
    model = FAMILIES[family](seed=bits, layers=layers)
    save_tiny(model, folder)
    latent = AutoModelForImageTextToText.from_pretrained(folder)
    bank = convert(latent, decoder_prefix=DECODER, bits=bits, group_size=128)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        bank.flat.add_(torch.randn(bank.flat.shape, generator=generator) * 0.2)
    save_scales(folder, bank, bits=bits, group_size=128)
    # What a stage directory holds besides; none of it belongs to a release.
    (folder / "manifest.json").write_text("{}")
    (folder / "optimizer.pt").write_bytes(b"not to be read")
    return folder


def forward_batches(family: str) -> list[dict[str, Tensor]]:
    model = FAMILIES[family](layers=1)
    """Text alone, a picture, and a picture of another size."""
    return [text_batch(model), image_batch(model), image_batch(model, side=64)]
