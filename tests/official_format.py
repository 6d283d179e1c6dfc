"""Checkpoints as the published GRACE code leaves them, made here without any code of ours.

Scales are not rounded, the weights on disk are code * scale in bf16, and the sidecar holds them
again beside the logarithms of the scales, all groups in one row.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny_models import FAMILIES, save_tiny

GROUP = 128
PROJECTION = re.compile(
    r"(?!.*(visual|vision)).*layers\.\d+\..*(q|k|v|o|gate|up|down)_proj\.weight"
)


@dataclass(frozen=True)
class Published:
    """A checkpoint and what went into it, by the weight's name on disk.

    Attributes:
        codes: (O, I) int64.
        scales: (O, I / 128) float64, exp of what the file holds.
    """

    folder: Path
    codes: dict[str, np.ndarray]
    scales: dict[str, np.ndarray]


def publish_with_sidecar(folder: Path, family: str, bits: int, *, layers: int = 1) -> Published:
    save_tiny(FAMILIES[family](seed=3, layers=layers), folder)
    tensors = load_file(folder / "model.safetensors")
    random = np.random.default_rng(bits)
    high = 2 ** (bits - 1) - 1
    sidecar: dict[str, Tensor] = {}
    codes, scales = {}, {}
    for name in [name for name in tensors if PROJECTION.fullmatch(name)]:
        weight = tensors[name].double().numpy()
        outputs, inputs = weight.shape
        groups = weight.reshape(outputs, inputs // GROUP, GROUP)
        start = np.abs(groups).max(axis=2) / high * random.uniform(0.7, 1.0, groups.shape[:2])
        log_scale = torch.from_numpy(np.log(start)).float()
        scale = np.exp(log_scale.double().numpy())
        code = np.clip(np.rint(groups / scale[:, :, None]), -high - 1, high)
        on_grid = torch.from_numpy(code * scale[:, :, None]).reshape(outputs, inputs).bfloat16()
        module = name.removesuffix(".weight")
        sidecar[f"{module}.weight"] = on_grid
        if f"{module}.bias" in tensors:
            sidecar[f"{module}.bias"] = tensors[f"{module}.bias"]
        sidecar[f"{module}.log_scale"] = log_scale.flatten()
        tensors[name] = on_grid.clone()
        codes[name], scales[name] = code.reshape(outputs, inputs).astype(np.int64), scale
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    torch.save(sidecar, folder / "qat_quantized_weights.bin")
    return Published(folder, codes, scales)


def publish_packed(source: Published, folder: Path) -> Published:
    """The same model as the published deployment build stores it; scales become fp16."""
    folder.mkdir()
    for file in source.folder.iterdir():
        if file.suffix not in (".bin", ".safetensors"):
            (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source.folder / "model.safetensors")
    scales = {}
    for name, code in source.codes.items():
        module = name.removesuffix(".weight")
        del tensors[name]
        outputs, inputs = code.shape
        words = np.zeros((inputs, outputs // 8), dtype=np.uint32)
        for column in range(outputs // 8):
            for nibble, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                stored = (code[8 * column + output] + 8).astype(np.uint32)
                words[:, column] |= stored << np.uint32(4 * nibble)
        half = source.scales[name].T.astype(np.float16)
        tensors[f"{module}.qweight"] = torch.from_numpy(words.view(np.int32).copy())
        zeros = np.full((inputs // GROUP, outputs // 8), 0x88888888, dtype=np.uint32)
        tensors[f"{module}.qzeros"] = torch.from_numpy(zeros.view(np.int32).copy())
        tensors[f"{module}.scales"] = torch.from_numpy(half.copy())
        if f"{module}.bias" in tensors:
            tensors[f"{module}.bias"] = tensors[f"{module}.bias"].half()
        scales[name] = half.T.astype(np.float64)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    listed = {"bits": 4, "group_size": GROUP, "modules": []}
    listed["modules"] = sorted(name.removesuffix(".weight") for name in source.codes)
    (folder / "awq_quantized_modules.json").write_text(json.dumps(listed))
    config = json.loads((folder / "config.json").read_text())
    packing = {"bits": 4, "group_size": GROUP, "zero_point": 8, "version": "gemm"}
    (folder / "config.json").write_text(json.dumps(config | {"awq_packing": packing}))
    return Published(folder, source.codes, scales)


LLAVA_NAMES = (
    (r"language_model\.model\.", "model."),
    (r"language_model\.lm_head\.", "lm_head."),
    (r"multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
    (r"multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
    (r"vision_tower\.(vision_model\.)?", "model.vision_tower.vision_tower.vision_model."),
)
"""From transformers' names to those of the original LLaVA code, as read in a published index."""


def publish_in_original_layout(
    source: Published, folder: Path, *, rows: int, tower: bool = True
) -> Path:
    """The same LLaVA as the original code saves it.

    rows: of the vocabulary; tower: whether the vision tower is among the weights.
    """
    folder.mkdir()

    def original(name: str) -> str:
        for pattern, new in LLAVA_NAMES:
            if re.match(pattern, name):
                return re.sub(f"^{pattern}", new, name)
        raise AssertionError(name)

    tensors = {}
    for name, tensor in load_file(source.folder / "model.safetensors").items():
        if tower or not name.startswith("vision_tower."):
            short = tensor[:rows].clone() if "embed_tokens" in name or "lm_head" in name else tensor
            tensors[original(name)] = short
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    sidecar = torch.load(source.folder / "qat_quantized_weights.bin", weights_only=True)
    renamed = {original(f"{name}."): tensor for name, tensor in sidecar.items()}
    torch.save(
        {name.removesuffix("."): tensor for name, tensor in renamed.items()},
        folder / "qat_quantized_weights.bin",
    )
    config = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "hidden_size": 128,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "vocab_size": rows,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def rounded_to_bf16(values: np.ndarray) -> np.ndarray:
    """To the nearest numbers of eight significant binary digits, ties to even."""
    mantissas, exponents = np.frexp(values)
    return np.ldexp(np.rint(np.ldexp(mantissas, 8)), exponents - 8)
