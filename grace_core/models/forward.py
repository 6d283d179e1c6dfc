"""One packed row through a model: the hidden states that the losses need, and no logits.

The parts of the model are called one by one, not through its own `forward`: that looks for the
image tokens on the device and counts them, which halts the host several times a pass. A row knows
where its image tokens are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grace_core.models.families import Family, decoder_layers
from grace_core.models.frozen_tower import (
    TowerStates,
    connected,
    deepstack_features,
    tower_output,
)
from grace_core.models.rows import PackedRow
from grace_core.models.segments import Segments
from grace_core.models.visual_inputs import Grid

# dims: L tokens of the row, N supervised tokens, V image tokens, d width,
#       n visual tokens of one picture


@dataclass(frozen=True)
class RowStates:
    """Hidden states of one row."""

    predicting: Tensor
    """(N, d): final states (after the last norm) that predict the supervised tokens."""

    visual: list[Tensor]
    """(n, d) for each picture: outputs of the penultimate decoder layer (index L-2)."""


def row_states(
    model: Any, family: Family, row: PackedRow, tower: TowerStates | None = None
) -> RowStates:
    """Run the decoder over a packed row; the language-model head is left to the losses.

    Args:
        model: loaded for packed rows (`load_model(..., attention="packed")`).
        tower: of the row's pictures; None: the tower runs here.
    """
    if tower is None:
        pictures, deepstack = picture_features(model, family, row.pictures, row.grids, row.frames)
    else:
        pictures, deepstack = connected(model, family, tower), tower.deepstack
    embedded = model.get_input_embeddings()(row.input_ids)
    embedded = embedded.index_copy(1, row.image_places, pictures.to(embedded.dtype)[None])
    arguments: dict[str, Any] = {}
    if deepstack:
        arguments = {"visual_pos_masks": row.image_places, "deepstack_visual_embeds": deepstack}
    layers = decoder_layers(model, family)
    with _output_of(layers[len(layers) - 2]) as captured:
        output = model.get_submodule(family.decoder)(
            inputs_embeds=embedded,
            position_ids=row.position_ids,
            use_cache=False,
            segments=row.samples,
            **arguments,
        )
    (penultimate,) = captured
    return RowStates(
        predicting=output.last_hidden_state[0].index_select(0, row.predicting),
        visual=[penultimate[0, start : start + count] for start, count in row.visual_spans],
    )


def picture_features(
    model: Any,
    family: Family,
    pictures: Mapping[str, Tensor],
    grids: list[Grid],
    frames: Segments,
) -> tuple[Tensor, list[Tensor]]:
    """What the vision tower and the connector make of pictures.

    Args:
        pictures: the model's picture arguments, on its device; grids stay on the CPU.
        grids: of all pictures, in order.
        frames: patches of each frame, on the model's device.

    Returns:
        (V, d) that take the image tokens' places, and (V, d) of each deepstack layer.
    """
    output = tower_output(model, family, pictures, grids, frames)
    return torch.cat(list(output.pooler_output)), deepstack_features(output)


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
