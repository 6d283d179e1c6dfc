"""The losses' Triton kernels against the equations in float64; interpreted where no GPU is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from grace_core.config.objective import Distillation
from grace_core.losses.cross_entropy import cross_entropy_sum
from grace_core.losses.distillation import decoupled_kd, kullback_leibler
from grace_core.losses.gate import confidence_gate

pytest.importorskip("triton")
# Interpreted by numpy, which mentions values that the kernel then replaces.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Without a GPU kernels are interpreted, see `conftest.py`."""

KINDS = ("none", "plain", "decoupled")
CROSS_ENTROPY_WEIGHT, DISTILLATION_WEIGHT = 0.7, 0.3
FULL_TILE = 4096
"""Logits that a program takes at a time."""

BF16_STEP = 2.0**-7 if DEVICE == "cpu" else 2.0**-8
"""Triton's interpreter truncates to bf16 where a GPU rounds."""


def kernels() -> Any:
    from grace_core.losses import kernels

    return kernels


def example(
    num_tokens: int, vocabulary: int, *, spread: float = 3.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits of student and teacher, labels (its edges among them) and gates."""
    generator = torch.Generator().manual_seed(seed)
    student = spread * torch.randn(num_tokens, vocabulary, generator=generator)
    teacher = spread * torch.randn(num_tokens, vocabulary, generator=generator)
    labels = torch.randint(vocabulary, (num_tokens,), generator=generator)
    labels[:2] = torch.tensor([0, vocabulary - 1])[:num_tokens]
    gates = 0.4 + 0.6 * torch.rand(num_tokens, generator=generator)
    return student, teacher, labels, gates


def expected(
    student: Tensor, teacher: Tensor, labels: Tensor, gates: Tensor, settings: Distillation
) -> tuple[Tensor, Tensor]:
    """Sums and gradient in float64; the functions have oracles of their own."""
    logits = student.double().requires_grad_()
    cross_entropy = cross_entropy_sum(logits, labels)
    per_token = torch.zeros(len(labels), dtype=torch.float64)
    if settings.kind == "plain":
        per_token = kullback_leibler(logits, teacher.double(), temperature=settings.temperature)
    elif settings.kind == "decoupled":
        per_token = decoupled_kd(
            logits,
            teacher.double(),
            labels,
            temperature=settings.temperature,
            alpha=settings.alpha,
            beta=settings.beta_dkd,
        ).total_N
    distilled = (gates.double() * per_token).sum()
    loss = CROSS_ENTROPY_WEIGHT * cross_entropy + DISTILLATION_WEIGHT * distilled
    (gradient,) = torch.autograd.grad(loss, logits)
    return torch.stack([cross_entropy, distilled]).detach(), gradient


def run(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    gates: Tensor,
    settings: Distillation,
    *,
    with_gradient: bool = True,
) -> tuple[Tensor, Tensor]:
    """Sums, and what lies where the student's logits were."""
    distils = settings.kind != "none"
    logits = student.to(DEVICE, copy=True)
    sums = kernels().terms_and_gradient_(
        logits,
        teacher.to(DEVICE) if distils else None,
        labels.to(DEVICE),
        gates.to(DEVICE) if distils else None,
        distillation=settings,
        weights=torch.tensor([CROSS_ENTROPY_WEIGHT, DISTILLATION_WEIGHT], device=DEVICE),
        with_gradient=with_gradient,
    )
    return sums.cpu(), logits.cpu()


def settings_of(kind: Any, temperature: float = 2.0) -> Distillation:
    return Distillation(kind=kind, temperature=temperature, alpha=1.3, beta_dkd=3.5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("vocabulary", [2, 1031, FULL_TILE, 2 * FULL_TILE + 1])
def test_sums_and_gradient(kind: str, temperature: float, vocabulary: int) -> None:
    settings = settings_of(kind, temperature)
    given = example(3, vocabulary, seed=vocabulary)
    sums, gradient = expected(*given, settings)
    found, found_gradient = run(*given, settings)
    torch.testing.assert_close(found.double(), sums, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found_gradient.double(), gradient, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_logits(kind: str) -> None:
    student, teacher, labels, gates = example(5, 700)
    student, teacher = student.bfloat16(), teacher.bfloat16()
    sums, gradient = expected(student, teacher, labels, gates, settings_of(kind))
    found, found_gradient = run(student, teacher, labels, gates, settings_of(kind))
    assert found.dtype == torch.float32 and found_gradient.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), sums, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found_gradient.double(), gradient, rtol=BF16_STEP, atol=1e-7)


# Probabilities as far from 0 and 1 as exp(-20000); every row against every label.
EXTREME = torch.tensor(
    [[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [0.0, 1e-3, -1e-3], [30.0, 0.0, -30.0], [1e4, 1e4, 1e4]]
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [2.0, 1.5])
def test_extreme_logits(kind: str, temperature: float) -> None:
    size, vocabulary = EXTREME.shape
    student = EXTREME.repeat_interleave(size * vocabulary, 0)
    teacher = EXTREME.repeat_interleave(vocabulary, 0).repeat(size, 1)
    labels = torch.arange(vocabulary).repeat(size * size)
    gates = torch.ones(len(labels))
    for row in range(len(labels)):
        one = slice(row, row + 1)
        given = student[one], teacher[one], labels[one], gates[one]
        sums, gradient = expected(*given, settings_of(kind, temperature))
        found, found_gradient = run(*given, settings_of(kind, temperature))
        torch.testing.assert_close(found.double(), sums, rtol=2e-6, atol=1e-5)
        torch.testing.assert_close(found_gradient.double(), gradient, rtol=2e-6, atol=2e-6)


def test_a_confident_and_right_model_keeps_its_digits() -> None:
    """The loss of a target at 1 - 1e-9 is 1e-9, not the rounding of 1."""
    logits = torch.tensor([[21.0, 0.0, -1.0]])
    given = logits, logits.flip(1), torch.tensor([0]), torch.ones(1)
    sums, gradient = expected(*given, settings_of("none"))
    found, found_gradient = run(*given, settings_of("none"))
    torch.testing.assert_close(found.double(), sums, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(found_gradient.double(), gradient, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("kind", ["plain", "decoupled"])
def test_equal_distributions_have_no_distillation(kind: str) -> None:
    student, _, labels, gates = example(4, 5000)
    found, with_both = run(student, student, labels, gates, settings_of(kind))
    _, cross_entropy_alone = run(student, student, labels, gates, settings_of("none"))
    assert found[1] == 0
    torch.testing.assert_close(with_both, cross_entropy_alone, rtol=1e-5, atol=1e-7)


def test_without_gradient_the_logits_stay() -> None:
    given = example(3, 200)
    sums, _ = expected(*given, settings_of("decoupled"))
    found, logits = run(*given, settings_of("decoupled"), with_gradient=False)
    assert torch.equal(logits, given[0])
    torch.testing.assert_close(found.double(), sums, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("label", [-1, -100, 50, 2**32, 2**40])
def test_a_label_that_is_no_token_spoils_the_loss(label: int) -> None:
    student, teacher, labels, gates = example(3, 50)
    labels[1] = label
    found, gradient = run(student, teacher, labels, gates, settings_of("decoupled"))
    assert found.isnan().all()
    assert gradient[1].isnan().all() and gradient[[0, 2]].isfinite().all()


def test_rows_may_lie_apart() -> None:
    wide = torch.zeros(3, 300, device=DEVICE)
    student, teacher, labels, gates = example(3, 200)
    wide[:, :200] = student.to(DEVICE)
    settings = settings_of("decoupled")
    _, gradient = expected(student, teacher, labels, gates, settings)
    kernels().terms_and_gradient_(
        wide[:, :200],
        teacher.to(DEVICE),
        labels.to(DEVICE),
        gates.to(DEVICE),
        distillation=settings,
        weights=torch.tensor([CROSS_ENTROPY_WEIGHT, DISTILLATION_WEIGHT], device=DEVICE),
        with_gradient=True,
    )
    torch.testing.assert_close(wide[:, :200].cpu().double(), gradient, rtol=2e-5, atol=1e-7)
    assert not wide[:, 200:].any()


def test_no_rows() -> None:
    found, _ = run(*example(0, 20), settings_of("decoupled"))
    assert found.tolist() == [0.0, 0.0]
    assert kernels().confidence_gate(torch.zeros(0, 20, device=DEVICE)).shape == (0,)


@pytest.mark.parametrize("vocabulary", [2, 1031, FULL_TILE + 1])
@pytest.mark.parametrize("spread", [0.0, 1e-3, 3.0, 100.0])
def test_gate(vocabulary: int, spread: float) -> None:
    _, teacher, _, _ = example(4, vocabulary, spread=spread)
    found = kernels().confidence_gate(teacher.to(DEVICE)).cpu()
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.double(), confidence_gate(teacher.double()), rtol=2e-6, atol=0.0
    )


def test_gate_of_extreme_logits() -> None:
    found = kernels().confidence_gate(EXTREME.to(DEVICE)).cpu()
    torch.testing.assert_close(
        found.double(), confidence_gate(EXTREME.double()), rtol=2e-6, atol=0.0
    )


@pytest.mark.parametrize("what", ["terms", "gate"])
def test_a_logit_that_is_no_number_is_seen(what: str) -> None:
    student, teacher, labels, gates = example(2, 300)
    teacher[1, 7] = float("nan")
    if what == "terms":
        found, _ = run(student, teacher, labels, gates, settings_of("decoupled"))
        assert found[1].isnan()
    else:
        found = kernels().confidence_gate(teacher.to(DEVICE)).cpu()
        assert found.isnan().tolist() == [False, True]


@pytest.mark.parametrize("factor", [1.0, 2.0, 0.3, 0.0])
def test_scaling_rounds_once(factor: float) -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    tensor = values.to(DEVICE, copy=True)
    kernels().scale_(tensor, torch.tensor(factor, device=DEVICE))
    exact = values.double() * torch.tensor(factor).double()
    torch.testing.assert_close(tensor.cpu().double(), exact, rtol=BF16_STEP, atol=0.0)
    if factor in (1.0, 2.0):
        assert torch.equal(tensor.cpu().double(), exact)
