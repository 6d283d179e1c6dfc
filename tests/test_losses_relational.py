"""RCKA against Eq. 10-13 with explicit matrices, and its invariances."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grace_core.losses.relational import (
    relational_loss,
    relational_sum,
    teacher_relation,
)

Matrix = list[list[float]]


def matmul(a: Matrix, b: Matrix) -> Matrix:
    columns = list(zip(*b, strict=True))
    return [
        [math.fsum(x * y for x, y in zip(row, column, strict=True)) for column in columns]
        for row in a
    ]


def centred_gram(states: Tensor) -> Matrix:
    """H V V^T H with H written out."""
    rows = [[x / math.hypot(*row) for x in row] for row in states.double().tolist()]
    n = len(rows)
    gram = matmul(rows, [list(column) for column in zip(*rows, strict=True)])
    centring = [[(i == j) - 1 / n for j in range(n)] for i in range(n)]
    return matmul(matmul(centring, gram), centring)


def trace_of_product(a: Matrix, b: Matrix) -> float:
    product = matmul(a, b)
    return math.fsum(product[i][i] for i in range(len(product)))


def brute_force_cka(teacher: Tensor, student: Tensor) -> float:
    k_t, k_s = centred_gram(teacher), centred_gram(student)
    return trace_of_product(k_t, k_s) / math.sqrt(
        trace_of_product(k_t, k_t) * trace_of_product(k_s, k_s)
    )


def states(n: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + 50 * n + width)
    # An offset common to all rows, as real hidden states have: centring must remove it.
    offset = torch.randn(width, generator=generator, dtype=torch.float64)
    return (offset + torch.randn(n, width, generator=generator, dtype=torch.float64)).to(dtype)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    n=st.integers(4, 13),
    teacher_width=st.integers(2, 17),
    student_width=st.integers(2, 17),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_equals_the_equations(
    n: int, teacher_width: int, student_width: int, dtype: torch.dtype, seed: int
) -> None:
    teacher = states(n, teacher_width, seed, dtype)
    student = states(n, student_width, seed + 1, dtype)
    expected = brute_force_cka(teacher, student)
    loss = relational_loss(teacher_relation(teacher), student)
    # Half precision enters as given and is exact from there.
    tolerance = 1e-11 if dtype == torch.float64 else 2e-5
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(1 - expected, abs=tolerance)
    assert -tolerance <= loss.item() <= 1 + tolerance


def test_norm_of_the_relation_is_that_of_the_gram() -> None:
    for n, width in ((5, 9), (9, 5)):
        teacher = states(n, width)
        gram = centred_gram(teacher)
        relation = teacher_relation(teacher)
        assert float(relation.gram_norm) == pytest.approx(math.sqrt(trace_of_product(gram, gram)))
        assert relation.is_gram == (n <= width)
        assert tuple(relation.centred.shape) == ((n, n) if n <= width else (n, width))


@pytest.mark.parametrize(("n", "teacher_width", "student_width"), [(12, 7, 5), (12, 7, 31)])
def test_gram_and_cross_covariance_agree(n: int, teacher_width: int, student_width: int) -> None:
    """Zero columns change no inner product, but make the teacher wide enough for the Gram form."""
    teacher, student = states(n, teacher_width), states(n, student_width, seed=1)
    student.requires_grad_()
    padded = torch.cat([teacher, teacher.new_zeros(n, n)], dim=1)
    forms = [teacher_relation(teacher), teacher_relation(padded)]
    assert [form.is_gram for form in forms] == [False, True]
    assert float(forms[0].gram_norm) == pytest.approx(float(forms[1].gram_norm), rel=1e-12)
    losses = [relational_loss(form, student) for form in forms]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-11, atol=1e-12)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in losses]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("n", "teacher_width", "student_width"), [(5, 8, 6), (9, 4, 6), (9, 4, 12), (4, 4, 4)]
)
def test_gradcheck(n: int, teacher_width: int, student_width: int) -> None:
    relation = teacher_relation(states(n, teacher_width))
    student = states(n, student_width, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: relational_loss(relation, s), (student,))


@pytest.mark.parametrize(("n", "width"), [(6, 10), (20, 6)])
def test_invariances(n: int, width: int) -> None:
    teacher, student = states(n, width), states(n, width + 3, seed=1)
    loss = relational_loss(teacher_relation(teacher), student)
    generator = torch.Generator().manual_seed(2)

    def rotation(size: int) -> Tensor:
        return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]

    lengths = torch.rand(n, 1, generator=generator, dtype=torch.float64) * 100 + 0.01
    order = torch.randperm(n, generator=generator)
    for changed_teacher, changed_student in (
        (teacher @ rotation(width), student),
        (teacher, student @ rotation(width + 3)),
        (teacher * lengths, student),
        (teacher, student * lengths),
        (teacher, student * 1e-6),
        (teacher[order], student[order]),
    ):
        changed = relational_loss(teacher_relation(changed_teacher), changed_student)
        torch.testing.assert_close(changed, loss, rtol=1e-10, atol=1e-11)
    misordered = relational_loss(teacher_relation(teacher), student[order])
    assert abs(misordered.item() - loss.item()) > 1e-3


@pytest.mark.parametrize(("n", "width"), [(6, 10), (20, 6)])
def test_identical_relations_cost_nothing(n: int, width: int) -> None:
    teacher = states(n, width)
    student = (3 * teacher).requires_grad_()
    loss = relational_loss(teacher_relation(teacher), student)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert student.grad is not None
    torch.testing.assert_close(student.grad, torch.zeros_like(student), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_too_few_tokens_do_not_count(n: int) -> None:
    relation = teacher_relation(states(n, 6))
    assert not relation.counts
    assert relational_loss(relation, states(n, 5)).item() == 0.0
    assert relational_sum([relation], [states(n, 5)]).item() == 0.0


def test_four_tokens_count() -> None:
    assert teacher_relation(states(4, 6)).counts


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(196, 64), (16, 256)])
def test_teacher_whose_tokens_are_alike_does_not_count(
    dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    n, width = shape
    alike = states(1, width, dtype=dtype).expand(n, width)
    assert not teacher_relation(alike).counts
    # Same direction at different lengths: alike after normalisation (powers of two are exact).
    lengths = torch.tensor([2.0 ** (i % 5) for i in range(n)], dtype=dtype)[:, None]
    assert not teacher_relation(alike * lengths).counts
    assert not teacher_relation(torch.zeros(n, width, dtype=dtype)).counts


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("teacher_width", [3, 40])  # cross-covariance and Gram form
@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("n", [16, 25])  # the mean of 16 equal rows is exact, of 25 it is not
def test_student_whose_tokens_are_alike_adds_exactly_zero(
    dtype: torch.dtype, teacher_width: int, zero: bool, n: int
) -> None:
    width = 20
    relation = teacher_relation(states(n, teacher_width, dtype=dtype))
    assert relation.counts
    row = torch.zeros(1, width, dtype=dtype) if zero else states(1, width, dtype=dtype)
    alike = row.repeat(n, 1).requires_grad_()
    other = states(n, width, seed=3, dtype=dtype).requires_grad_()
    total = relational_sum([relation, relation], [alike, other])
    total.backward()
    assert torch.equal(total, relational_loss(relation, other))
    assert alike.grad is not None and torch.equal(alike.grad, torch.zeros_like(alike))
    assert other.grad is not None and bool(other.grad.any())
    assert bool(other.grad.isfinite().all())


@pytest.mark.parametrize(("norm", "counts"), [(0.9e-8, False), (1.1e-8, True)])
def test_threshold_of_the_gram_norm(norm: float, counts: bool) -> None:
    """Directions at angles +a and -a: K~ is sin(a)^2 times a matrix of signs, norm 4 sin(a)^2."""
    angle = math.asin(math.sqrt(norm / 4))
    nearly_alike = torch.tensor(
        [[math.cos(angle), sign * math.sin(angle)] for sign in (1, -1, 1, -1)], dtype=torch.float64
    )
    relation = teacher_relation(nearly_alike)
    assert float(relation.gram_norm) == pytest.approx(norm, rel=1e-6)
    assert relation.counts == counts
    loss = relational_loss(teacher_relation(states(4, 6)), nearly_alike)
    assert (loss.item() != 0) == counts


@pytest.mark.parametrize("teacher_width", [3, 40])
def test_zero_row_gets_no_gradient_and_spoils_none(teacher_width: int) -> None:
    n, width = 6, 7
    relation = teacher_relation(states(n, teacher_width))
    student = states(n, width, seed=1)
    student[2] = 0
    student.requires_grad_()
    loss = relational_loss(relation, student)
    loss.backward()
    assert 0 < loss.item() < 1
    gradient = student.grad
    assert gradient is not None and bool(gradient.isfinite().all())
    assert not bool(gradient[2].any())

    def others(free: Tensor) -> Tensor:
        whole = torch.cat([free[:2], torch.zeros(1, width, dtype=free.dtype), free[2:]])
        return relational_loss(relation, whole)

    assert torch.autograd.gradcheck(others, (states(n - 1, width).requires_grad_(),))


def test_sum_over_images_counts_only_those_that_count() -> None:
    teachers = [states(5, 8), states(3, 8), states(12, 8), states(1, 8).expand(6, 8)]
    students = [states(t.shape[0], 4, seed=1).requires_grad_() for t in teachers]
    relations = [teacher_relation(t) for t in teachers]
    assert [bool(relation.counts) for relation in relations] == [True, False, True, False]
    total = relational_sum(relations, students)
    expected = sum(1 - brute_force_cka(teachers[i], students[i].detach()) for i in (0, 2))
    assert total.item() == pytest.approx(expected, rel=1e-12)
    total.backward()
    moved = [student.grad is not None and bool(student.grad.any()) for student in students]
    assert moved == [True, False, True, False]
    assert students[3].grad is not None and bool(students[3].grad.isfinite().all())


def test_no_image_is_zero() -> None:
    assert relational_sum([], []).item() == 0.0


def test_gradient_reaches_the_student_only() -> None:
    teacher = states(6, 8).requires_grad_()
    student = states(6, 4, seed=1).requires_grad_()
    relational_loss(teacher_relation(teacher), student).backward()
    assert teacher.grad is None
    assert student.grad is not None and bool(student.grad.any())


def test_non_finite_states_are_not_hidden() -> None:
    broken = states(6, 8)
    broken[3, 3] = math.nan
    relation = teacher_relation(broken)
    assert relation.counts
    assert relational_loss(relation, states(6, 5)).isnan()
    assert relational_loss(teacher_relation(states(6, 5)), broken).isnan()


def test_mismatched_images_fail() -> None:
    with pytest.raises(AssertionError, match="same image"):
        relational_loss(teacher_relation(states(6, 8)), states(5, 8))
    with pytest.raises(ValueError):
        relational_sum([teacher_relation(states(6, 8))], [])
