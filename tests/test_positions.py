"""Rotary positions made on the host against the library's own rule."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grace_core.models.positions import multimodal_positions, plain_positions
from tests.tiny_models import MERGE, SPECIAL_IDS, tiny_qwen2_vl, tiny_qwen3_vl

TEXT, IMAGE = 9, SPECIAL_IDS["image_token_id"]


@pytest.fixture(scope="module", params=[tiny_qwen2_vl, tiny_qwen3_vl])
def model(request: pytest.FixtureRequest):
    return request.param().model


# Text, then pictures each followed by at least one token of text, as the chat templates leave them.
samples = st.tuples(
    st.integers(0, 5),
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)), max_size=3),
)


@settings(max_examples=40, deadline=None)
@given(sample=samples)
def test_positions_equal_the_librarys(model, sample) -> None:
    before, pictures = sample
    ids, places = [TEXT] * before, []
    for rows, columns, after in pictures:
        places.append((len(ids), (1, rows, columns)))
        ids += [IMAGE] * (rows * columns) + [TEXT] * after
    ids = ids or [TEXT]
    found = multimodal_positions(len(ids), places)
    tokens = torch.tensor([ids])
    grids = torch.tensor([[1, r * MERGE, c * MERGE] for r, c, _ in pictures])
    expected, _ = model.get_rope_index(
        tokens,
        mm_token_type_ids=(tokens == IMAGE).int(),
        image_grid_thw=grids if pictures else None,
    )
    assert found.dtype == torch.int64
    assert torch.equal(found, expected[:, 0])


def test_a_picture_worked_by_hand() -> None:
    """Two tokens, a picture of 2 rows and 3 columns, one token: text goes on after 2 + 3."""
    assert multimodal_positions(9, [(2, (1, 2, 3))]).tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]


def test_plain_positions_count() -> None:
    assert plain_positions(4).tolist() == [[0, 1, 2, 3]]
