"""The fused head against autograd over whole logits, and what it must not do on the way."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from grace_core.config.objective import Distillation
from grace_core.errors import GraceError
from grace_core.losses import fused_head, kernel_choice, supervised_terms
from grace_core.losses.cross_entropy import cross_entropy_sum
from grace_core.losses.distillation import decoupled_kd, kullback_leibler
from grace_core.losses.fused_head import (
    ChunkRows,
    SupervisedHead,
    Supervision,
    TaughtRows,
    gates_of_rows,
    supervised_head,
    supervised_loss,
)
from grace_core.losses.gate import confidence_gate
from tests.tiny_models import FAMILIES

CROSS_ENTROPY_WEIGHT, DISTILLATION_WEIGHT = 0.7, 0.3
NUM_TOKENS, VOCABULARY, WIDTH, TEACHER_WIDTH = 37, 101, 24, 40
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
EVERYTHING = 2**30


@dataclass
class Problem:
    """Both models' heads and final states; leaves that want a gradient."""

    states: Tensor
    weight: Tensor
    bias: Tensor | None
    teacher_states: Tensor
    teacher_weight: Tensor
    labels: Tensor
    gates: Tensor
    distillation: Distillation

    @property
    def leaves(self) -> list[Tensor]:
        leaves = [self.states, self.weight]
        return leaves if self.bias is None else [*leaves, self.bias]

    def to(self, dtype: torch.dtype) -> Problem:
        """The same values in another dtype, with leaves of their own."""

        def cast(tensor: Tensor, requires_grad: bool = False) -> Tensor:
            return tensor.detach().to(dtype, copy=True).requires_grad_(requires_grad)

        return Problem(
            cast(self.states, True),
            cast(self.weight, True),
            None if self.bias is None else cast(self.bias, True),
            cast(self.teacher_states),
            cast(self.teacher_weight),
            self.labels,
            self.gates,
            self.distillation,
        )


def problem(
    kind: Any = "decoupled",
    *,
    bias: bool = False,
    tokens: int = NUM_TOKENS,
    vocabulary: int = VOCABULARY,
    width: int = WIDTH,
    teacher_width: int = TEACHER_WIDTH,
    device: str = "cpu",
    spread: float = 2.0,
) -> Problem:
    generator = torch.Generator(device).manual_seed(3)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=generator, device=device)

    found = Problem(
        normal(tokens, width),
        normal(vocabulary, width, scale=spread * width**-0.5),
        normal(vocabulary) if bias else None,
        normal(tokens, teacher_width),
        normal(vocabulary, teacher_width, scale=spread * teacher_width**-0.5),
        torch.randint(vocabulary, (tokens,), generator=generator, device=device),
        0.4 + 0.6 * torch.rand(tokens, generator=generator, device=device),
        Distillation(kind=kind, temperature=2.0),
    )
    return found.to(torch.float32)


def head_of(weight: Tensor, bias: Tensor | None = None) -> SupervisedHead:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=bias.requires_grad)
    return SupervisedHead(linear)


def supervision_of(given: Problem, logits_bytes: int = EVERYTHING) -> Supervision:
    teacher = None
    if given.distillation.kind != "none":
        teacher = TaughtRows(head_of(given.teacher_weight), given.teacher_states, given.gates)
    return Supervision(
        labels=given.labels,
        teacher=teacher,
        distillation=given.distillation,
        weights=torch.tensor(
            [CROSS_ENTROPY_WEIGHT, DISTILLATION_WEIGHT],
            dtype=torch.float64,
            device=given.states.device,
        ),
        logits_bytes=logits_bytes,
    )


@dataclass
class Found:
    loss: Tensor
    sums: Tensor
    gradients: list[Tensor]


def fused(given: Problem, logits_bytes: int = EVERYTHING, factor: float = 1.0) -> Found:
    head = head_of(given.weight, given.bias)
    loss, sums = supervised_loss(head, given.states, supervision_of(given, logits_bytes))
    (factor * loss).backward()
    gradients = [given.states.grad, head.weight.grad]
    if given.bias is not None:
        gradients.append(head.bias.grad)
    assert all(gradient is not None for gradient in gradients)
    return Found(loss.detach(), sums, gradients)  # type: ignore[arg-type]


def plain(given: Problem, factor: float = 1.0) -> Found:
    """Autograd through whole logits in the problem's dtype: as one would write it."""
    logits = F.linear(given.states, given.weight, given.bias)
    cross_entropy = cross_entropy_sum(logits, given.labels)
    settings = given.distillation
    distilled = torch.zeros_like(cross_entropy)
    if settings.kind != "none":
        taught = F.linear(given.teacher_states, given.teacher_weight)
        if settings.kind == "plain":
            terms = kullback_leibler(logits, taught, temperature=settings.temperature)
        else:
            terms = decoupled_kd(
                logits,
                taught,
                given.labels,
                temperature=settings.temperature,
                alpha=settings.alpha,
                beta=settings.beta_dkd,
            ).total_N
        distilled = (given.gates.to(terms.dtype) * terms).sum()
    loss = CROSS_ENTROPY_WEIGHT * cross_entropy + DISTILLATION_WEIGHT * distilled
    gradients = torch.autograd.grad(factor * loss, given.leaves)
    return Found(loss.detach(), torch.stack([cross_entropy, distilled]).detach(), list(gradients))


@pytest.fixture
def interpreted_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels where a CPU would take their twins, see `conftest.py`."""
    pytest.importorskip("triton")
    from grace_core.losses import kernels

    for module in (fused_head, supervised_terms):
        monkeypatch.setattr(module, "kernels_for", lambda *_: kernels)


def bytes_for(rows: int, given: Problem) -> int:
    """The least budget that holds so many of the student's rows."""
    found = next(
        n
        for n in range(0, 2**24, 512)
        if ChunkRows.within(n, given.weight, given.teacher_weight).student >= rows
    )
    assert ChunkRows.within(found, given.weight, given.teacher_weight).student == rows
    return found


def assert_close(found: Found, expected: Found, relative: float) -> None:
    pairs = [(found.loss, expected.loss), (found.sums, expected.sums)]
    pairs += list(zip(found.gradients, expected.gradients, strict=True))
    for ours, theirs in pairs:
        difference = float((ours.double() - theirs.double()).norm())
        assert difference <= relative * float(theirs.double().norm())


@pytest.mark.parametrize("kind", ["none", "plain", "decoupled"])
@pytest.mark.parametrize("rows", [1, 10, 100])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_autograd_over_whole_logits(kind: str, rows: int, bias: bool) -> None:
    given = problem(kind, bias=bias)
    expected = plain(given.to(torch.float64))
    budget = bytes_for(rows, given)
    exact = fused(given.to(torch.float64), budget)
    assert exact.loss.dtype == exact.sums.dtype == torch.float64
    assert_close(exact, expected, 1e-13)
    assert_close(fused(given.to(torch.float32), budget), expected, 1e-5)


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels run on the GPU: test_real_vocabulary_on_a_gpu"
)
@pytest.mark.parametrize("kind", ["none", "plain", "decoupled"])
def test_with_kernels(kind: str, interpreted_kernels: None) -> None:
    given = problem(kind)
    budget = bytes_for(15, given)
    assert_close(fused(given, budget, 0.3), plain(given.to(torch.float64), 0.3), 1e-5)


def compare_bf16(given: Problem, logits_bytes: int) -> None:
    """Loss within 1e-3; gradients at most 1.2 times as far from fp32 as the plain bf16 path."""
    rounded = given.to(torch.bfloat16)
    expected, ordinary = plain(rounded.to(torch.float32)), plain(rounded.to(torch.bfloat16))
    found = fused(rounded, logits_bytes)
    assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-3)
    assert found.sums.tolist() == pytest.approx(expected.sums.tolist(), rel=1e-3)
    for ours, theirs, exact in zip(
        found.gradients, ordinary.gradients, expected.gradients, strict=True
    ):
        assert ours.dtype == torch.bfloat16
        distance = float((ours.float() - exact).norm() / (theirs.float() - exact).norm())
        assert distance <= 1.2


@pytest.mark.parametrize("kind", ["none", "plain", "decoupled"])
@pytest.mark.parametrize("rows", [256, 155, 128, 30])  # chunks: one, two, two alike, many
@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_bf16_is_as_near_as_the_plain_path(kind: str, rows: int, spread: float) -> None:
    """With little spread the head's gradient has hardly an error but that of its own rounding."""
    given = problem(kind, tokens=256, vocabulary=1500, width=96, teacher_width=128, spread=spread)
    compare_bf16(given, bytes_for(rows, given.to(torch.bfloat16)))


class _LargestOfVocabulary(TorchDispatchMode):
    """Rows of the longest tensor made whose rows are as long as the vocabulary."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, Tensor) and tensor.shape[-1:] == (VOCABULARY,):
                self.rows = max(self.rows, tensor.numel() // VOCABULARY)
        return result


def test_whole_logits_never_exist() -> None:
    given = problem()
    with _LargestOfVocabulary() as seen:
        fused(given, bytes_for(12, given))
    # The weight's own transpose has a row for each width.
    assert seen.rows == max(12, WIDTH, TEACHER_WIDTH)
    assert seen.rows < NUM_TOKENS + TEACHER_WIDTH
    with _LargestOfVocabulary() as seen:
        fused(narrow := problem(width=8, teacher_width=8), bytes_for(12, narrow))
    assert seen.rows == 12


@pytest.mark.parametrize(
    ("trained", "student_products"),
    [("both", 3), ("states", 2), ("head", 2), ("neither", 1), ("no_grad", 1)],
)
def test_no_product_is_made_twice_or_in_vain(trained: str, student_products: int) -> None:
    given = problem()
    given.states.requires_grad_(trained in ("both", "states", "no_grad"))
    given.weight.requires_grad_(trained in ("both", "head", "no_grad"))
    head = head_of(given.weight)
    supervision = supervision_of(given, bytes_for(10, given))
    with FlopCounterMode(display=False) as counted, torch.set_grad_enabled(trained != "no_grad"):
        loss, _ = supervised_loss(head, given.states, supervision)
        if loss.requires_grad:
            loss.backward()
    assert loss.requires_grad == (trained in ("both", "states", "head"))
    products = student_products * WIDTH + TEACHER_WIDTH
    assert counted.get_total_flops() == 2 * NUM_TOKENS * VOCABULARY * products
    assert (given.states.grad is not None) == (trained in ("both", "states"))
    assert (head.weight.grad is not None) == (trained in ("both", "head"))


@pytest.mark.parametrize("factor", [1.0, 2.0, 0.3])
def test_the_loss_may_be_scaled(factor: float) -> None:
    given = problem()
    assert_close(fused(given, factor=factor), plain(given.to(torch.float64), factor), 1e-5)
    unscaled = fused(given.to(torch.bfloat16)).gradients[1].float()
    scaled = fused(given.to(torch.bfloat16), factor=factor).gradients[1]
    assert torch.equal(scaled, (factor * unscaled).bfloat16())


def test_the_gradients_are_given_once() -> None:
    given = problem()
    loss, _ = supervised_loss(head_of(given.weight), given.states, supervision_of(given))
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="taken already"):
        loss.backward()


def test_the_gradient_is_handed_over_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    scale = fused_head._scale_

    def watched(tensor: Tensor, factor: Tensor) -> None:
        made.append(tensor.data_ptr())
        scale(tensor, factor)

    monkeypatch.setattr(fused_head, "_scale_", watched)
    found = fused(problem())
    assert [gradient.data_ptr() for gradient in found.gradients] == made


def test_no_rows() -> None:
    given = problem(tokens=0)
    found = fused(given)
    assert float(found.loss) == 0 and found.sums.tolist() == [0, 0]
    assert not found.gradients[1].any()
    gates = gates_of_rows(head_of(given.teacher_weight), given.teacher_states, logits_bytes=1)
    assert gates.shape == (0,)


def test_a_label_that_is_no_token_is_refused() -> None:
    given = problem()
    given.labels[3] = VOCABULARY
    with pytest.raises(IndexError):
        fused(given)


@pytest.mark.parametrize("logits_bytes", [1, 5_000, EVERYTHING])
def test_gates_of_rows(logits_bytes: int) -> None:
    given = problem()
    found = gates_of_rows(
        head_of(given.teacher_weight), given.teacher_states, logits_bytes=logits_bytes
    )
    logits = F.linear(given.teacher_states.double(), given.teacher_weight.double())
    torch.testing.assert_close(found.double(), confidence_gate(logits), rtol=1e-5, atol=0)


def test_chunks_keep_to_the_budget() -> None:
    weight = torch.empty(151_936, 1, dtype=torch.bfloat16, device="meta")
    per_row = 151_936 * (2 + (2 + supervised_terms.PLAIN_BYTES) / 5)
    for mib in (1, 100, 896, 5_000):
        rows = ChunkRows.within(mib * 2**20, weight, weight)
        assert rows.student * per_row <= mib * 2**20 or rows.student == 1
        assert rows.student < 640 or rows.student % 640 == 0
        assert rows.teacher == max(1, rows.student // 5)


def test_chunks_with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default budget and the real vocabulary: few additions to the head's gradient."""
    monkeypatch.setattr(fused_head, "kernels_for", lambda *_: object())
    weight = torch.empty(151_936, 1, dtype=torch.bfloat16, device="meta")
    assert ChunkRows.within(896 * 2**20, weight, weight) == ChunkRows(2560, 512)


# --- the module in the model ----------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_model_looks_the_same_with_it(name: str) -> None:
    model = FAMILIES[name]()
    before = model.state_dict()
    parameters = dict(model.named_parameters())
    states = torch.randn(3, model.config.get_text_config().hidden_size)
    logits = model.lm_head(states)
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert tied == (name != "llava")

    head = supervised_head(model)
    assert supervised_head(model) is head is model.lm_head is model.get_output_embeddings()
    assert model.state_dict().keys() == before.keys()
    after = dict(model.named_parameters())
    assert after.keys() == parameters.keys()
    assert all(after[n] is parameters[n] for n in parameters)
    assert tied == (head.weight is model.get_input_embeddings().weight)
    assert torch.equal(model.lm_head(states), logits)


def test_a_tied_head_adds_to_the_embedding() -> None:
    given = problem(width=TEACHER_WIDTH)
    ids = torch.tensor([4, 4, 99])
    embedding = nn.Embedding(VOCABULARY, TEACHER_WIDTH)
    embedding.weight = nn.Parameter(given.weight.detach())
    head = head_of(given.weight)
    head.weight = embedding.weight
    loss, _ = supervised_loss(head, given.states, supervision_of(given))
    (2.0 * loss + embedding(ids).sum()).backward()
    expected = plain(given.to(torch.float64), 2.0).gradients[1]
    expected[4] += 2
    expected[99] += 1
    assert embedding.weight.grad is not None
    torch.testing.assert_close(embedding.weight.grad.double(), expected, rtol=1e-5, atol=1e-5)


def test_another_kind_of_head_is_refused() -> None:
    model = nn.Module()
    model.lm_head = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(GraceError, match="Sequential, not a plain linear layer"):
        supervised_head(model)


# --- kernels or twins -----------------------------------------------------------------------------


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    kernel_choice._warn.cache_clear()
    with caplog.at_level(logging.INFO, kernel_choice.__name__):
        yield caplog
    kernel_choice._warn.cache_clear()


class _OnGpu:
    """What the choice looks at, of a matrix on a GPU."""

    is_cuda = True

    def __init__(self, dtype: torch.dtype = torch.bfloat16, stride: int = 1) -> None:
        self.dtype = dtype
        self._stride = stride

    def stride(self, _: int) -> int:
        return self._stride


def test_a_cpu_takes_the_twins_without_a_word(said: pytest.LogCaptureFixture) -> None:
    assert kernel_choice.kernels_for(torch.zeros(2, 2)) is None
    assert said.messages == []


def test_a_gpu_takes_the_kernels(said: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("triton")
    chosen = kernel_choice.kernels_for(_OnGpu(), _OnGpu(torch.float32))  # type: ignore[arg-type]
    assert chosen is not None and chosen.__name__ == "grace_core.losses.kernels"
    assert said.messages == []


@pytest.mark.parametrize(
    ("matrix", "reason"),
    [(_OnGpu(torch.float16), "float16"), (_OnGpu(stride=2), "gaps"), (_OnGpu(), "not installed")],
)
def test_a_gpu_without_them_says_why_once(
    matrix: Any, reason: str, said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason == "not installed":
        monkeypatch.setattr(kernel_choice.importlib.util, "find_spec", lambda _: None)
    for _ in range(3):
        assert kernel_choice.kernels_for(matrix) is None
    assert len(said.messages) == 1 and reason in said.messages[0]


# --- at real size, on a GPU -----------------------------------------------------------------------


@CUDA
@pytest.mark.parametrize("kind", ["none", "plain", "decoupled"])
@pytest.mark.parametrize("mib", [896, 80])  # one chunk, and several
def test_real_vocabulary_on_a_gpu(kind: str, mib: int) -> None:
    given = problem(
        kind, tokens=512, vocabulary=151_936, width=2048, teacher_width=4096, device="cuda"
    )
    compare_bf16(given, mib * 2**20)


@CUDA
def test_two_chunks_at_real_size_on_a_gpu() -> None:
    given = problem(
        tokens=4096, vocabulary=151_936, width=2048, teacher_width=4096, device="cuda", spread=0.5
    )
    heads = given.weight.bfloat16(), given.teacher_weight.bfloat16()
    assert ChunkRows.within(896 * 2**20, *heads) == ChunkRows(2560, 512)
    compare_bf16(given, 896 * 2**20)


@CUDA
def test_memory_at_real_size_on_a_gpu() -> None:
    """At most 1.5 GiB beside inputs and weights, the gradients returned included."""
    given = problem(
        tokens=4096, vocabulary=151_936, width=2048, teacher_width=4096, device="cuda"
    ).to(torch.bfloat16)
    head = head_of(given.weight)
    supervision = supervision_of(given, 896 * 2**20)
    for _ in range(2):  # the first call loads libraries and compiles
        given.states.grad = head.weight.grad = None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss, _ = supervised_loss(head, given.states, supervision)
        loss.backward()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    assert loss.isfinite()
    assert peak <= 1.5 * 2**30
