"""The objective of a step against its equations written out, however its rows are cut."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from grace_core.config.objective import Controller, Distillation, Objective, Relational
from grace_core.losses.controller import AdaptiveController, FixedBeta
from grace_core.losses.fused_head import ChunkRows
from grace_core.losses.objective import (
    GlobalCounts,
    StudentObjective,
    Teacher,
    TeacherRow,
    TermWeights,
    make_controller,
    omega_at,
    teacher_rows,
)
from grace_core.models import rows as packing
from grace_core.models.families import FAMILIES as SUPPORTED
from grace_core.models.families import Family, set_trainable
from grace_core.models.frozen_tower import tower_states
from grace_core.models.loading import CheckpointFolder, load_model, read_checkpoint
from grace_core.models.rows import packed_row
from grace_core.models.visual_inputs import VisualInputs
from tests.objective_oracle import StepTerms, opinionated, step_terms
from tests.prepared_rows import prepared_row
from tests.tiny_models import FAMILIES, save_tiny

BETA, OMEGA = 0.7, 1.9
CUTS = {
    "one row": [[0, 1, 2, 3, 4, 5]],
    "four rows": [[0, 1], [2], [3, 4], [5]],
    "each alone": [[0], [1], [2], [3], [4], [5]],
    "backwards": [[5, 4, 3], [2, 1, 0]],
}
GRACE = Objective()


@dataclass
class World:
    """A teacher and a narrower student as checkpoints, and the samples of one step."""

    folder: CheckpointFolder
    teacher_folder: CheckpointFolder
    visual: VisualInputs
    samples: list[dict[str, Any]]
    oracles: dict[str, tuple[StepTerms, dict[str, Tensor]]] = field(default_factory=dict)

    @property
    def family(self) -> Family:
        return self.folder.family

    def student(self, dtype: torch.dtype = torch.float32, attention: Any = "packed") -> Any:
        model = load_model(self.folder, device="cpu", dtype=dtype, attention=attention)
        set_trainable(model, self.family, "language")
        return model.train()

    def teacher(self, dtype: torch.dtype = torch.float32, attention: Any = "packed") -> Any:
        model = load_model(self.teacher_folder, device="cpu", dtype=dtype, attention=attention)
        return model.requires_grad_(False)

    def oracle(self, objective: Objective) -> tuple[StepTerms, dict[str, Tensor]]:
        """Terms and gradients of the whole step in float64, computed once for each variant."""
        key = objective.model_dump_json()
        if key not in self.oracles:
            student = self.student(torch.float64, "sdpa")
            teacher = self.teacher(torch.float64, "sdpa")
            terms = step_terms(student, teacher, self.samples, self.visual, objective.distillation)
            total = torch.zeros((), dtype=torch.float64)
            if objective.cross_entropy:
                total = total + terms.cross_entropy
            if objective.distillation.kind != "none":
                total = total + BETA * terms.distillation
            if objective.relational.enabled:
                total = total + OMEGA * terms.relational
            total.backward()
            gradients = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
            gradients["total"] = total.detach()
            self.oracles[key] = terms.detached(), gradients
        return self.oracles[key]


def small_picture(sample: dict[str, Any], image_token_id: int) -> dict[str, Any]:
    """The same text with a picture of two tokens: too few to count in the relational term."""
    content = io.BytesIO()
    Image.effect_noise((32, 16), 90).convert("RGB").save(content, "PNG")
    ids = [sample["input_ids"][0], image_token_id, image_token_id, *sample["input_ids"][1:]]
    return {
        **sample,
        "input_ids": ids,
        "labels_mask": [sample["labels_mask"][0], False, False, *sample["labels_mask"][1:]],
        "images": [content.getvalue()],
        "image_grids": [[1, 2, 4]],
    }


def make_world(name: str, root: Path) -> World:
    teacher = opinionated(FAMILIES[name](seed=11, hidden=256))
    student = opinionated(FAMILIES[name](seed=12))
    folder = read_checkpoint(save_tiny(student, root / "student"))
    teacher_folder = read_checkpoint(save_tiny(teacher, root / "teacher"))
    samples = [prepared_row(student, i, pictures=n) for i, n in enumerate((1, 0, 2, 1, 0, 1))]
    if name != "llava":  # whose pictures all have one size
        samples[5] = small_picture(prepared_row(student, 5, pictures=0), folder.image_token_id)
    visual = VisualInputs(folder, min_pixels=512, max_pixels=16384)
    return World(folder, teacher_folder, visual, samples)


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world("qwen3_vl", tmp_path_factory.mktemp("qwen"))


@dataclass
class Measured:
    counts: GlobalCounts
    sums: Tensor
    losses: Tensor
    gradients: dict[str, Tensor]


def run_step(
    world: World,
    objective: Objective,
    cut: list[list[int]],
    *,
    logits_bytes: int = 2**20,
    student: Any = None,
) -> Measured:
    """One step as the training loop takes it: teacher over all rows, then the student's passes."""
    student = world.student() if student is None else student
    teacher = world.teacher() if objective.needs_teacher else None
    rows = [packed_row([world.samples[i] for i in row], world.visual) for row in cut]
    taught: Sequence[TeacherRow | None] = [None] * len(rows)
    if teacher is not None:
        taught = teacher_rows(
            Teacher.of(teacher, world.family), objective, rows, logits_bytes=logits_bytes
        )
    counts = GlobalCounts.of(rows, taught)
    weights = TermWeights.of(objective, counts, beta=BETA, omega=OMEGA)
    module = StudentObjective(student, world.family, objective, logits_bytes=logits_bytes)
    sums, losses = torch.zeros(3, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    towers = tower_states(student, world.family, rows)
    for row, one, tower in zip(rows, taught, towers, strict=True):
        loss, row_sums = module(row, one, weights, tower)
        loss.backward()
        losses += loss.detach()
        sums += row_sums
    gradients = {
        name: parameter.grad
        for name, parameter in student.named_parameters()
        if parameter.grad is not None
    }
    return Measured(counts, sums, losses, gradients)


def assert_same_gradients(
    found: dict[str, Tensor], expected: dict[str, Tensor], relative: float = 2e-4
) -> None:
    expected = {name: value for name, value in expected.items() if name != "total"}
    assert found.keys() >= expected.keys()
    for name in found.keys() - expected.keys():  # the oracle's graph does not reach it
        assert not found[name].any(), name
    scale = max(float(value.norm()) for value in expected.values())
    for name, value in expected.items():
        difference = float((found[name].double() - value).norm())
        assert difference <= relative * float(value.norm()) + 1e-6 * scale, name


@pytest.mark.parametrize("cut", CUTS)
def test_rows_add_up_to_the_equations(world: World, cut: str) -> None:
    terms, gradients = world.oracle(GRACE)
    found = run_step(world, GRACE, CUTS[cut])
    assert found.counts.tokens == terms.tokens
    assert (
        found.counts.pictures == terms.pictures == (5 if "llava" in str(world.folder.path) else 4)
    )
    assert float(found.counts.gates) == pytest.approx(terms.gates, rel=1e-5)
    assert float(found.losses) == pytest.approx(float(gradients["total"]), rel=1e-5)
    assert (found.sums / torch.tensor([terms.tokens, terms.gates, terms.pictures])).tolist() == (
        pytest.approx(
            [float(terms.cross_entropy), float(terms.distillation), float(terms.relational)],
            rel=2e-5,
        )
    )
    assert_same_gradients(found.gradients, gradients)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_the_chunk_of_logits_changes_nothing(qwen: World, chunk: int) -> None:
    _, gradients = qwen.oracle(GRACE)
    head = qwen.student().lm_head.weight
    logits_bytes = next(
        n for n in range(1, 2**22, 1000) if ChunkRows.within(n, head, head).student >= chunk
    )
    found = run_step(qwen, GRACE, CUTS["four rows"], logits_bytes=logits_bytes)
    assert float(found.losses) == pytest.approx(float(gradients["total"]), rel=1e-5)
    assert_same_gradients(found.gradients, gradients)


@pytest.mark.parametrize("tokens", [1, 120])
def test_how_many_rows_frozen_models_see_at_once_changes_nothing(
    qwen: World, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_JOINED_TOKENS", tokens)
    _, gradients = qwen.oracle(GRACE)
    assert_same_gradients(run_step(qwen, GRACE, CUTS["four rows"]).gradients, gradients)


def test_as_many_rows_make_as_many_passes(qwen: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks with a sharded teacher must agree on their number, whatever their rows hold."""
    rows = [packed_row([sample], qwen.visual) for sample in qwen.samples]
    short, *_, long = sorted(rows, key=lambda row: row.input_ids.shape[1])
    least, most = (row.input_ids.shape[1] for row in (short, long))
    assert least < most
    monkeypatch.setattr(packing, "_JOINED_TOKENS", 2 * least)
    of_ranks = [short] * 4, [long] * 4
    assert [len(list(packing.groups_of_rows(rows))) for rows in of_ranks] == [2, 4]
    assert [len(list(packing.groups_of_rows(rows, most))) for rows in of_ranks] == [4, 4]


def test_the_step_tells_the_variants_apart(qwen: World) -> None:
    """The samples are such that a forgotten gate or a mean of means would be seen."""
    terms, _ = qwen.oracle(GRACE)
    ungated, _ = qwen.oracle(Objective(distillation=Distillation(kind="decoupled")))
    assert abs(float(ungated.distillation / terms.distillation) - 1) > 1e-3
    means = []
    for row in CUTS["four rows"]:
        found = run_step(qwen, GRACE, [row])
        assert found.counts.tokens > 0
        means.append(found.sums[:2] / torch.stack([found.counts.tokens, found.counts.gates]))
    mean_of_means = torch.stack(means).mean(0)
    global_means = torch.stack([terms.cross_entropy, terms.distillation])
    assert ((mean_of_means / global_means - 1).abs() > 1e-3).all()


VARIANTS = {
    "CE only": Objective(
        distillation=Distillation(kind="none"), relational=Relational(enabled=False)
    ),
    "plain KD": Objective(
        distillation=Distillation(kind="plain", temperature=3.0),
        relational=Relational(enabled=False),
    ),
    "DKD without gate": Objective(distillation=Distillation(kind="decoupled")),
    "other constants": Objective(
        distillation=Distillation(temperature=1.5, alpha=0.3, beta_dkd=2.5)
    ),
    "no RCKA": Objective(relational=Relational(enabled=False)),
    "RCKA only": Objective(cross_entropy=False, distillation=Distillation(kind="none")),
    "distillation only": Objective(cross_entropy=False, relational=Relational(enabled=False)),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_ablation_is_its_own_equation(qwen: World, variant: str) -> None:
    objective = VARIANTS[variant]
    terms, gradients = qwen.oracle(objective)
    found = run_step(qwen, objective, CUTS["four rows"], logits_bytes=2**15)
    assert float(found.losses) == pytest.approx(float(gradients["total"]), rel=1e-5)
    assert float(found.sums[0]) == pytest.approx(float(terms.cross_entropy) * terms.tokens, 1e-5)
    if objective.distillation.kind == "none":
        assert found.sums[1] == 0
    if not objective.relational.enabled:
        assert found.sums[2] == 0
    assert_same_gradients(found.gradients, gradients)


def test_gradient_checkpointing_changes_nothing(world: World) -> None:
    plain = run_step(world, GRACE, CUTS["four rows"])
    student = world.student()
    student.gradient_checkpointing_enable({"use_reentrant": False, "determinism_check": "none"})
    passes = []
    layer = student.get_submodule(world.family.decoder).layers[0].mlp
    layer.register_forward_pre_hook(lambda *_: passes.append(1))
    found = run_step(world, GRACE, CUTS["four rows"], student=student)
    assert len(passes) == 2 * len(CUTS["four rows"]), "each layer runs again in the backward pass"
    assert torch.equal(found.sums, plain.sums)
    assert_same_gradients(found.gradients, plain.gradients, relative=1e-6)


def test_a_step_without_pictures_has_no_relational_term(qwen: World) -> None:
    found = run_step(qwen, GRACE, [[1], [4]])
    assert found.counts.pictures == 0
    assert found.sums[2] == 0
    assert torch.isfinite(found.losses)
    assert all(torch.isfinite(gradient).all() for gradient in found.gradients.values())


def test_rows_without_pictures_reach_the_same_parameters(world: World) -> None:
    """Else one rank would reduce gradients that another never made."""
    with_pictures = run_step(world, GRACE, [[0]])
    text = run_step(world, GRACE, [[1]])
    trained = {n for n, p in world.student().named_parameters() if p.requires_grad}
    assert with_pictures.gradients.keys() == text.gradients.keys() == trained


def test_omega_warms_up_linearly() -> None:
    objective = Objective(relational=Relational(omega=3.0, warmup_steps=4))
    assert [omega_at(objective, step) for step in range(6)] == [0.75, 1.5, 2.25, 3.0, 3.0, 3.0]
    assert omega_at(Objective(relational=Relational(omega=3.0, warmup_steps=0)), 0) == 3.0
    assert omega_at(Objective(relational=Relational(enabled=False)), 100) == 0.0


def test_the_controller_follows_the_configuration() -> None:
    fixed = make_controller(Objective(controller=Controller(kind="fixed", beta_init=0.3)))
    assert isinstance(fixed, FixedBeta)
    fixed.update(50.0)
    assert fixed.beta == 0.3
    adaptive = make_controller(
        Objective(controller=Controller(tau=2.0, eta=0.01, beta_init=0.4, ema_decay=0.9))
    )
    assert isinstance(adaptive, AdaptiveController)
    adaptive.update(7.0)
    assert adaptive.beta == pytest.approx(0.4 + 0.01 * 5.0)
    adaptive.update(2.0)  # EMA 0.9 * 7 + 0.1 * 2 = 6.5
    assert adaptive.beta == pytest.approx(0.45 + 0.01 * 4.5)


def test_every_family_is_covered() -> None:
    assert set(FAMILIES) == set(SUPPORTED)
