"""The rows of the table that need one device and no optimizer.

Every row times the project's own code, and beside it the plain implementation (`plain`) on the
same inputs. A cycle of n micro-batches is timed whole, with what is done once in it, and given for
one micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from grace_core.bench import floors, plain
from grace_core.bench.floors import Work
from grace_core.bench.measure import Runner
from grace_core.bench.shapes import GROUP_SIZE
from grace_core.bench.workbench import BITS, Workbench
from grace_core.losses.cross_entropy import cross_entropy_sum
from grace_core.losses.fused_head import (
    SupervisedHead,
    Supervision,
    TaughtRows,
    gates_of_rows,
    supervised_loss,
)
from grace_core.losses.supervised_terms import gates_of_logits, terms_and_gradient_
from grace_core.quantization.convert import quantizable_linears
from grace_core.quantization.lsq import fake_quantize
from grace_core.quantization.straight_through import GradientShare
from grace_core.toy.checkpoints import Role

HEAD_STD = 0.02
"""Standard deviation of a random head's weights, as transformers initialises it."""


@dataclass(frozen=True)
class Goal:
    """What is asked for on one H200."""

    milliseconds: float | None = None
    memory_gib: float | None = None


@dataclass(frozen=True)
class Prepared:
    """A row ready to be timed."""

    ours: Runner
    plain: Runner
    work: Work
    """The least that one micro-batch must do."""

    upper_work: Work | None = None
    """The same with what cannot be avoided when memory is short: see the row's description."""

    tokens: int | None = None
    """Of one run on one process, where the row is about throughput."""


Prepare = Callable[[Workbench], AbstractContextManager[Prepared]]


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    """What `--rows` calls it."""

    title: str
    goal: Goal
    prepare: Prepare


@contextmanager
def step(
    bench: Workbench, *, samples: int, accumulation: int, quantized: bool
) -> Iterator[Prepared]:
    """Teacher forward, student forward and backward; no optimizer.

    With `quantized` the student's weights are fake-quantized, and what is done once per optimizer
    step is shared by `accumulation` micro-batches. The larger floor recomputes the decoder.
    """
    bench.recompute_for(samples)
    rows = bench.rows(samples, accumulation)
    batch = bench.batch(rows[0], samples)
    shapes = bench.shapes
    work, upper = (floors.step(shapes, samples, recomputed=again) for again in (False, True))
    if quantized:
        weights = floors.decoder_weights(shapes.config("student"))
        once = floors.fake_quantization(weights, GROUP_SIZE).times(1 / accumulation)
        work, upper = work + once, upper + once
    with bench.quantized() if quantized else nullcontext((None, None)) as (bank, cycle):

        def reset() -> None:
            bench.drop_gradients()
            if bank is not None:
                bank.zero_grad()

        w_hat = [] if cycle is None else cycle.weights
        yield Prepared(
            ours=Runner(
                partial(bench.cycle, rows, cycle),
                reset,
                micro_batches=accumulation,
                warm_up=partial(bench.cycle, rows[:1], cycle),
                held_bytes=sum(weight.nbytes for weight in w_hat),
            ),
            plain=Runner(partial(bench.plain_step, batch), reset),
            work=work,
            upper_work=upper,
        )


@contextmanager
def gated_distillation(bench: Workbench) -> Iterator[Prepared]:
    """L_GDKD from given logits of both models, gates included, forward and backward.

    Ours leaves the gradient where the student's logits were. The larger floor reads both twice, as
    no chip keeps a row of logits between normalisers and gradient.
    """
    tokens, vocabulary = bench.shapes.loss_tokens, bench.vocabulary
    student, teacher = (
        torch.randn(tokens, vocabulary, device=bench.device, dtype=bench.dtype) for _ in range(2)
    )
    overwritten = student.clone()
    student.requires_grad_()
    labels = torch.randint(vocabulary, (tokens,), device=bench.device)

    def in_place() -> Tensor:
        gates = gates_of_logits(teacher)
        weights = torch.stack([gates.new_zeros(()), 1.0 / gates.sum()])
        sums = terms_and_gradient_(
            overwritten,
            teacher,
            labels,
            gates,
            distillation=bench.objective.distillation,
            weights=weights,
            with_gradient=True,
        )
        return weights[1] * sums[1]

    def composed() -> Tensor:
        loss = plain.gated_distillation(student, teacher, labels, bench.objective)
        loss.backward()
        return loss.detach()

    def reset() -> None:
        student.grad = None
        with torch.no_grad():
            overwritten.copy_(student)

    yield Prepared(
        ours=Runner(in_place, reset),
        plain=Runner(composed, reset),
        work=floors.distillation(tokens, vocabulary),
        upper_work=floors.distillation(tokens, vocabulary, sweeps=5),
    )


@contextmanager
def losses_with_heads(bench: Workbench) -> Iterator[Prepared]:
    """Cross-entropy and L_GDKD from final states of both models, with gradients of the student's
    states and head.

    Ours projects the teacher's states twice, as the training does: the gates, whose sum over the
    batch is a denominator, are known before the student's pass. The floor has it once.

    Memory is above the states and the heads; it holds the head's gradient.
    """
    tokens = bench.shapes.loss_tokens
    states, head = _states_and_head(bench, "student")
    teacher_states, teacher_head = _states_and_head(bench, "teacher")
    states.requires_grad_()
    head.requires_grad_()
    labels = torch.randint(bench.vocabulary, (tokens,), device=bench.device)
    beta = bench.objective.controller.beta_init
    logits_bytes = bench.training.logits_mib * 2**20

    def fused() -> Tensor:
        gates = gates_of_rows(teacher_head, teacher_states, logits_bytes=logits_bytes)
        supervision = Supervision(
            labels=labels,
            teacher=TaughtRows(teacher_head, teacher_states, gates),
            distillation=bench.objective.distillation,
            weights=torch.stack([gates.new_tensor(1.0 / tokens), beta / gates.sum()]),
            logits_bytes=logits_bytes,
        )
        loss, _ = supervised_loss(head, states, supervision)
        loss.backward()
        return loss.detach()

    def composed() -> Tensor:
        logits = head(states)
        with torch.no_grad():
            taught = teacher_head(teacher_states)
        cross_entropy = cross_entropy_sum(logits, labels) / tokens
        distilled = plain.gated_distillation(logits, taught, labels, bench.objective)
        loss: Tensor = cross_entropy + beta * distilled
        loss.backward()
        return loss.detach()

    def reset() -> None:
        states.grad = head.weight.grad = None

    yield Prepared(
        ours=Runner(fused, reset),
        plain=Runner(composed, reset),
        work=floors.heads(bench.shapes, tokens),
    )


def _states_and_head(bench: Workbench, role: Role) -> tuple[Tensor, SupervisedHead]:
    """Final states (N, d) of unit size, and a head (V, d) as a random model has it."""
    width = bench.shapes.config(role).text_config.hidden_size
    states = torch.randn(bench.shapes.loss_tokens, width, device=bench.device, dtype=bench.dtype)
    linear = nn.Linear(width, bench.vocabulary, bias=False, device=bench.device, dtype=bench.dtype)
    nn.init.normal_(linear.weight, std=HEAD_STD)
    return states, SupervisedHead(linear).requires_grad_(False)


@contextmanager
def fake_quantization(bench: Workbench) -> Iterator[Prepared]:
    """W_hat of all quantized layers, and the map of a given gradient to that of W and theta."""
    linears = quantizable_linears(bench.student, bench.family.decoder)
    with bench.quantized() as (bank, cycle):
        gradients = {
            name: torch.randn_like(linear.weight).mul_(1e-3) for name, linear in linears.items()
        }
        shares: list[GradientShare | None] = [
            GradientShare(0, gradient.view(-1)) for gradient in gradients.values()
        ]

        def all_at_once() -> None:
            cycle.quantize()
            cycle.map_gradients(shares)

        def layer_by_layer() -> None:
            for name, linear in linears.items():
                w_hat = fake_quantize(linear.weight, bank.layer(name), BITS, GROUP_SIZE)
                w_hat.backward(gradients[name])

        def reset() -> None:
            bench.drop_gradients()
            bank.zero_grad()

        weights = sum(linear.weight.numel() for linear in linears.values())
        yield Prepared(
            ours=Runner(
                all_at_once, reset, held_bytes=sum(weight.nbytes for weight in cycle.weights)
            ),
            plain=Runner(layer_by_layer, reset),
            work=floors.fake_quantization(weights, GROUP_SIZE),
        )


def cases(bench: Workbench) -> list[Case]:
    """The table's rows, in an order that lets models be reused."""
    shapes = bench.shapes
    whole = partial(step, samples=shapes.samples)
    many = shapes.accumulation
    title = f"{shapes.samples} samples, {shapes.samples * shapes.sample_tokens} tokens"
    micro = f"{shapes.micro_samples} samples, {shapes.micro_samples * shapes.sample_tokens} tokens"
    return [
        Case(
            "bf16-step",
            f"BF16 GRACE step, {title}",
            Goal(450, 10),
            partial(whole, accumulation=1, quantized=False),
        ),
        Case(
            "w4-step",
            f"W4 GRACE step, {title}, accumulation {many}",
            Goal(480),
            partial(whole, accumulation=many, quantized=True),
        ),
        Case(
            "w4-step-alone",
            f"W4 GRACE step, {title}, accumulation 1",
            Goal(520),
            partial(whole, accumulation=1, quantized=True),
        ),
        Case(
            "w4-micro-step",
            f"W4 GRACE micro-step, {micro}, accumulation {many}",
            Goal(110),
            partial(step, samples=shapes.micro_samples, accumulation=many, quantized=True),
        ),
        Case(
            "gdkd",
            f"GDKD alone, {shapes.loss_tokens} tokens x {bench.vocabulary} classes, from logits",
            Goal(4),
            gated_distillation,
        ),
        Case(
            "heads",
            f"CE + GDKD with both heads, {shapes.loss_tokens} supervised tokens",
            Goal(30, 1.5),
            losses_with_heads,
        ),
        Case(
            "fake-quantization",
            "fake-quantization of all layers, forward and backward, once per optimizer step",
            Goal(7),
            fake_quantization,
        ),
    ]
