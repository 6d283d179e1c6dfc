"""Pictures' relations in fp16: what the rounding does to CKA."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from grace_core.losses.relational import relational_loss, teacher_relation
from grace_core.losses.stored_relation import restored_relation, stored_relation


def states(tokens: int, width: int, *, seed: int = 0, shared: float = 1.0) -> Tensor:
    """Rows around a common direction, as hidden states are."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(width, generator=generator)
    return shared * common + torch.randn(tokens, width, generator=generator)


@pytest.mark.parametrize(("tokens", "width"), [(4, 64), (16, 64), (64, 64), (90, 64), (196, 256)])
def test_the_loss_moves_by_less_than_is_stated(tokens: int, width: int) -> None:
    relation = teacher_relation(states(tokens, width, shared=3.0))
    again = restored_relation(stored_relation(relation))
    assert (again.is_gram, again.num_tokens) == (relation.is_gram, relation.num_tokens)
    assert again.counts and relation.counts
    assert again.gram_norm == relation.gram_norm
    assert again.centred.shape == relation.centred.shape
    student = states(tokens, 48, seed=1)
    difference = relational_loss(again, student) - relational_loss(relation, student)
    assert abs(float(difference)) < (1e-5 if tokens >= 90 else 1e-4)


def test_a_gram_takes_half_of_its_matrix() -> None:
    stored = stored_relation(teacher_relation(states(10, 32)))
    assert stored.is_gram and stored.values.dtype == torch.float16
    assert stored.values.shape == (55,)


def test_small_relations_keep_their_digits() -> None:
    """Nearly equal tokens have a Gram far below fp16's smallest number."""
    base = states(1, 32)
    near = base + 1e-3 * states(8, 32, seed=2, shared=0.0)
    relation = teacher_relation(near)
    assert relation.counts and float(relation.centred.abs().max()) < 1e-5
    again = restored_relation(stored_relation(relation))
    torch.testing.assert_close(again.centred, relation.centred, rtol=2.0**-10, atol=1e-10)


def test_pictures_that_do_not_count_stay_so() -> None:
    for one in (states(3, 32), torch.ones(5, 32), torch.ones(0, 32)):
        relation = teacher_relation(one)
        again = restored_relation(stored_relation(relation))
        assert not again.counts and not relation.counts
        assert again.num_tokens == len(one)


def test_states_that_are_not_finite_spoil_the_loss_visibly() -> None:
    broken = states(8, 32)
    broken[2, 3] = float("nan")
    again = restored_relation(stored_relation(teacher_relation(broken)))
    assert again.counts and relational_loss(again, states(8, 16)).isnan()
