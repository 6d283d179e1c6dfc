"""Which rows a frozen vision tower sees together, and that each gets what its own pass would give.

That losses and gradients stay those of the equations: test_objective.py.
"""

from __future__ import annotations

import pytest
import torch

from grace_core.models import rows as packing
from grace_core.models.families import set_trainable
from grace_core.models.forward import row_states
from grace_core.models.frozen_tower import tower_states
from tests.packed_models import PackedModel, packed_model
from tests.tiny_models import FAMILIES


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    return packed_model(request.param, tmp_path_factory.mktemp("m"))


def test_rows_get_what_their_own_pass_would_give(packed: PackedModel) -> None:
    model, family, row = packed.model, packed.family, packed.row
    set_trainable(model, family, "language")
    towers = list(tower_states(model, family, [row, row, row]))
    assert [tower is None for tower in towers] == [family.model_type == "llava"] * 3
    expected = row_states(model, family, row).predicting
    for tower in towers:
        torch.testing.assert_close(row_states(model, family, row, tower).predicting, expected)


def test_a_trained_tower_runs_in_each_rows_pass(packed: PackedModel) -> None:
    set_trainable(packed.model, packed.family, "all")
    assert list(tower_states(packed.model, packed.family, [packed.row] * 2)) == [None, None]


def test_long_rows_have_a_pass_to_themselves(
    packed: PackedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_trainable(packed.model, packed.family, "language")
    monkeypatch.setattr(packing, "_JOINED_TOKENS", 1)
    assert list(tower_states(packed.model, packed.family, [packed.row] * 2)) == [None, None]
