"""Decoupled distillation against Eq. 1-3 in 50-digit arithmetic with explicit probabilities."""

from __future__ import annotations

from decimal import Context, Decimal, localcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grace_core.losses.distillation import decoupled_kd, kullback_leibler

# Exponents far beyond float64, so that exp(-20000) is an ordinary number.
EXACT = Context(prec=50, Emin=-999_999, Emax=999_999)


def softmax(row: list[float], temperature: float) -> list[Decimal]:
    weights = [(Decimal(value) / Decimal(temperature)).exp() for value in row]
    return [weight / sum(weights) for weight in weights]


def kl(p: list[Decimal], q: list[Decimal]) -> Decimal:
    return sum((a * (a / b).ln() for a, b in zip(p, q, strict=True)), Decimal(0))


def split(probabilities: list[Decimal], label: int) -> tuple[list[Decimal], list[Decimal]]:
    """(target against rest), (rest renormalised); 1 - P as a sum, to lose no digits."""
    rest = [p for j, p in enumerate(probabilities) if j != label]
    return [probabilities[label], sum(rest, Decimal(0))], [p / sum(rest) for p in rest]


def exact_terms(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float
) -> list[tuple[float, float, float]]:
    """Per token T^2 * (TCKD, NCKD, KL)."""
    terms = []
    with localcontext(EXACT):
        square = Decimal(temperature) ** 2
        for z_s, z_t, y in zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True):
            p_s, p_t = softmax(z_s, temperature), softmax(z_t, temperature)
            (target_s, rest_s), (target_t, rest_t) = split(p_s, y), split(p_t, y)
            tckd, nckd, plain = kl(target_t, target_s), kl(rest_t, rest_s), kl(p_t, p_s)
            terms.append((float(square * tckd), float(square * nckd), float(square * plain)))
    return terms


def exact_gradients(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """d(T^2 TCKD)/dz_S and d(T^2 NCKD)/dz_S by the quotient rule on explicit probabilities."""
    tckd, nckd = [], []
    with localcontext(EXACT):
        T = Decimal(temperature)
        for z_s, z_t, y in zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True):
            p_s, p_t = softmax(z_s, temperature), softmax(z_t, temperature)
            (target_s, rest_s), (target_t, rest_t) = split(p_s, y), split(p_t, y)
            # dKL/dp for p = P_S(y), then dp/dz_j = p (1[j = y] - P_S(j)) / T.
            slope = target_t[1] / target_s[1] - target_t[0] / target_s[0]
            change = [target_s[1] if j == y else -p for j, p in enumerate(p_s)]
            tckd.append([float(T * slope * p_s[y] * c) for c in change])
            others = [float(T * (a - b)) for a, b in zip(rest_s, rest_t, strict=True)]
            nckd.append([*others[:y], 0.0, *others[y:]])
    return torch.tensor(tckd, dtype=torch.float64), torch.tensor(nckd, dtype=torch.float64)


def example(
    num_tokens: int, vocabulary: int, seed: int, spread: float = 3.0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_tokens, vocabulary)
    student = spread * torch.randn(shape, generator=generator, dtype=torch.float64)
    teacher = spread * torch.randn(shape, generator=generator, dtype=torch.float64)
    return student, teacher, torch.randint(vocabulary, (num_tokens,), generator=generator)


def column(terms: list[tuple[float, float, float]], index: int) -> Tensor:
    return torch.tensor([term[index] for term in terms], dtype=torch.float64)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    num_tokens=st.integers(0, 4),
    vocabulary=st.integers(2, 13),
    temperature=st.sampled_from([0.5, 1.0, 2.0, 3.7]),
    alpha=st.sampled_from([0.0, 1.0, 0.3]),
    beta=st.sampled_from([0.0, 1.0, 4.0]),
    spread=st.sampled_from([0.01, 1.0, 10.0, 1e3]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 999),
)
def test_equals_the_equations(
    num_tokens: int,
    vocabulary: int,
    temperature: float,
    alpha: float,
    beta: float,
    spread: float,
    dtype: torch.dtype,
    seed: int,
) -> None:
    student, teacher, labels = example(num_tokens, vocabulary, seed, spread)
    student, teacher = student.to(dtype), teacher.to(dtype)
    terms = exact_terms(student, teacher, labels, temperature)
    result = decoupled_kd(student, teacher, labels, temperature=temperature, alpha=alpha, beta=beta)
    plain = kullback_leibler(student, teacher, temperature=temperature)

    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(term.dtype == accumulation for term in (*result, plain))
    assert all(term.shape == (num_tokens,) for term in (*result, plain))
    # Half precision enters as given and is exact from there: the same bound as for fp32, a few
    # roundings of the largest logit in play.
    bound = 16 * torch.finfo(accumulation).eps * (1 + 6 * spread) * temperature * (1 + temperature)
    for values, index in ((result.tckd_N, 0), (result.nckd_N, 1), (plain, 2)):
        torch.testing.assert_close(values.double(), column(terms, index), rtol=1e-5, atol=bound)
    torch.testing.assert_close(
        result.total_N.double(),
        alpha * column(terms, 0) + beta * column(terms, 1),
        rtol=1e-5,
        atol=bound * (alpha + beta),
    )


# Logits of 1e4 put probabilities as far from 0 and 1 as exp(-20000); the labels point at the peak,
# at the bottom and between.
EXTREME = torch.tensor(
    [[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [0.0, 1e-3, -1e-3], [30.0, 0.0, -30.0], [1e4, 1e4, 1e4]],
    dtype=torch.float64,
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_extreme_logits(dtype: torch.dtype, temperature: float) -> None:
    size, vocabulary = EXTREME.shape
    # Every student row against every teacher row and every label.
    student = EXTREME.repeat_interleave(size * vocabulary, 0).to(dtype)
    teacher = EXTREME.repeat_interleave(vocabulary, 0).repeat(size, 1).to(dtype)
    labels = torch.arange(vocabulary).repeat(size * size)
    terms = exact_terms(student, teacher, labels, temperature)
    gradients = exact_gradients(student, teacher, labels, temperature)

    student.requires_grad_()
    result = decoupled_kd(student, teacher, labels, temperature=temperature, alpha=1, beta=1)
    plain = kullback_leibler(student, teacher, temperature=temperature)
    for values, index in ((result.tckd_N, 0), (result.nckd_N, 1), (plain, 2)):
        torch.testing.assert_close(
            values.detach().double(), column(terms, index), rtol=2e-6, atol=1e-6
        )
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6  # a bf16 gradient has 8 bits
    for values, expected in zip((result.tckd_N, result.nckd_N), gradients, strict=True):
        (gradient,) = torch.autograd.grad(values.sum(), student, retain_graph=True)
        torch.testing.assert_close(gradient.double(), expected, rtol=tolerance, atol=tolerance)
    (gradient,) = torch.autograd.grad(plain.sum(), student)
    assert bool(gradient.isfinite().all())


def test_common_offset_costs_no_digits() -> None:
    """Logits of 8192 +- 1 carry 2^-10 steps in fp32; the shift by 8192 must cancel exactly."""
    student, teacher, labels = example(6, 9, seed=1, spread=1.0)
    student, teacher = ((8192 + z).float() for z in (student, teacher))
    shifted = decoupled_kd(student, teacher, labels, temperature=2, alpha=1, beta=4)
    plain = decoupled_kd(student - 8192, teacher - 8192, labels, temperature=2, alpha=1, beta=4)
    for a, b in zip(shifted, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_tiny_divergence_of_a_confident_pair() -> None:
    """Both put all but e^-20 on the target: TCKD of order 1e-9, which 1 - P in fp32 cannot see."""
    teacher = torch.tensor([[20.0, 0.0, -1.0]])
    student = torch.tensor([[19.0, 0.0, -1.0]])
    labels = torch.tensor([0])
    expected = exact_terms(student, teacher, labels, 1.0)[0][0]
    assert 1e-10 < expected < 1e-8
    result = decoupled_kd(student, teacher, labels, temperature=1, alpha=1, beta=0)
    assert result.tckd_N.item() == pytest.approx(expected, rel=1e-4)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    vocabulary=st.integers(2, 31),
    temperature=st.floats(0.5, 5.0),
    spread=st.floats(0.1, 20.0),
    seed=st.integers(0, 999),
)
def test_plain_kl_decomposes(vocabulary: int, temperature: float, spread: float, seed: int) -> None:
    """KL = TCKD + (1 - P_T(y)) NCKD."""
    student, teacher, labels = example(5, vocabulary, seed, spread)
    terms = decoupled_kd(student, teacher, labels, temperature=temperature, alpha=1, beta=1)
    weights = torch.exp(teacher / temperature)
    target = weights[torch.arange(5), labels] / weights.sum(-1)
    torch.testing.assert_close(
        kullback_leibler(student, teacher, temperature=temperature),
        terms.tckd_N + (1 - target) * terms.nckd_N,
        rtol=1e-10,
        atol=1e-10,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [1.0, 1e4])
def test_equal_distributions_cost_nothing(dtype: torch.dtype, spread: float) -> None:
    logits, _, labels = example(8, 11, seed=2, spread=spread)
    student = logits.to(dtype).requires_grad_()
    teacher = logits.to(dtype)
    result = decoupled_kd(student, teacher, labels, temperature=2, alpha=1, beta=4)
    plain = kullback_leibler(student, teacher, temperature=2)
    assert not any(bool(term.any()) for term in (*result, plain))
    (result.total_N.sum() + plain.sum()).backward()
    assert student.grad is not None
    torch.testing.assert_close(student.grad, torch.zeros_like(student), rtol=0, atol=1e-5)


@pytest.mark.parametrize("spread", [3.0, 1e7])
def test_two_tokens_leave_nothing_among_the_rest(spread: float) -> None:
    student, teacher, labels = example(6, 2, seed=4, spread=spread)
    student, teacher = student.float(), teacher.float()
    result = decoupled_kd(student, teacher, labels, temperature=2, alpha=1, beta=4)
    assert not bool(result.nckd_N.any())
    torch.testing.assert_close(result.tckd_N, kullback_leibler(student, teacher, temperature=2))


def test_vocabulary_of_qwen_in_bf16() -> None:
    student, teacher, labels = example(2, 151_936, seed=9)
    student, teacher = student.to(torch.bfloat16), teacher.to(torch.bfloat16)
    p_s, p_t = (torch.exp(z.double() / 2) for z in (student, teacher))
    p_s, p_t = p_s / p_s.sum(-1, keepdim=True), p_t / p_t.sum(-1, keepdim=True)
    rows = torch.arange(2)
    y_s, y_t = p_s[rows, labels], p_t[rows, labels]
    tckd = 4 * (y_t * (y_t / y_s).log() + (1 - y_t) * ((1 - y_t) / (1 - y_s)).log())
    rest = torch.ones_like(p_t).index_put((rows, labels), torch.zeros(2, dtype=torch.float64))
    q_t, ratio = p_t / (1 - y_t)[:, None], (p_t * (1 - y_s)[:, None]) / (p_s * (1 - y_t)[:, None])
    nckd = 4 * (rest * q_t * ratio.log()).sum(-1)
    result = decoupled_kd(student, teacher, labels, temperature=2, alpha=1, beta=4)
    torch.testing.assert_close(result.tckd_N.double(), tckd, rtol=1e-3, atol=1e-8)
    torch.testing.assert_close(result.nckd_N.double(), nckd, rtol=1e-4, atol=0)


def test_hand_worked_value() -> None:
    """P_T = (1/2, 1/4, 1/4), P_S = (1/4, 1/2, 1/4), y = 0, T = 1.

    TCKD = 1/2 log 2 + 1/2 log(2/3); NCKD = 1/2 log(3/4) + 1/2 log(3/2).
    """
    teacher = torch.tensor([[0.5, 0.25, 0.25]]).log()
    student = torch.tensor([[0.25, 0.5, 0.25]]).log()
    result = decoupled_kd(student, teacher, torch.tensor([0]), temperature=1, alpha=1, beta=4)
    assert result.tckd_N.item() == pytest.approx(0.1438410, abs=1e-6)
    assert result.nckd_N.item() == pytest.approx(0.0588915, abs=1e-6)
    assert result.total_N.item() == pytest.approx(0.1438410 + 4 * 0.0588915, abs=1e-6)
    # 1/2 log 2 + 1/4 log(1/2)
    assert kullback_leibler(student, teacher, temperature=1).item() == pytest.approx(
        0.1732868, abs=1e-6
    )


@pytest.mark.parametrize(("vocabulary", "temperature"), [(2, 1.0), (5, 2.0), (9, 0.7)])
def test_gradcheck(vocabulary: int, temperature: float) -> None:
    student, teacher, labels = example(4, vocabulary, seed=5, spread=2.0)
    student.requires_grad_()

    def terms(student: Tensor) -> tuple[Tensor, ...]:
        plain = kullback_leibler(student, teacher, temperature=temperature)
        return *decoupled_kd(
            student, teacher, labels, temperature=temperature, alpha=1, beta=4
        ), plain

    assert torch.autograd.gradcheck(terms, (student,))


def test_gradient_reaches_the_student_only_and_inputs_stay() -> None:
    for dtype in (torch.float32, torch.float64):
        student, teacher, labels = example(4, 6, seed=6)
        student, teacher = student.to(dtype), teacher.to(dtype)
        copies = student.clone(), teacher.clone()
        student.requires_grad_()
        teacher.requires_grad_()
        result = decoupled_kd(student, teacher, labels, temperature=1, alpha=1, beta=4)
        plain = kullback_leibler(student, teacher, temperature=1)
        (result.total_N.sum() + plain.sum()).backward()
        assert teacher.grad is None
        assert student.grad is not None and bool(student.grad.any())
        assert torch.equal(student, copies[0]) and torch.equal(teacher, copies[1])


def test_few_full_size_tensors_wait_for_the_backward() -> None:
    """Beside the caller's own logits: log q of the student and q of the teacher."""
    student, teacher, labels = example(8, 500, seed=7)
    student, teacher = student.to(torch.bfloat16).requires_grad_(), teacher.to(torch.bfloat16)
    kept: set[int] = set()

    def remember(tensor: Tensor) -> Tensor:
        if tensor.numel() == student.numel() and tensor.data_ptr() != student.data_ptr():
            kept.add(tensor.data_ptr())
        return tensor

    def give(tensor: Any) -> Any:
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, give):
        result = decoupled_kd(student, teacher, labels, temperature=2, alpha=1, beta=4)
    assert len(kept) == 2
    result.total_N.sum().backward()


def test_mismatched_inputs_fail() -> None:
    student, teacher, labels = example(3, 5, seed=8)
    with pytest.raises(AssertionError, match="same tokens and vocabulary"):
        decoupled_kd(student, teacher[:, :4], labels, temperature=2, alpha=1, beta=4)
    with pytest.raises(AssertionError, match="same tokens and vocabulary"):
        kullback_leibler(student[:2], teacher, temperature=2)
    with pytest.raises(AssertionError, match="labels for 3 tokens"):
        decoupled_kd(student, teacher, labels[:2], temperature=2, alpha=1, beta=4)
    with pytest.raises((IndexError, RuntimeError)):
        decoupled_kd(student, teacher, labels - 100, temperature=2, alpha=1, beta=4)
