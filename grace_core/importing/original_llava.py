"""A LLaVA-1.5 checkpoint of the original LLaVA code, in the layout that transformers has for it.

The original (https://github.com/haotian-liu/LLaVA) names tensors after its own classes, has no
token for a picture, and may leave out the frozen vision tower. A transformers checkpoint of the
same model, the base, has all that. So its names, configuration, tokenizer and processor are taken,
and every tensor that the original has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grace_core.errors import GraceError
from grace_core.export.checkpoint import WeightFiles, model_names, weight_files
from grace_core.importing.sidecar import SIDECAR, SidecarLayer, read_sidecar

_PREFIXES = (
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.vision_tower.vision_tower.", "vision_tower."),
    ("model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
"""Of the original's names, and of those that transformers gave at first; the first match counts."""

_TOWER = "model.vision_tower."
_COMPUTED = ("position_ids", "rotary_emb.inv_freq")
"""Ends of names that older versions stored although they follow from the configuration."""

_VOCABULARY = ("embed_tokens.weight", "lm_head.weight")
_SAME = {
    "mm_vision_select_layer": "vision_feature_layer",
    "mm_vision_select_feature": "vision_feature_select_strategy",
}
"""Settings of the original, and what the base calls them."""

_SAME_WORDS = {"patch": "default", "cls_patch": "full"}
"""Values of theirs, and what the base calls them."""


def is_original_llava(folder: Path) -> bool:
    """Whether a directory's configuration is of the original code's classes."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # whoever reads the checkpoint says what is wrong with it
    named = [config.get("model_type"), *(config.get("architectures") or [])]
    return "mm_vision_tower" in config or not {"llava_llama", "LlavaLlamaForCausalLM"}.isdisjoint(
        named
    )


@dataclass(frozen=True)
class OriginalLlava(WeightFiles):
    """The base's files and names, whose tensors come from the original where it has them."""

    own: WeightFiles
    base: WeightFiles
    sources: Mapping[str, str]
    """Name in the base -> name in the original."""

    def read(self, name: str) -> Tensor:
        """See `WeightFiles.read`. Rows of the vocabulary that only the base has come after."""
        if name not in self.sources:
            return self.base.read(name)
        tensor = self.own.read(self.sources[name])
        rows = self.headers[name][1][0]
        if tensor.shape[0] < rows:
            more = self.base.read(name)[tensor.shape[0] :]
            tensor = torch.cat([tensor, more.to(tensor.dtype)])
        return tensor


def open_original(
    folder: Path, base: Path, model: Any
) -> tuple[OriginalLlava, dict[str, SidecarLayer]]:
    """The original's tensors under the base's names, and its quantized modules likewise.

    Args:
        model: skeleton of the base, which says how transformers renames tensors.

    Raises:
        GraceError: something in the original has no place in the base or the other way round, or
            a setting differs that the weights were trained with.
    """
    if not (folder / SIDECAR).is_file():
        raise GraceError(f"{folder}: no {SIDECAR}; of the original LLaVA layout only that is read")
    _compare_settings(folder, base)
    own, of_base = _safetensors(folder), weight_files(base)
    inside = {_renamed(name): name for name in own.names if not name.endswith(_COMPUTED)}
    by_module = {renamed: inside[name] for name, renamed in model_names(model, inside).items()}
    names = model_names(model, of_base.names)
    sources = {name: by_module[module] for name, module in names.items() if module in by_module}
    _refuse_strangers(folder, base, set(inside.values()) - set(sources.values()))
    absent = [name for name in of_base.names if name not in sources]
    brings_tower = any(name.startswith(_TOWER) for name in own.names)
    lacking = [
        name for name in absent if brings_tower or not names[name].startswith("model.vision_tower.")
    ]
    if lacking:
        raise GraceError(f"{folder}: {len(lacking)} tensors are missing, first {lacking[0]}")
    headers = {}
    for name, (dtype, shape) in of_base.headers.items():
        if name in sources:
            dtype, found = own.headers[sources[name]]
            longer = name.endswith(_VOCABULARY) and found[1:] == shape[1:] and found[0] <= shape[0]
            if found != shape and not longer:
                raise GraceError(
                    f"{folder}: {sources[name]} has shape {found}, in {base} {shape}; the two are "
                    "different models"
                )
        headers[name] = (dtype, shape)
    layers = {_renamed(module): layer for module, layer in read_sidecar(folder / SIDECAR).items()}
    return OriginalLlava(folder, of_base.files, headers, own, of_base, sources), layers


def _renamed(name: str) -> str:
    for original, ours in _PREFIXES:
        if name.startswith(original):
            return ours + name.removeprefix(original)
    return name


def _refuse_strangers(folder: Path, base: Path, strangers: set[str]) -> None:
    if strangers:
        raise GraceError(
            f"{folder}: {len(strangers)} tensors have no place in {base}, first {min(strangers)}; "
            "the base must be a transformers checkpoint of the same model"
        )


def _safetensors(folder: Path) -> WeightFiles:
    if not list(folder.glob("*.safetensors")) and list(folder.glob("pytorch_model*.bin")):
        raise GraceError(
            f"{folder}: its weights are pickled (pytorch_model*.bin), which is not read. Save them "
            "as model.safetensors first, where you trust the file"
        )
    return weight_files(folder)


def _compare_settings(folder: Path, base: Path) -> None:
    """What the original's weights were trained with must be what the base computes."""
    theirs = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    ours = json.loads((base / "config.json").read_text(encoding="utf-8"))
    projector = theirs.get("mm_projector_type", "mlp2x_gelu")
    if projector != "mlp2x_gelu":
        raise GraceError(f"{folder}: mm_projector_type {projector!r} is not LLaVA-1.5's mlp2x_gelu")
    for name, of_base in _SAME.items():
        if name not in theirs or of_base not in ours:
            continue
        if _SAME_WORDS.get(theirs[name], theirs[name]) != ours[of_base]:
            raise GraceError(
                f"{folder}: {name} is {theirs[name]!r}, but {of_base} of {base} is "
                f"{ours[of_base]!r}; give the transformers checkpoint of the same model"
            )
