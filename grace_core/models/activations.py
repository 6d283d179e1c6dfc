"""How much memory a decoder's activations take, worked out from its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from grace_core.models.families import Family

# d width, f width of the MLP, q and kv widths of all query heads and of all key-value heads


@dataclass(frozen=True)
class LayerActivations:
    """Bytes a token that one decoder layer keeps for the backward pass."""

    kept: int
    """When the layer is not recomputed."""

    recomputed: int
    """When it is: its input."""


def layer_activations(
    text_config: Any, family: Family, *, fused: bool, element_bytes: int = 2
) -> LayerActivations:
    """What a decoder layer keeps, by counting the tensors that its operations save.

    Args:
        text_config: of the decoder.
        fused: whether `fused_forward` computes it; else the library's own forward pass, which
            keeps more, much of it in fp32.
        element_bytes: of weights and states.
    """
    d, f = text_config.hidden_size, text_config.intermediate_size
    heads, kv_heads = text_config.num_attention_heads, text_config.num_key_value_heads
    width = getattr(text_config, "head_dim", None) or d // heads
    q, kv = heads * width, kv_heads * width
    # Outputs of both norms, queries, keys, values and what attention makes of them, gate, up and
    # their product: inputs of projections or of attention's backward pass.
    elements = 2 * d + (q + 2 * kv) + q + 3 * f
    kept = elements * element_bytes + 4 * heads  # and attention's log-sum-exp, fp32
    normed, scales = (2 * d + q + kv, 2 + heads + kv_heads) if family.head_norms else (2 * d, 2)
    if fused:
        kept += normed * element_bytes + 4 * scales  # each norm's input and fp32 scale
    else:
        # The input in fp32, the normalised input and the scale; silu's output and each sample's
        # output of attention besides.
        kept += normed * (4 + element_bytes) + 4 * scales + (f + q) * element_bytes
    return LayerActivations(kept=kept, recomputed=d * element_bytes)


def layers_to_recompute(
    layers: int, tokens: int, each: LayerActivations, free_bytes: int
) -> tuple[int, int]:
    """The fewest layers to recompute so that a row's activations fit.

    The first layers are the ones recomputed: when the backward pass reaches them, what the others
    kept is free again.

    Args:
        layers: of the decoder.
        tokens: of the largest row.
        each: what one layer keeps.
        free_bytes: that activations may take.

    Returns:
        Number of layers, all of them where even that does not fit, and the bytes it takes.
    """
    for recomputed in range(layers + 1):
        # While one layer is recomputed, everything of it exists for a while.
        whole = max(layers - recomputed, 1)
        taken = tokens * (whole * each.kept + recomputed * each.recomputed)
        if taken <= free_bytes:
            break
    return recomputed, taken
