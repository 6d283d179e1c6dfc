"""Forward passes of a model's own modules with few kernels: for packed rows on a GPU.

Only the instances of one model are given these; the classes, and with them every other model of the
family, stay as they are. Names and parameters stay too: each parameter is used inside the forward
pass of the module that owns it, as ZeRO-3's hooks require, and projections are called as modules,
so that quantized ones take part. Modules are known by their structure, so that a family's own names
do not matter; one of another structure keeps its forward pass, which is logged.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from grace_core.models.cached_attention import cached_attention
from grace_core.models.families import Family, decoder_layers
from grace_core.models.kernels import Kernels, best_kernels
from grace_core.models.packed_attention import attend, flash_obstacle
from grace_core.models.segments import Segments

log = logging.getLogger(__name__)

_SILU = (nn.SiLU, type(ACT2FN["silu"]))

# dims: L tokens of the row, P patches of all pictures, d width, D width of a head


def choose_forward(model: Any, family: Family, kernels: Literal["auto", "plain"]) -> None:
    """Give a model loaded for packed rows its fused forward passes where they pay: on CUDA.

    kernels: auto, or plain to keep the library's own forward passes everywhere.
    """
    if kernels == "auto" and model.device.type == "cuda":
        use_fused_forward(model, family, best_kernels())


def use_fused_forward(model: Any, family: Family, kernels: Kernels) -> None:
    """Give a model loaded for packed rows its fused forward passes, on any device."""
    kept: set[str] = set()
    widths: set[int] = set()
    for module in model.get_submodule(family.decoder).modules():
        if _is_rms_norm(module):
            _replace(module, _rms_norm(kernels))
    layer: Any
    for layer in decoder_layers(model, family):
        if is_gated_mlp(layer.mlp):
            _replace(layer.mlp, _gated_mlp(kernels))
        else:
            kept.add(type(layer.mlp).__name__)
        if is_decoder_attention(layer.self_attn):
            _replace(layer.self_attn, _decoder_attention(kernels))
            widths.add(layer.self_attn.head_dim)
        else:
            kept.add(type(layer.self_attn).__name__)
    for module in _vision_modules(model, family):
        if _is_patch_projection(module):
            _replace(module, _patch_projection)
        elif _is_vision_attention(module):
            _replace(module, _vision_attention(kernels))
            widths.add(module.head_dim)
    if kept:
        log.warning(
            "%s keep the library's forward pass: their structure is not known here",
            ", ".join(sorted(kept)),
        )
    obstacles = {flash_obstacle(model.device, model.dtype, width) for width in widths} - {None}
    if obstacles:
        log.warning(
            "attention goes over samples and pictures one by one, without the variable-length "
            "flash kernel: %s",
            "; ".join(sorted(map(str, obstacles))),
        )


def _vision_modules(model: Any, family: Family) -> Iterator[Any]:
    if family.positions == "multimodal":
        yield from model.get_submodule(family.vision).modules()


def _replace(module: nn.Module, forward: Callable[..., Any]) -> None:
    module.forward = MethodType(forward, module)


def _is_rms_norm(module: nn.Module) -> bool:
    # Gemma's adds one to its weight and names its epsilon `eps`.
    return type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")


def _rms_norm(kernels: Kernels) -> Callable[..., Tensor]:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        return kernels.rms_norm(hidden_states, self.weight, self.variance_epsilon)

    return forward


def is_gated_mlp(module: nn.Module) -> bool:
    parts = ("gate_proj", "up_proj", "down_proj")
    return all(hasattr(module, part) for part in parts) and isinstance(
        getattr(module, "act_fn", None), _SILU
    )


def _gated_mlp(kernels: Kernels) -> Callable[..., Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        output: Tensor = self.down_proj(kernels.silu_times(self.gate_proj(x), self.up_proj(x)))
        return output

    return forward


def is_decoder_attention(module: nn.Module) -> bool:
    parts = ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "scaling", "layer_idx")
    return (
        all(hasattr(module, part) for part in parts)
        and hasattr(module, "q_norm") == hasattr(module, "k_norm")
        and getattr(module, "sliding_window", None) is None
        and not getattr(module, "attention_dropout", 0.0)
    )


def _decoder_attention(kernels: Kernels) -> Callable[..., tuple[Tensor, None]]:
    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        *,
        segments: Segments | None = None,
        **_other: Any,
    ) -> tuple[Tensor, None]:
        """Causal attention of each sample of a row, (1, L, d), to itself; with a cache, as
        `cached_attention` says.
        """
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape)
        key = self.k_proj(hidden_states).view(shape)
        value = self.v_proj(hidden_states).view(shape)
        if hasattr(self, "q_norm"):
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = kernels.turn(query, key, *position_embeddings)
        if past_key_values is None:
            assert attention_mask is None and segments is not None, "only packed rows come here"
            attended = attend(query[0], key[0], value[0], segments, scale=self.scaling, causal=True)
            return self.o_proj(attended.flatten(1)[None]), None
        keys, values = past_key_values.update(
            key.transpose(1, 2), value.transpose(1, 2), self.layer_idx
        )
        attended, _ = cached_attention(
            self,
            query.transpose(1, 2),
            keys,
            values,
            attention_mask,
            scaling=self.scaling,
            segments=segments,
        )
        return self.o_proj(attended.flatten(2)), None

    return forward


def _is_vision_attention(module: nn.Module) -> bool:
    parts = ("qkv", "proj", "num_heads", "head_dim", "scaling")
    return all(hasattr(module, part) for part in parts) and not getattr(
        module, "attention_dropout", 0.0
    )


def _vision_attention(kernels: Kernels) -> Callable[..., Tensor]:
    def forward(
        self: Any,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        *,
        segments: Segments,
        **_: Any,
    ) -> Tensor:
        """Attention of each picture of a row's patches, (P, d), to itself; cos and sin are fp32."""
        projected = self.qkv(hidden_states)
        projected = projected.view(1, len(projected), 3, self.num_heads, self.head_dim)
        query, key, value = projected.unbind(2)
        cos, sin = position_embeddings
        query, key = kernels.turn(query, key, cos[None], sin[None])
        attended = attend(query[0], key[0], value[0], segments, scale=self.scaling, causal=False)
        output: Tensor = self.proj(attended.flatten(1))
        return output

    return forward


def _is_patch_projection(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv3d)
        and module.kernel_size == module.stride
        and set(module.padding) == {0}
        and set(module.dilation) == {1}
        and module.groups == 1
    )


def _patch_projection(self: Any, patches: Tensor) -> Tensor:
    """A convolution that sees each patch once is a matrix product; cuDNN's is much slower for some
    shapes and versions (pytorch issues 166643 and 174051).

    Args:
        patches: (P, channels, frames, rows, columns), each as large as the kernel.

    Returns:
        (P, d, 1, 1, 1).
    """
    assert patches.shape[2:] == self.kernel_size, "patches come one by one"
    weight = self.weight.flatten(1)
    return F.linear(patches.flatten(1), weight, self.bias)[:, :, None, None, None]
