"""What differs between the model families: where their parts are.

A family is data, not a class hierarchy: adding one means adding an entry to `FAMILIES` and, where
its pictures or positions follow a new rule, a branch in `visual_inputs`. No torch is
loaded here, so that a checkpoint's headers can be judged before anything heavy is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from grace_core.errors import GraceError

if TYPE_CHECKING:
    from torch import nn

PROJECTIONS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
"""Linear layers of a decoder layer, of every family; these are quantized."""


@dataclass(frozen=True)
class Family:
    """Where a family keeps its parts; names are those of `named_modules` of the full model."""

    model_type: str
    """`config.model_type` of the checkpoint."""

    decoder: str
    """Module of the language decoder, whose `layers` are the decoder layers."""

    vision: str
    """Module of the vision tower, frozen in GRACE."""

    connectors: tuple[str, ...]
    """Modules between vision tower and decoder that are trained, even inside `vision`."""

    positions: Literal["multimodal", "plain"]
    """multimodal: M-RoPE positions from the pictures' grids; plain: 0, 1, 2, ..."""

    head_norms: bool = False
    """Whether the decoder normalises queries and keys."""


FAMILIES = {
    family.model_type: family
    for family in (
        # The official recipe trains `merger` and leaves Qwen3-VL's deepstack mergers frozen.
        Family(
            "qwen3_vl",
            "model.language_model",
            "model.visual",
            ("model.visual.merger",),
            "multimodal",
            head_norms=True,
        ),
        Family(
            "qwen2_vl",
            "model.language_model",
            "model.visual",
            ("model.visual.merger",),
            "multimodal",
        ),
        Family(
            "llava",
            "model.language_model",
            "model.vision_tower",
            ("model.multi_modal_projector",),
            "plain",
        ),
    )
}


def family_of(model_type: str) -> Family:
    """The family of a checkpoint; raises GraceError for one that is not supported."""
    try:
        return FAMILIES[model_type]
    except KeyError:
        raise GraceError(
            f"model_type {model_type!r} is not supported; supported families: "
            f"{', '.join(sorted(FAMILIES))}"
        ) from None


def decoder_layers(model: nn.Module, family: Family) -> nn.ModuleList:
    """The decoder layers, first to last."""
    from torch import nn

    layers = model.get_submodule(family.decoder).layers
    assert isinstance(layers, nn.ModuleList)
    return layers


def set_trainable(model: nn.Module, family: Family, what: Literal["language", "all"]) -> None:
    """Set `requires_grad` of every parameter.

    language: decoder, embeddings, head and connectors are trained, the vision tower is frozen (the
    paper's setting). all: everything is trained.
    """
    for name, parameter in model.named_parameters():
        frozen = name.startswith(family.vision + ".") and not name.startswith(
            tuple(connector + "." for connector in family.connectors)
        )
        parameter.requires_grad_(what == "all" or not frozen)
