"""Every supported family goes the whole way: data, distillation, W4 and release, on tiny models.

Nothing is replaced: training runs in its process group, the release goes through its exactness
gate, and what comes out is loaded by transformers alone. The teacher is twice as wide as the
student.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_from_disk
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from grace_core import stages
from grace_core.artifacts import Artifact, verify_artifact
from grace_core.config.evaluation import Gate
from grace_core.config.tree import GraceConfig
from grace_core.evaluation.gate import GateClosed
from grace_core.events import Event
from grace_core.models.families import FAMILIES as SUPPORTED
from grace_core.models.families import PROJECTIONS
from grace_core.stages import StageContext
from tests.tiny_models import DECODER, FAMILIES, image_batch, save_tiny, text_batch

pytestmark = pytest.mark.slow

LAYERS = 3
PACKED = {f"{DECODER}.layers.{i}.{name}" for i in range(LAYERS) for name in PROJECTIONS}


def write_records(root: Path) -> None:
    """One, two or no pictures, one or two turns, and a record whose picture is missing."""
    sizes = [(64, 48), (40, 72), (33, 50), (96, 96)]
    for number, size in enumerate(sizes):
        Image.effect_mandelbrot(size, (-2, -1.5, 1, 1.5), 20 + number).convert("RGB").save(
            root / f"{number}.png"
        )
    records: list[dict[str, Any]] = []
    for number in range(12):
        pictures = [[f"{number % 4}.png"], [], [f"{number % 4}.png", f"{(number + 1) % 4}.png"]]
        chosen = pictures[number % 3]
        turns = [
            {"from": "human", "value": "<image>\n" * len(chosen) + f"What is number {number}?"},
            {"from": "gpt", "value": f"It is {'a fractal' if chosen else 'a word'}, {number}."},
        ]
        if number % 2:
            turns += [
                {"from": "human", "value": "Are you sure?"},
                {"from": "gpt", "value": "Yes."},
            ]
        record: dict[str, Any] = {"id": f"r{number}", "conversations": turns}
        if chosen:
            record["image"] = chosen if len(chosen) > 1 else chosen[0]
        records.append(record)
    records.append({**records[0], "id": "bad", "image": "absent.png"})
    (root / "records.json").write_text(json.dumps(records), encoding="utf-8")


@dataclass
class Run:
    """The artifacts of one family's run and what was reported meanwhile."""

    family: str
    config: GraceConfig
    data: Artifact
    bf16: Artifact
    w4: Artifact
    released: dict[str, Artifact]
    events: list[Event]


def make_config(root: Path, family: str) -> GraceConfig:
    training = {
        "steps": 2,
        "row_tokens": 256,
        "rows_per_step": 2,
        "learning_rate": 1e-2,  # less would not show in a norm's bf16 weights, which are 1
        "scale_learning_rate": 1e-3,
        "warmup_share": 0.0,
    }
    objective = {"relational": {"warmup_steps": 1}}
    return GraceConfig.model_validate(
        {
            "name": family.replace("_", "-"),
            "run_dir": root / "run",
            "seed": 3,
            "models": {
                "teacher": {"path": str(root / family / "teacher")},
                "student": {"path": str(root / family / "student")},
            },
            "data": {
                "source": {
                    "kind": "sharegpt4v",
                    "root": str(root),
                    "annotations": ["records.json"],
                },
                "max_tokens": 256,
                "min_pixels": 1024,
                "max_pixels": 16384,
                "max_quarantined_share": 0.1,  # one of 13 is
                "held_out_share": 0.2,
            },
            "distill": {"training": training, "objective": objective},
            "quantize": {"variants": ["w4"], "training": training, "objective": objective},
            "launch": {"processes": 1, "device": "cpu"},
            "evaluation": {"items": 6, "max_new_tokens": 4},
            "publish": {
                "name": f"Tiny-{family}",
                "base_model": "tiny/base",
                "teacher_model": "tiny/teacher",
                "dataset": "tiny/records",
            },
        }
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Annotations, and the folder of all runs: what families have in common is made once."""
    root = tmp_path_factory.mktemp("families")
    write_records(root)
    return root


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def run(request: pytest.FixtureRequest, root: Path) -> Run:
    family = request.param
    make = FAMILIES[family]
    save_tiny(make(seed=31, hidden=256, layers=LAYERS), root / family / "teacher")
    save_tiny(make(seed=32, layers=LAYERS), root / family / "student")
    config = make_config(root, family)
    events: list[Event] = []
    context = StageContext(events.append)
    data = stages.prepare_data(config, context)
    bf16 = stages.distill(config, data, None, context)
    w4 = stages.quantize(config, "w4", data, None, bf16, context)
    released = {
        label: stages.release(config, model, context)
        for label, model in (("bf16", bf16), ("w4", w4))
    }
    return Run(family, config, data, bf16, w4, released, events)


def with_gate(config: GraceConfig, gate: dict[str, Any]) -> GraceConfig:
    evaluation = config.evaluation.model_copy(update={"gate": Gate.model_validate(gate)})
    return config.model_copy(update={"evaluation": evaluation})


def weights(folder: Path) -> dict[str, Tensor]:
    return {
        name: value
        for file in sorted(folder.glob("model*.safetensors"))
        for name, value in load_file(file).items()
    }


def test_records_are_used_or_quarantined(run: Run) -> None:
    metrics = run.data.manifest.metrics
    assert metrics["records"] == 13 and metrics["used"] == 12 and metrics["quarantined"] == 1
    train = load_from_disk(str(run.data.path / "train"))
    held_out = load_from_disk(str(run.data.path / "held_out"))
    assert len(train) + len(held_out) == 12 and len(held_out) > 0
    assert {len(images) for images in train["images"]} == {0, 1, 2}
    # How many records a file holds is not known before its end: progress is in bytes.
    last = [event.values for event in run.events if event.stage == "data"][-1]
    assert last["done"] == last["total"] > 1000


@pytest.mark.parametrize("stage", ["bf16", "w4"])
def test_every_term_took_part(run: Run, stage: str) -> None:
    steps = [e for e in run.events if e.kind == "train" and e.stage == stage]
    assert [event.step for event in steps] == [1, 2]
    for event in steps:
        assert all(math.isfinite(value) for value in event.values.values())
        assert event.values["distillation"] > 0
        assert 0 < event.values["relational"] < 1
        assert event.values["omega"] == 3.0
        assert ("scale_grad_norm" in event.values) == (stage == "w4")


def test_the_vision_tower_is_frozen_and_the_rest_is_trained(run: Run) -> None:
    family = SUPPORTED[run.family]
    start = AutoModelForImageTextToText.from_pretrained(run.config.models.student.path)
    end = dict(
        AutoModelForImageTextToText.from_pretrained(run.bf16.path / "model").named_parameters()
    )
    for name, before in start.named_parameters():
        inside = name.startswith(family.vision + ".")
        connects = name.startswith(tuple(f"{connector}." for connector in family.connectors))
        changed = not torch.equal(before, end[name])
        assert changed == (not inside or connects), name


@pytest.mark.parametrize("stage", ["bf16", "w4"])
def test_a_trained_checkpoint_is_complete(run: Run, stage: str) -> None:
    folder = {"bf16": run.bf16, "w4": run.w4}[stage].path / "model"
    before = {file.name for file in Path(run.config.models.student.path).iterdir()}
    extra = {"scales.safetensors", "quantization.json"} if stage == "w4" else set()
    assert {file.name for file in folder.iterdir()} == before | extra
    start = json.loads((Path(run.config.models.student.path) / "config.json").read_text())
    now = json.loads((folder / "config.json").read_text())
    assert now["model_type"] == start["model_type"] == run.family
    assert {value.dtype for value in weights(folder).values()} == {torch.bfloat16}


def test_w4_starts_from_the_bf16_student(run: Run) -> None:
    assert run.w4.manifest.parents["student"].digest == run.bf16.digest
    trained = load_file(run.w4.path / "model" / "scales.safetensors")
    assert trained.keys() == PACKED
    assert {value.dtype for value in trained.values()} == {torch.float32}


def test_the_release_loads_with_transformers_alone(run: Run) -> None:
    folder = run.released["w4"].path / "model"
    verify_artifact(run.released["w4"])
    stored = load_file(folder / "model.safetensors")
    packed = {n.removesuffix(".weight_packed") for n in stored if n.endswith(".weight_packed")}
    assert len(packed) == len(PACKED)
    assert all(any(name.endswith(p.split(".", 2)[2]) for p in PACKED) for name in packed)
    assert not [name for name in packed if "vis" in name]
    model = AutoModelForImageTextToText.from_pretrained(folder)
    shapes = FAMILIES[run.family](seed=32, layers=LAYERS)
    with torch.no_grad():
        for batch in (text_batch(shapes), image_batch(shapes)):
            if "pixel_values" in batch:
                batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
            logits = model(**batch).logits
            assert logits.shape[:2] == batch["input_ids"].shape
            assert torch.isfinite(logits).all()
    exactness = run.released["w4"].manifest.facts["exactness"]
    assert exactness["layers"] == len(PACKED) and exactness["image_batches"] > 0


def test_what_is_done_is_not_done_again(run: Run) -> None:
    context = StageContext()
    assert stages.prepare_data(run.config, context).path == run.data.path
    again = stages.distill(run.config, run.data, None, context)
    assert again.manifest.created == run.bf16.manifest.created
    assert stages.release(run.config, run.w4, context).path == run.released["w4"].path


def test_the_releases_are_evaluated_and_published(run: Run) -> None:
    events: list[Event] = []
    context = StageContext(events.append)
    evaluations = {
        label: stages.evaluate(run.config, label, model, context)
        for label, model in {"baseline": None, **run.released}.items()
    }
    for evaluation in evaluations.values():
        summary = json.loads((evaluation.path / "results.json").read_text())
        assert math.isfinite(summary["held_out_loss"])
        for benchmark in summary["benchmarks"].values():
            assert benchmark["total"] == 6
            assert benchmark["answered"] == 6, "each item got a response, right or wrong"
    of_w4 = [event.values for event in events if event.stage == "evaluate-w4"]
    done = [values["done"] for values in of_w4]
    held_out = run.data.manifest.metrics["held_out"]
    assert done == sorted(done)
    assert done[-1] == of_w4[0]["total"] == 2 * 6 + held_out  # two benchmarks
    before = set(run.config.run_dir.glob("*/[!.]*"))
    demands = {"floors": {"average": 101.0}}  # out of reach
    with pytest.raises(GateClosed, match=r"(?s)GRACE BF16, average: .*GRACE W4G128, average: "):
        stages.publish(with_gate(run.config, demands), run.released, evaluations, context)
    assert set(run.config.run_dir.glob("*/[!.]*")) == before, "nothing was published"

    overridden = with_gate(run.config, {**demands, "override": "random weights"})
    report = stages.report(overridden, evaluations, context)
    assert "random weights" in (report.path / "index.html").read_text()
    assert report.manifest.metrics["gate_shortfalls"] == 2
    published = stages.publish(overridden, run.released, evaluations, context)
    gate = published.manifest.facts["gate"]
    assert gate["override"] == "random weights" and not all(c["passed"] for c in gate["checks"])
    results = json.loads((published.path / "results.json").read_text())
    assert results["rows"].keys() == {"baseline", "bf16", "w4"}
    for label, location in results["releases"].items():
        assert (Path(location) / "README.md").is_file(), label
        assert (Path(location) / "model.safetensors").is_file(), label
