"""A model's language decoder for generation: prompts side by side without padding, then one token
a row at a time.

The layers are the model's own, known by their structure as in `models.fused_forward`; what is
computed is what transformers computes, in another order of sums. All kinds of weights, dense and
packed, go the same way. Of a layer, four products are made with weights (queries, keys and values
are one, gate and up another) and what lies between is one kernel each on a GPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from grace_core.errors import GraceError
from grace_core.inference import layer_operations
from grace_core.inference.plans import MOST_ROWS
from grace_core.inference.projections import ExpandedWeights, Projection, expandable, joined
from grace_core.models.families import Family, decoder_layers
from grace_core.models.forward import picture_features
from grace_core.models.fused_forward import is_decoder_attention, is_gated_mlp
from grace_core.models.packed_attention import attend
from grace_core.models.rows import PackedRow

# dims: M tokens, d width, H query heads, J key-value heads, D width of a head, V vocabulary

PictureFeatures = tuple[Tensor, list[Tensor]]
"""What `models.forward.picture_features` returns."""

Attention = Callable[[int, Tensor], Tensor]
"""(layer, (M, H + 2 J, D) turned queries and keys, and values) -> (M, H D)."""


@dataclass(frozen=True)
class Layer:
    """What a decoder layer computes with."""

    projections: tuple[Projection, Projection, Projection, Projection]
    """Queries, keys and values; attention's output; gate and up; down."""

    input_norm: Any
    mlp_norm: Any
    head_norms: tuple[Tensor, Tensor, float] | None


@dataclass(frozen=True)
class Placed:
    """Where tokens stand: in the cache, and on the rotary circle."""

    places: Tensor
    """(M,) int64, in the cache: row x capacity + place in the row."""

    cosines: Tensor
    """(R, D); `sines` likewise."""

    sines: Tensor
    turns: Tensor
    """(M,) int64, each token's row of these."""


class Decoder:
    """The decoder of one model."""

    def __init__(self, model: Any, family: Family) -> None:
        """Join the model's projections; it stays usable as it was.

        Raises:
            GraceError: a layer's structure is not known here, or a GPU without Triton.
        """
        self.model = model
        self.family = family
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self._operations = _operations_for(self.device)
        self._decoder = model.get_submodule(family.decoder)
        modules: Any = decoder_layers(model, family)
        for layer in modules:
            if not (is_gated_mlp(layer.mlp) and is_decoder_attention(layer.self_attn)):
                raise GraceError(
                    f"{type(layer).__name__} has a structure that is not known here; generate "
                    "with transformers instead"
                )
        self.layers = [_layer(module) for module in modules]
        attention = modules[0].self_attn
        self.head_width = int(attention.head_dim)
        self.scale = float(attention.scaling)
        self.kept_heads = int(attention.k_proj.out_features) // self.head_width
        self.heads = int(attention.q_proj.out_features) // self.head_width
        self.vocabulary = int(model.get_output_embeddings().out_features)
        self._expands = expandable([layer.projections for layer in self.layers])

    def rotary_table(self, positions: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of text at positions 0 to positions - 1; (positions, D) each."""
        return self._rotary(torch.arange(positions, device=self.device)[None])

    def first_states(
        self,
        row: PackedRow,
        keys: Tensor,
        values: Tensor,
        places: Tensor,
        features: PictureFeatures | None = None,
        before: slice = slice(0, 0),
    ) -> Tensor:
        """Run prompts through the decoder and keep their keys and values.

        Args:
            row: the prompts one after the other, on the device; `predicting` says of which tokens
                the states are wanted.
            keys: (layers, B T, J, D), written to; `values` likewise.
            places: (M,) int64, each token's place in these.
            features: of the row's pictures where they are known already.
            before: places of what goes before the row's only prompt, if anything: the tokens
                attend to these keys and values, too.

        Returns:
            (len(predicting), d) states after the last norm.
        """
        if features is None and row.grids:
            features = picture_features(
                self.model, self.family, row.pictures, row.grids, row.frames
            )
        states = self.model.get_input_embeddings()(row.input_ids[0])
        deepstack: Sequence[Tensor] = ()
        if features is not None:
            embeddings, deepstack = features
            states = states.index_copy(0, row.image_places, embeddings.to(states.dtype))
        cosines, sines = self._rotary(row.position_ids)
        turns = torch.arange(len(cosines), device=self.device)
        heads, kept = self.heads, self.kept_heads

        def attention(layer: int, turned: Tensor) -> Tensor:
            query, key, value = turned.split([heads, kept, kept], dim=1)
            if before.stop > before.start:
                key = torch.cat((keys[layer, before], key))
                value = torch.cat((values[layer, before], value))
                return _attend_to_all_before(query, key, value, self.scale)
            attended = attend(query, key, value, row.samples, scale=self.scale, causal=True)
            return attended.flatten(1)

        def add_pictures(layer: int, states: Tensor) -> None:
            if layer < len(deepstack):
                states.index_add_(0, row.image_places, deepstack[layer].to(states.dtype))

        placed = Placed(places, cosines, sines, turns)
        return self._run(states, placed, keys, values, attention, add_pictures, row.predicting)

    def next_states(self, tokens: Tensor, placed: Placed, keys: Tensor, values: Tensor) -> Tensor:
        """One token of each row: states after the last norm, (B, d).

        Args:
            tokens: (B,) int64.
            keys: (layers, B, T, J, D), read and written; `values` likewise.
        """

        def attention(layer: int, turned: Tensor) -> Tensor:
            attended: Tensor = self._operations.attend_to_cache(
                turned, keys[layer], values[layer], placed.places, self.scale
            )
            return attended

        states = self.model.get_input_embeddings()(tokens)
        return self._run(states, placed, keys.flatten(1, 2), values.flatten(1, 2), attention)

    def logits(self, states: Tensor) -> Tensor:
        """(..., V) in the model's dtype."""
        found: Tensor = self.model.get_output_embeddings()(states)
        return found

    def _run(
        self,
        states: Tensor,
        placed: Placed,
        keys: Tensor,
        values: Tensor,
        attention: Attention,
        after_layer: Callable[[int, Tensor], None] | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """All layers and the last norm; `states` (M, d) are overwritten."""
        operations = self._operations
        weights: ExpandedWeights | None = None
        if self._expands and len(states) > MOST_ROWS:
            weights = ExpandedWeights([layer.projections for layer in self.layers], self.dtype)
        product: Tensor | None = None
        for index, layer in enumerate(self.layers):
            qkv, output, gate_up, down = layer.projections
            expanded = [None] * 4 if weights is None else weights.of(index)
            normed = operations.add_and_norm(product, states, *_norm(layer.input_norm))
            turned = operations.turn_and_keep(
                qkv.product(normed, expanded[0]),
                layer.head_norms,
                placed.cosines,
                placed.sines,
                placed.turns,
                placed.places,
                keys[index],
                values[index],
            )
            attended = attention(index, turned)
            product = output.product(attended, expanded[1])
            normed = operations.add_and_norm(product, states, *_norm(layer.mlp_norm))
            gated = operations.silu_times(gate_up.product(normed, expanded[2]), self.dtype)
            product = down.product(gated, expanded[3])
            if after_layer is not None:
                # What is added after a layer is added beside its product, which comes next.
                after_layer(index, states)
        assert product is not None
        if wanted is not None:
            states, product = states[wanted], product[:, wanted]
        last: Tensor = operations.add_and_norm(product, states, *_norm(self._decoder.norm))
        return last

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(M, D) cosines and sines of (1, M) or (3, 1, M) positions."""
        if self.family.positions == "multimodal" and positions.ndim == 2:
            positions = positions.expand(3, 1, -1)
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        cosines, sines = self._decoder.rotary_emb(like, positions)
        return cosines[0].contiguous(), sines[0].contiguous()


def _operations_for(device: torch.device) -> Any:
    if device.type != "cuda":
        return layer_operations
    if importlib.util.find_spec("triton") is None:
        raise GraceError("generation on a GPU needs Triton: pip install triton")
    from grace_core.inference import layer_kernels

    return layer_kernels


def _layer(module: Any) -> Layer:
    attention, mlp = module.self_attn, module.mlp
    norms = None
    if hasattr(attention, "q_norm"):
        queries, keys = attention.q_norm, attention.k_norm
        assert queries.variance_epsilon == keys.variance_epsilon
        norms = (queries.weight, keys.weight, queries.variance_epsilon)
    return Layer(
        projections=(
            joined([attention.q_proj, attention.k_proj, attention.v_proj]),
            joined([attention.o_proj]),
            joined([mlp.gate_proj, mlp.up_proj]),
            joined([mlp.down_proj]),
        ),
        input_norm=module.input_layernorm,
        mlp_norm=module.post_attention_layernorm,
        head_norms=norms,
    )


def _attend_to_all_before(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention of the last M of T tokens, (M, H D).

    Args:
        query: (M, H, D).
        key: (T, J, D), and `value` likewise.
    """
    count, total = len(query), len(key)
    seen = torch.ones(count, total, dtype=torch.bool, device=query.device).tril(total - count)
    attended = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        attn_mask=seen,
        scale=scale,
        enable_gqa=True,
    )
    return attended[0].transpose(0, 1).flatten(1)


def _norm(module: Any) -> tuple[Tensor, float]:
    return module.weight, module.variance_epsilon
