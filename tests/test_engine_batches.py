"""Which questions are answered together."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from grace_core.evaluation.engine.batches import Extent, batches

EXTENTS = st.lists(
    st.builds(
        Extent,
        tokens=st.integers(1, 60),
        budget=st.sampled_from([4, 9]),
        group=st.sampled_from([None, "a", "b", "c"]),
    ),
    max_size=40,
)


@given(extents=EXTENTS, tokens=st.integers(1, 400))
def test_every_question_once_and_no_batch_too_large(extents: list[Extent], tokens: int) -> None:
    found = batches(extents, tokens)
    assert sorted(index for batch in found for index in batch) == list(range(len(extents)))
    for batch in found:
        parts = [extents[index] for index in batch]
        assert len({part.budget for part in parts}) == 1
        size = len(batch) * (max(part.tokens for part in parts) + parts[0].budget)
        assert size <= tokens or len(batch) == 1


@given(extents=EXTENTS, tokens=st.integers(1, 400))
def test_questions_about_one_picture_follow_one_another(extents: list[Extent], tokens: int) -> None:
    order = [extents[index] for batch in batches(extents, tokens) for index in batch]
    groups = [(part.budget, part.group) for part in order if part.group is not None]
    changes = sum(before != after for before, after in pairwise(groups))
    alone = [part for part in order if part.group is None]
    if not alone and groups:
        assert changes == len(set(groups)) - 1


def test_longest_first() -> None:
    extents = [Extent(tokens, 2, None) for tokens in (5, 9, 7, 1)]
    assert batches(extents, 22) == [[1, 2], [0, 3]]


def test_longer_answers_first_and_apart() -> None:
    assert batches([Extent(5, 2, None), Extent(5, 64, None)], 1000) == [[1], [0]]
