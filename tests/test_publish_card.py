"""The model card: what the Hub reads from it, and what people read in it."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from packaging.requirements import Requirement
from safetensors.torch import save

from grace_core.artifacts import Artifact, new_artifact, read_artifact
from grace_core.config import load_config
from grace_core.errors import GraceError
from grace_core.export.card import eval_results_files, model_card, release_manifest
from grace_core.export.card_facts import (
    BenchmarkFacts,
    Form,
    Precision,
    Quantization,
    Release,
    Results,
    ZooEntry,
)
from grace_core.export.card_loading import REQUIREMENTS
from grace_core.lineage.graph import Edge, Lineage, Node
from grace_core.lineage.published import PublishedManifest
from grace_core.publish.release_set import contents_of
from tests.recorded_evaluations import recorded_files
from tests.test_evaluation_score import BENCHMARKS, PUBLISHED, published_table

ROOT = Path(__file__).resolve().parent.parent
OWNER = "grace-lab"
NAMES: dict[Precision, str] = {
    "bf16": f"{OWNER}/Qwen3-VL-2B-GRACE-BF16",
    "w8": f"{OWNER}/Qwen3-VL-2B-GRACE-W8G128",
    "w4": f"{OWNER}/Qwen3-VL-2B-GRACE-W4G128",
}
STUDENT, TEACHER = "Qwen/Qwen3-VL-2B-Instruct", "Qwen/Qwen3-VL-8B-Instruct"


def release(
    precision: Precision, dataset: str = "Lin-Chen/ShareGPT4V", form: Form | None = None
) -> Release:
    bits: dict[str, Literal[4, 8]] = {"w8": 8, "w4": 4}
    quantized = precision != "bf16"
    return Release(
        repository=NAMES[precision],
        precision=precision,
        form=form or ("compressed-tensors" if quantized else "safetensors"),
        base_model=NAMES["bf16"] if quantized else STUDENT,
        backbone=STUDENT,
        teacher=TEACHER,
        dataset=dataset,
        dataset_licence=None,
        licence="apache-2.0",
        zoo=[
            ZooEntry(name, STUDENT, key, None if key == "bf16" else 128, f"the {key} release")
            for key, name in NAMES.items()
        ],
        training={"Optimizer steps": 1000, "Learning rate": 1e-5, "ZeRO stage": "2 | 3"},
        files=["model.safetensors", "config.json"],
        parameters=2_127_532_032,
        size=4_255_140_312,
        lineage=lineage_of_release(f"release-{precision}"),
        quantization=Quantization(bits[precision], 128, 196) if quantized else None,
    )


def lineage_of_release(stage: str) -> Lineage:
    counts = {"used": 101_000.0, "quarantined": 1_025.0}
    data = Node(stage="data", digest="d" * 64, name="data", present=True, metrics=counts)
    teacher = Node(stage="checkpoint", digest="e" * 64, name=TEACHER, present=True)
    model = Node(stage=stage, digest="f" * 64, name="Toy", present=True)
    edges = [Edge(child=model.id, role="data", parent=data.id)]
    edges += [Edge(child=model.id, role="teacher", parent=teacher.id)]
    return Lineage(models=(model.id,), nodes=(data, teacher, model), edges=tuple(edges))


def card_of(precision: Precision, dataset: str = "Lin-Chen/ShareGPT4V") -> str:
    return model_card(release(precision, dataset), results(precision))


def results(precision: Precision) -> Results:
    return Results(
        scores=dict(zip(BENCHMARKS, PUBLISHED[precision], strict=True)),
        table=published_table().to_markdown(),
        benchmarks={
            "MMBench": BenchmarkFacts(
                "MMBench",
                "lmms-lab/MMBench",
                revision="c" * 40,
                config="en",
                split="dev",
                declared=True,
                prompt="llava",
                metric="CircularEval accuracy",
            ),
            "AI2D": BenchmarkFacts("AI2 Diagrams", "lmms-lab/ai2d", split="test", declared=True),
        },
        date="2026-11-24T12:00:00+00:00",
    )


def code_of(card: str) -> list[str]:
    """Its blocks of Python."""
    return [block.split("```")[0] for block in card.split("```python\n")[1:]]


@pytest.mark.parametrize("precision", ["bf16", "w8", "w4"])
def test_the_hub_reads_base_model_licence_data_and_results(
    precision: Precision,
) -> None:
    data = ModelCard(card_of(precision)).data.to_dict()
    quantized = precision != "bf16"
    assert data["base_model"] == (NAMES["bf16"] if quantized else STUDENT)
    assert data["base_model_relation"] == ("quantized" if quantized else "finetune")
    assert data["datasets"] == ["Lin-Chen/ShareGPT4V"]
    assert data["license"] == "apache-2.0"
    assert data["pipeline_tag"] == "image-text-to-text"
    assert data["library_name"] == "transformers"
    tags = set(data["tags"])
    assert "distillation" in tags
    assert tags >= {"compressed-tensors", f"{precision}a16", "qat", "lsq"} or not quantized
    assert not (tags & {"compressed-tensors", "w4a16", "qat", "lsq"}) or quantized
    (index,) = data["model-index"]
    assert index["name"] == NAMES[precision].split("/")[1]
    found = [each["metrics"][0]["value"] for each in index["results"]]
    assert found == list(PUBLISHED[precision])
    datasets = {each["dataset"]["name"]: each["dataset"]["type"] for each in index["results"]}
    assert datasets["AI2 Diagrams"] == "lmms-lab/ai2d"


def test_the_published_figures_stand_in_the_results() -> None:
    text = ModelCard(card_of("w4")).text
    rows = [line for line in text.splitlines() if line.startswith("| GRACE W4G128 |")]
    shown = [cell.strip() for cell in rows[0].split("|")[2:9]]
    assert shown == [f"{value:.1f}" for value in PUBLISHED["w4"]]
    for title in ("Teacher", "Baseline", "GRACE BF16", "GRACE W8G128"):
        assert f"\n| {title} |" in text


def test_every_section_is_there() -> None:
    text = card_of("w4")
    titles = [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]
    assert titles == [
        "Model details",
        "Results",
        "Model zoo",
        "Intended use",
        "Training details",
        "Quantization details",
        "Files",
        "Loading",
        "Limitations",
        "Licence",
        "Lineage",
        "Citation",
    ]
    assert "Quantization details" not in card_of("bf16")
    assert "codes from -8 to 7" in text and "codes from -128 to 127" in card_of("w8")
    assert "`model.safetensors`" in text
    tree = text.split("```text\n")[1].split("```")[0].splitlines()
    assert tree[0].split() == ["release-w4", "Toy", "f" * 12]
    assert tree[1].endswith(f"data {'d' * 12}  101,000 used, 1,025 quarantined")
    assert tree[2].endswith(f"teacher: checkpoint {TEACHER} {'e' * 12}")
    assert "](lineage.svg)" in text
    assert "2 \\| 3" in text, "a bar inside a value would break the table"


def test_the_loading_code_is_safe_and_complete() -> None:
    text = card_of("w4")
    assert "trust_remote_code" not in text
    assert f'source = "{NAMES["w4"]}"' in text
    for block in code_of(text):
        compile(block, "card", "exec")
    assert f"grace chat {NAMES['w4']}" in text and "grace chat" not in card_of("bf16")


def test_what_the_code_needs_is_what_the_project_was_tested_with() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    tested = {one.name: one.specifier for one in map(Requirement, project["dependencies"])}
    for form, needed in REQUIREMENTS.items():
        for one in map(Requirement, needed):
            for least in one.specifier:
                assert least in set(tested[one.name]), f"{form}: {one}"
    assert "transformers>=5.17" in card_of("bf16")


def test_size_and_parameters_stand_in_the_details() -> None:
    text = card_of("bf16")
    assert "| Parameters | 2.13 B |" in text and "| Weight files | 4.26 GB |" in text


def test_data_that_is_not_for_commerce_is_pointed_out() -> None:
    text = card_of("bf16")
    assert "cc-by-nc-4.0" in text and "Non-commercial use" in text
    assert "non-commercial" in ModelCard(text).data.to_dict()["tags"]
    free = card_of("bf16", dataset="grace-pipeline/toy-world")
    assert "cc-by-nc" not in free and "on-commercial" not in free
    stated = replace(release("bf16", "someone/data"), dataset_licence="cc-by-nc-sa-4.0")
    assert "cc-by-nc-sa-4.0" in model_card(stated, results("bf16"))


def test_the_manifest_holds_the_lineage() -> None:
    manifest = json.loads(release_manifest(release("w4"), Results({"A": 1.5, "B": None}, "")))
    assert manifest["format"] == 2
    assert PublishedManifest.model_validate(manifest).lineage == lineage_of_release("release-w4")
    assert manifest["quantization"] == {"bits": 4, "group_size": 128, "layers": 196}
    assert manifest["scores"] == {"A": 1.5, "B": None}


def test_scores_that_are_missing_are_left_out_of_the_metadata() -> None:
    text = model_card(release("bf16"), Results({"A": None, "B": 50.0}, ""))
    (index,) = ModelCard(text).data.to_dict()["model-index"]
    assert [each["dataset"]["name"] for each in index["results"]] == ["B"]
    bare = model_card(release("bf16"), Results({"A": None}, ""))
    assert "model-index" not in ModelCard(bare).data.to_dict()


def test_precision_and_quantization_must_agree() -> None:
    with pytest.raises(GraceError, match="needs quantization details"):
        replace(release("w4"), quantization=None)
    with pytest.raises(GraceError, match="has no quantization details"):
        replace(release("bf16"), quantization=Quantization(4, 128, 1))


def test_the_newer_results_files_say_the_same_as_the_card() -> None:
    files = eval_results_files(release("w4"), results("w4"))
    assert set(files) == {".eval_results/MMBench.yaml", ".eval_results/AI2D.yaml"}
    (entry,) = parse_eval_result_entries(yaml.safe_load(files[".eval_results/MMBench.yaml"]))
    assert (entry.dataset_id, entry.task_id) == ("lmms-lab/MMBench", "en")
    assert entry.value == PUBLISHED["w4"][BENCHMARKS.index("MMBench")]
    assert entry.date == "2026-11-24T12:00:00+00:00"
    assert entry.dataset_revision == "c" * 40
    assert entry.notes == (
        "CircularEval accuracy in percent; split dev, prompts in the style llava, greedy decoding, "
        "no tools"
    )
    assert not eval_results_files(release("w4"), Results({"MMBench": None}, ""))


def test_a_part_is_called_one_and_is_in_no_metadata() -> None:
    part = replace(results("w4").facts("MMBench"), part="197 of 4,329 items")
    found = replace(results("w4"), benchmarks={"MMBench": part})
    text = model_card(release("w4"), found)
    assert (
        "| **a part: 197 of 4,329 items**; `lmms-lab/MMBench` at `cccccccccccc`, en, dev |" in text
    )
    (index,) = ModelCard(text).data.to_dict()["model-index"]
    named = [each["dataset"]["name"] for each in index["results"]]
    assert named == [name for name in BENCHMARKS if name != "MMBench"]
    assert eval_results_files(release("w4"), found) == {}
    scores = json.loads(release_manifest(release("w4"), found))["scores"]
    assert scores["MMBench"] is None and scores["AI2D"] == 79.5


def test_what_was_run_is_stated_and_no_more() -> None:
    """Another data set, a file of one's own, another style, size of pictures and metric."""
    own = results("w4").facts("MMBench")
    facts = {
        "MMBench": replace(own, dataset="mine/mmbench", declared=False, prompt="grace"),
        "AI2D": BenchmarkFacts("AI2D (mask)", prompt="grace"),
        "MMMU": BenchmarkFacts("MMMU", "MMMU/MMMU", config="*", split="dev", metric="F1"),
    }
    found = replace(results("w4"), benchmarks=facts, pixels=(784, 200_704))
    text = model_card(release("w4"), found)
    sizes = "greedy answers to GRACE-style prompts about pictures of 784 to 200,704 pixels, scored"
    assert sizes in text and "LLaVA-style" not in text
    assert "| AI2D (mask) | no data set of the Hub | GRACE | accuracy |" in text
    assert "| MMMU | `MMMU/MMMU`, *, dev | its own | F1 |" in text
    (index,) = ModelCard(text).data.to_dict()["model-index"]
    shown = {each["dataset"]["name"]: each for each in index["results"]}
    assert shown["MMBench"]["dataset"]["type"] == "mine/mmbench"
    assert shown["MMBench"]["metrics"][0]["type"] == "circulareval_accuracy"
    assert shown["MMBench"]["metrics"][0]["name"] == "CircularEval accuracy (percent)"
    assert shown["MMMU"]["dataset"]["split"] == "dev"
    assert shown["MMMU"]["metrics"][0] == {
        **{"type": "f1", "name": "F1 (percent)"},
        "value": PUBLISHED["w4"][BENCHMARKS.index("MMMU")],
    }
    assert shown["AI2D (mask)"]["dataset"]["type"] == "AI2D", "a name, and no data set"
    assert eval_results_files(release("w4"), found) == {}


def test_awq_is_told_apart_from_the_other_form() -> None:
    text = model_card(release("w4", form="awq"), results("w4"))
    data = ModelCard(text).data.to_dict()
    assert data["base_model_relation"] == "quantized"
    assert {"awq", "w4a16"} <= set(data["tags"]) and "compressed-tensors" not in data["tags"]
    assert "gptqmodel" in text and "zero points of 8" in text
    assert "pack-quantized" not in text
    assert "not scored themselves" in text and "not scored themselves" not in card_of("w4")
    for precision in ("bf16", "w4"):
        assert "vllm serve " + NAMES[precision] in card_of(precision)  # type: ignore[index,arg-type]


def test_everything_of_the_published_card_is_there(shared_data: Path) -> None:
    """Its facts, in whatever words: names, figures, zoo, citation."""
    seed = (shared_data.parent / "seed" / "model-card.txt").read_text(encoding="utf-8")
    zoo = [
        *release("bf16").zoo,
        ZooEntry(f"{OWNER}/LLaVA-1.5-7B-GRACE-W4G128", "LLaVA-1.5-7B", "w4", 128, "the paper's"),
    ]
    text = model_card(replace(release("bf16"), zoo=zoo), results("bf16"))
    facts = [
        "Gated Relational Alignment via Confidence-based Distillation for Efficient VLMs",
        *("Yanlong Chen", "Amirhossein Habibian", "Luca Benini", "Yawei Li", "ICML 2026"),
        *("Qwen/Qwen3-VL-2B-Instruct", "ShareGPT4V", "BF16", "GRACE", "LLaVA-style"),
        *("Qwen3-VL-2B-GRACE-BF16", "Qwen3-VL-2B-GRACE-W8G128", "Qwen3-VL-2B-GRACE-W4G128"),
        *("LLaVA-1.5-7B-GRACE-W4G128", "int8", "int4", "128"),
        *("AutoProcessor", "AutoModelForImageTextToText", "config.json", "research"),
        *(f"{value:.1f}" for row in PUBLISHED.values() for value in row),
        *("@article{chen2026gated,", "journal={arXiv preprint arXiv:2601.22709},"),
        "author={Chen, Yanlong and Habibian, Amirhossein and Benini, Luca and Li, Yawei},",
    ]
    for fact in facts:
        assert fact in seed, f"the published card does not say {fact}"
        assert fact in text, fact


def made(
    folder: Path, stage: str, files: Mapping[str, str | bytes], **parents: Artifact
) -> Artifact:
    inputs = {role: parent.as_parent() for role, parent in parents.items()}
    with new_artifact(folder / "artifacts" / stage, stage, {}, inputs, {}) as writer:
        writer.facts["exactness"] = {"layers": 14, "codes": 0}
        for path, content in files.items():
            (writer.path / path).parent.mkdir(parents=True, exist_ok=True)
            data = content.encode() if isinstance(content, str) else content
            (writer.path / path).write_bytes(data)
    return read_artifact(folder / "artifacts" / stage)


def test_the_card_of_a_run_states_what_its_evaluation_recorded(tmp_path: Path) -> None:
    config = load_config(ROOT / "configs/toy.yaml", [f"run_dir={tmp_path}"])
    student = made(tmp_path, "w4", {"model/a": "1"})
    weights = {"model/config.json": b"{}", "model/model.safetensors": save({"a": torch.ones(3)})}
    model = made(tmp_path, "release-w4", weights, model=student)
    answers = {"mmbench": [True, False], "ai2d": [True, False], "pope": [True, False]}
    files = recorded_files("w4", answers)
    results = json.loads(files["results.json"])
    place = {"repository": "lmms-lab/MMBench", "revision": "c" * 40, "config": "en", "split": "dev"}
    results["benchmarks"]["mmbench"] |= {
        "headline": {"metric": "official.circular", "percent": 50.0},
        "source": {**place, "prompt": "grace", "part": False, "declared": True},
    }
    results["benchmarks"]["ai2d"] |= {
        "part_of": [3088],
        "source": {"repository": None, "prompt": "grace", "part": False, "declared": False},
    }
    results["benchmarks"]["pope"] |= {"headline": {"metric": "official.mean_f1", "percent": 61.0}}
    files["results.json"] = json.dumps(results)
    evaluation = made(tmp_path, "evaluate-w4", files, model=model)
    (content,) = contents_of(config, {"w4": model}, {"w4": evaluation})
    named = {name for name in content.files if name.startswith(".eval_results")}
    assert named == {".eval_results/mmbench.yaml"}
    card = content.files["README.md"]
    assert isinstance(card, bytes)
    text = card.decode()
    assert "greedy answers to GRACE-style prompts" in text
    assert "| Model | mmbench | ai2d (2 of 3,088 items) | pope |" in text
    assert "| MMBench | `lmms-lab/MMBench` at `cccccccccccc`, en, dev | GRACE | Circular" in text
    assert "| AI2D (mask) | **a part: 2 of 3,088 items**; no data set of the Hub | GRACE |" in text
    assert "| POPE | no data set of the Hub | its own | F1 |" in text, "nothing was recorded"
    (index,) = ModelCard(text).data.to_dict()["model-index"]
    found = [each["dataset"] for each in index["results"]]
    assert found == [
        {
            **{"name": "MMBench", "type": "lmms-lab/MMBench", "revision": "c" * 40},
            **{"config": "en", "split": "dev"},
        },
        {"name": "POPE", "type": "pope"},
    ]
