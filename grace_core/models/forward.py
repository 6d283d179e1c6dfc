"""One packed row through a model: the hidden states that the losses need, and no logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grace_core.models.families import Family, decoder_layers
from grace_core.models.rows import PackedRow

# dims: L tokens of the row, N supervised tokens, d width, n visual tokens of one picture


@dataclass(frozen=True)
class RowStates:
    """Hidden states of one row."""

    predicting: Tensor
    """(N, d): final states (after the last norm) that predict the supervised tokens."""

    visual: list[Tensor]
    """(n, d) for each picture: outputs of the penultimate decoder layer (index L-2)."""


def row_states(model: Any, family: Family, row: PackedRow) -> RowStates:
    """Run the decoder over a packed row; the language-model head is left to the losses."""
    layers = decoder_layers(model, family)
    with _output_of(layers[len(layers) - 2]) as captured:
        output = model.model(
            input_ids=row.input_ids,
            position_ids=position_ids(model, family, row),
            use_cache=False,
            sample_lengths=row.sample_lengths,
            **row.pictures,
        )
    (penultimate,) = captured
    return RowStates(
        predicting=output.last_hidden_state[0].index_select(0, row.predicting),
        visual=[penultimate[0, start : start + count] for start, count in row.visual_spans],
    )


def position_ids(model: Any, family: Family, row: PackedRow) -> Tensor:
    """Positions of a packed row: each sample starts anew.

    Returns:
        (3, 1, L) M-RoPE positions, or (1, L) plain ones.
    """
    device = row.input_ids.device
    if family.positions == "plain":
        return torch.cat([torch.arange(n, device=device) for n in row.sample_lengths])[None]
    image_token_id = model.config.image_token_id
    grids = row.pictures["image_grid_thw"]
    parts = []
    start = picture = 0
    for length, pictures in zip(row.sample_lengths, row.pictures_of_sample, strict=True):
        ids = row.input_ids[:, start : start + length]
        positions, _ = model.model.get_rope_index(
            ids,
            mm_token_type_ids=(ids == image_token_id).to(torch.int32),
            image_grid_thw=grids[picture : picture + pictures] if pictures else None,
        )
        parts.append(positions)
        start += length
        picture += pictures
    return torch.cat(parts, dim=-1)


@contextmanager
def _output_of(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what `layer` returns inside the block.

    Under gradient checkpointing the layer runs once more in the backward pass; the hook is gone by
    then, so only the output that is part of the graph is kept.
    """
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        outputs.append(output if isinstance(output, Tensor) else output[0])

    handle = layer.register_forward_hook(keep)
    try:
        yield outputs
    finally:
        handle.remove()
