"""Distillation from a truncated teacher against explicit probabilities in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grace_core.config.objective import Distillation
from grace_core.losses.distillation import decoupled_kd, kullback_leibler
from grace_core.losses.fused_head import SupervisedHead, truncated_rows
from grace_core.losses.truncated_distillation import truncated_distillation
from grace_core.losses.truncated_teacher import TruncatedRows, truncated
from grace_core.losses.truncated_terms import (
    fused_truncated_terms_and_gradient_,
    plain_truncated_terms_and_gradient_,
    truncated_terms_and_gradient_,
)

TOKENS, VOCABULARY = 7, 50
ALL = VOCABULARY - 1
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Without a GPU kernels are interpreted, see `conftest.py`."""

BF16_STEP = 2.0**-7 if DEVICE == "cpu" else 2.0**-8
"""Triton's interpreter truncates to bf16 where a GPU rounds."""

WEIGHTS = {"weights": torch.tensor([0.7, 0.3], dtype=torch.float64, device=DEVICE)}
KINDS = ("gated-decoupled", "plain")

# Interpreted by numpy, which mentions values that the kernel then replaces.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")


def example(
    num_tokens: int = TOKENS, vocabulary: int = VOCABULARY, *, spread: float = 3.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 logits of student and teacher, and labels: the teacher's best and worst among them."""
    generator = torch.Generator().manual_seed(seed)
    student = spread * torch.randn(num_tokens, vocabulary, generator=generator)
    teacher = spread * torch.randn(num_tokens, vocabulary, generator=generator)
    labels = torch.randint(vocabulary, (num_tokens,), generator=generator)
    labels[0], labels[1] = teacher[0].argmax(), teacher[1].argmin()
    return student, teacher, labels


def on_device(rows: TruncatedRows) -> TruncatedRows:
    return rows.moved(lambda tensor: tensor.to(DEVICE))


def by_classes(
    student: Tensor, teacher: Tensor, labels: Tensor, top_k: int, settings: Distillation
) -> Tensor:
    """(N,) float64: the divergences of Eq. 1-3 over target, k others and their complement."""
    losses = []
    for z_s, z_t, y in zip(student.double(), teacher.double(), labels.tolist(), strict=True):
        p_s, p_t = (torch.softmax(z / settings.temperature, 0) for z in (z_s, z_t))
        others = sorted((j for j in range(len(z_t)) if j != y), key=lambda j: -float(z_t[j]))
        kept, tail = others[:top_k], others[top_k:]
        cells = [[y], *([j] for j in kept)] + ([tail] if tail else [])
        c_s, c_t = (torch.stack([p[cell].sum() for cell in cells]) for p in (p_s, p_t))
        if settings.kind == "plain":
            loss = (c_t * (c_t / c_s).log()).sum()
        else:
            target_s, target_t = (torch.stack([c[0], c[1:].sum()]) for c in (c_s, c_t))
            rest_s, rest_t = c_s[1:] / c_s[1:].sum(), c_t[1:] / c_t[1:].sum()
            loss = settings.alpha * (target_t * (target_t / target_s).log()).sum()
            loss = loss + settings.beta_dkd * (rest_t * (rest_t / rest_s).log()).sum()
        losses.append(settings.temperature**2 * loss)
    return torch.stack(losses)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [1, 5, 48, ALL, 1000])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
def test_the_loss_is_that_of_the_classes(kind: str, top_k: int, temperature: float) -> None:
    settings = Distillation(kind=kind, temperature=temperature, alpha=1.5, beta_dkd=3.0)
    student, teacher, labels = example()
    kept = truncated(teacher, labels, top_k=top_k, temperature=temperature)
    found = truncated_distillation(settings, student, labels, kept)
    expected = by_classes(student, teacher, labels, top_k, settings)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_all_logits_kept_give_the_exact_loss(kind: str) -> None:
    settings = Distillation(kind=kind)
    student, teacher, labels = (t.double() if t.is_floating_point() else t for t in example())
    kept = truncated(teacher, labels, top_k=ALL, temperature=settings.temperature)
    found = truncated_distillation(settings, student, labels, kept)
    if kind == "plain":
        exact = kullback_leibler(student, teacher, temperature=2.0)
    else:
        exact = decoupled_kd(student, teacher, labels, temperature=2.0, alpha=1.0, beta=4.0).total_N
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)


def test_it_never_exceeds_the_exact_loss_and_grows_with_k() -> None:
    settings = Distillation(alpha=0.0, beta_dkd=1.0)
    student, teacher, labels = (t.double() if t.is_floating_point() else t for t in example())
    exact = decoupled_kd(student, teacher, labels, temperature=2.0, alpha=0.0, beta=1.0).nckd_N
    before = torch.zeros(TOKENS, dtype=torch.float64)
    for top_k in range(1, ALL + 1):
        kept = truncated(teacher, labels, top_k=top_k, temperature=2.0)
        now = truncated_distillation(settings, student, labels, kept)
        # Tails are kept in fp32.
        assert (now >= before - 1e-6).all() and (now <= exact + 1e-6).all()
        before = now


def test_what_is_lost_is_the_divergence_within_the_tail() -> None:
    student, teacher, labels = (t.double() if t.is_floating_point() else t for t in example())
    top_k, temperature = 6, 2.0
    exact = decoupled_kd(student, teacher, labels, temperature=2.0, alpha=0.0, beta=1.0).nckd_N
    kept = truncated(teacher, labels, top_k=top_k, temperature=temperature)
    settings = Distillation(alpha=0.0, beta_dkd=1.0)
    found = truncated_distillation(settings, student, labels, kept)
    for token in range(TOKENS):
        in_tail = torch.ones(VOCABULARY, dtype=torch.bool)
        in_tail[kept.ids[token].long()] = False
        in_tail[labels[token]] = False
        p_t, p_s = (torch.softmax(z[token][in_tail] / temperature, 0) for z in (teacher, student))
        rest = torch.arange(VOCABULARY) != labels[token]
        q_t = torch.exp(teacher[token] / temperature)
        mass = q_t[in_tail].sum() / q_t[rest].sum()
        lost = temperature**2 * mass * (p_t * (p_t / p_s).log()).sum()
        assert float(exact[token] - found[token]) == pytest.approx(float(lost), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_agree_with_finite_differences(kind: str) -> None:
    settings = Distillation(kind=kind, temperature=1.5, alpha=1.5, beta_dkd=3.0)
    student, teacher, labels = example(3, 12)
    kept = truncated(teacher.double(), labels, top_k=4, temperature=1.5)

    def loss(logits: Tensor) -> Tensor:
        return truncated_distillation(settings, logits, labels, kept)

    assert torch.autograd.gradcheck(loss, student.double().requires_grad_())


def test_what_is_kept_of_the_teacher() -> None:
    _, teacher, labels = example()
    teacher = teacher.bfloat16()
    kept = truncated(teacher, labels, top_k=5, temperature=2.0)
    for row, label, ids in zip(teacher, labels.tolist(), kept.ids.tolist(), strict=True):
        order = sorted((j for j in range(VOCABULARY) if j != label), key=lambda j: -float(row[j]))
        assert sorted(float(row[j]) for j in ids) == sorted(float(row[j]) for j in order[:5])
        assert label not in ids and len(set(ids)) == 5
    assert kept.logits.dtype == kept.target_logits.dtype == torch.bfloat16
    assert torch.equal(kept.logits, teacher.gather(1, kept.ids.long()))
    assert torch.equal(kept.target_logits, teacher[torch.arange(TOKENS), labels])
    p = torch.softmax(teacher.double(), -1)
    entropy = -(p * p.log()).sum(-1) / math.log(VOCABULARY)
    torch.testing.assert_close(kept.gates.double(), torch.exp(-entropy), rtol=1e-5, atol=0)


@pytest.mark.parametrize("top_k", [4, ALL])
@pytest.mark.parametrize("spread", [40.0, 400.0])
def test_extreme_logits_stay_finite(top_k: int, spread: float) -> None:
    student, teacher, labels = example(spread=spread)
    kept = truncated(teacher, labels, top_k=top_k, temperature=0.5)
    for compute in (plain_truncated_terms_and_gradient_, fused()):
        logits = student.clone().to(DEVICE)
        sums = compute(
            logits,
            labels.to(DEVICE),
            on_device(kept),
            distillation=Distillation(temperature=0.5),
            with_gradient=True,
            **WEIGHTS,
        )
        assert sums.isfinite().all() and logits.isfinite().all()


def fused() -> Callable[..., Tensor]:
    pytest.importorskip("triton")
    return fused_truncated_terms_and_gradient_


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("vocabulary", "top_k"), [(50, 1), (50, 16), (50, 49), (4096, 32), (9001, 64)]
)
def test_the_kernels_agree_with_autograd_in_float64(kind: str, vocabulary: int, top_k: int) -> None:
    settings = Distillation(kind=kind, temperature=2.0, alpha=1.5, beta_dkd=3.0)
    student, teacher, labels = example(5, vocabulary)
    kept = truncated(teacher, labels, top_k=top_k, temperature=2.0)
    exact = student.double()
    expected = plain_truncated_terms_and_gradient_(
        exact, labels, kept, distillation=settings, with_gradient=True, **WEIGHTS
    )
    logits = student.clone().to(DEVICE)
    inputs = (labels.to(DEVICE), on_device(kept))
    sums = fused()(logits, *inputs, distillation=settings, with_gradient=True, **WEIGHTS)
    torch.testing.assert_close(sums.cpu().double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.cpu().double(), exact, rtol=1e-4, atol=1e-7)
    again = student.clone().to(DEVICE)
    same = fused()(again, *inputs, distillation=settings, with_gradient=False, **WEIGHTS)
    assert torch.equal(same, sums)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_kernels_in_bf16(kind: str, temperature: float) -> None:
    settings = Distillation(kind=kind, temperature=temperature)
    student, teacher, labels = example(5, 300)
    student, teacher = student.bfloat16(), teacher.bfloat16()
    kept = truncated(teacher, labels, top_k=20, temperature=temperature)
    exact = student.double()
    expected = plain_truncated_terms_and_gradient_(
        exact, labels, kept, distillation=settings, with_gradient=True, **WEIGHTS
    )
    logits = student.clone().to(DEVICE)
    sums = fused()(
        logits,
        labels.to(DEVICE),
        on_device(kept),
        distillation=settings,
        with_gradient=True,
        **WEIGHTS,
    )
    torch.testing.assert_close(sums.cpu().double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.cpu().double(), exact, rtol=BF16_STEP, atol=1e-6)


def test_no_rows() -> None:
    student, teacher, labels = example()
    kept = truncated(teacher, labels, top_k=4, temperature=2.0).part(slice(0, 0))
    for compute in (plain_truncated_terms_and_gradient_, fused()):
        sums = compute(
            student[:0].to(DEVICE),
            labels[:0].to(DEVICE),
            on_device(kept),
            distillation=Distillation(),
            with_gradient=True,
            **WEIGHTS,
        )
        assert sums.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("logits_bytes", [1, 2**30])
def test_rows_of_the_head_come_in_chunks(logits_bytes: int) -> None:
    generator = torch.Generator().manual_seed(3)
    head = SupervisedHead(nn.Linear(8, VOCABULARY))
    states = torch.randn(TOKENS, 8, generator=generator)
    _, _, labels = example()
    found = truncated_rows(
        head, states, labels, top_k=4, temperature=2.0, logits_bytes=logits_bytes
    )
    logits = F.linear(states, head.weight, head.bias).detach()
    expected = truncated(logits, labels, top_k=4, temperature=2.0)
    for name, value in vars(expected).items():
        torch.testing.assert_close(getattr(found, name), value)


@CUDA
def test_at_real_size_on_a_gpu() -> None:
    """Values and gradients of bf16 logits over a real vocabulary, and the time they take."""
    tokens, vocabulary, top_k = 4096, 151_936, 128
    generator = torch.Generator("cuda").manual_seed(0)
    student, teacher = (
        (3 * torch.randn(tokens, vocabulary, device="cuda", generator=generator)).bfloat16()
        for _ in range(2)
    )
    labels = torch.randint(vocabulary, (tokens,), device="cuda", generator=generator)
    settings = Distillation()
    kept = truncated(teacher, labels, top_k=top_k, temperature=settings.temperature)
    del teacher
    some = slice(0, 64)
    exact = student[some].double()
    expected = plain_truncated_terms_and_gradient_(
        exact, labels[some], kept.part(some), distillation=settings, with_gradient=True, **WEIGHTS
    )
    part = student[some].clone()
    sums = truncated_terms_and_gradient_(
        part, labels[some], kept.part(some), distillation=settings, with_gradient=True, **WEIGHTS
    )
    torch.testing.assert_close(sums.double(), expected, rtol=1e-4, atol=0)
    error = torch.linalg.vector_norm(part.double() - exact) / torch.linalg.vector_norm(exact)
    assert error < 2.0**-8
    seconds = []
    for _ in range(4):
        logits = student.clone()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        truncated_terms_and_gradient_(
            logits, labels, kept, distillation=settings, with_gradient=True, **WEIGHTS
        )
        end.record()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end))
    print(f"truncated GDKD and CE, {tokens} x {vocabulary}, k = {top_k}: {min(seconds):.2f} ms")


def test_a_part_keeps_every_field() -> None:
    _, teacher, labels = example()
    kept = truncated(teacher, labels, top_k=4, temperature=2.0)
    part = kept.part(slice(2, 4))
    assert len(part) == 2 and torch.equal(part.ids, kept.ids[2:4])
    assert isinstance(replace(part, gates=torch.ones(2)), TruncatedRows)
