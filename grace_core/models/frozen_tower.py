"""The vision tower alone, so that a frozen one can see the pictures of several rows in one pass.

In GRACE the tower is frozen and what connects it to the decoder is trained. Nothing of the tower is
kept for a backward pass, so it need not run row by row: in rows of a few samples that is a seventh
of what the student costs the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grace_core.models.families import Family
from grace_core.models.rows import PackedRow, groups_of_rows, joined_row
from grace_core.models.segments import Segments
from grace_core.models.vision_arguments import vision_arguments
from grace_core.models.visual_inputs import Grid

# dims: P patches and V image tokens of a row's pictures, d width


@dataclass(frozen=True)
class TowerStates:
    """What a frozen tower makes of one row's pictures."""

    patches: Tensor
    """(P, d): its last states, which the connector takes."""

    deepstack: list[Tensor]
    """(V, d) of each deepstack layer."""


def tower_states(
    model: Any, family: Family, rows: Sequence[PackedRow]
) -> Iterator[TowerStates | None]:
    """Of each row in turn; a pass over several rows is made when its first one is asked for.

    None where the row's own pass is to run the tower: because it is trained, because the connector
    is none of its modules, or because a row is so long that it has a pass to itself anyhow.
    """
    together = _is_frozen_to_the_connector(model, family)
    for group in groups_of_rows(rows):
        if together and len(group) > 1:
            yield from _of_group(model, family, group)
        else:
            yield from [None] * len(group)


@torch.no_grad()
def _of_group(model: Any, family: Family, rows: Sequence[PackedRow]) -> list[TowerStates]:
    joined = joined_row(rows)
    output = tower_output(model, family, joined.pictures, joined.grids, joined.frames)
    patches = output.last_hidden_state.split([sum(row.frames.lengths) for row in rows])
    tokens = [len(row.image_places) for row in rows]
    layers = [layer.split(tokens) for layer in deepstack_features(output)]
    return [
        TowerStates(patches=of_row, deepstack=[layer[number] for layer in layers])
        for number, of_row in enumerate(patches)
    ]


def tower_output(
    model: Any, family: Family, pictures: Mapping[str, Tensor], grids: list[Grid], frames: Segments
) -> Any:
    """The library's output for pictures; arguments as `forward.picture_features` takes them."""
    arguments: dict[str, Any] = dict(pictures)
    if family.positions == "multimodal":
        tower = model.get_submodule(family.vision)
        arguments |= vision_arguments(tower, grids, frames, frames.cumulative.device)
    return model.model.get_image_features(**arguments, return_dict=True)


def deepstack_features(output: Any) -> list[Tensor]:
    """(V, d) of each deepstack layer; none where a family has no such."""
    layers = getattr(output, "deepstack_features", None) or []
    # A tensor up to transformers 5.17, one tensor for each picture later.
    return [layer if isinstance(layer, Tensor) else torch.cat(layer) for layer in layers]


def connected(model: Any, family: Family, tower: TowerStates) -> Tensor:
    """(V, d) that take the image tokens' places."""
    (connector,) = family.connectors
    features: Tensor = model.get_submodule(connector)(tower.patches)
    return features


def _is_frozen_to_the_connector(model: Any, family: Family) -> bool:
    inside = family.vision + "."
    if len(family.connectors) != 1 or not family.connectors[0].startswith(inside):
        return False
    connector = family.connectors[0].removeprefix(inside) + "."
    return not any(
        parameter.requires_grad and not name.startswith(connector)
        for name, parameter in model.get_submodule(family.vision).named_parameters()
    )
