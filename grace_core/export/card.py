"""The model card of a release, and the files that go with it.

The card is the `README.md` of the repository: metadata that the Hub reads (base model and relation,
data set, licence, results) above text for people, which `card_text.py` writes.
`.eval_results/*.yaml` say the results once more, in the Hub's newer form. `grace_manifest.json`
holds the facts and the lineage for machines, `lineage.svg` shows it. All are made from the same
facts.
"""

from __future__ import annotations

import json

import yaml
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
)

from grace_core.export import card_text
from grace_core.export.card_facts import ARXIV, Release, Results

EVAL_RESULTS = ".eval_results"


def model_card(release: Release, results: Results) -> str:
    """The card's whole text, metadata block first."""
    text = (
        f"---\n{_metadata(release, results).to_yaml()}\n---\n\n{card_text.body(release, results)}"
    )
    return str(ModelCard(text))  # reads the metadata back, so a card the Hub refuses fails here


def eval_results_files(release: Release, results: Results) -> dict[str, str]:
    """`.eval_results/<benchmark>.yaml` by file name, of the benchmarks that were asked whole, from
    their own data set on the Hub.

    The form of https://huggingface.co/docs/hub/eval-results.
    """
    files = {}
    for name, score in results.whole.items():
        benchmark = results.facts(name)
        if benchmark.dataset is None or not benchmark.declared:
            continue
        config = benchmark.config
        entry = EvalResultEntry(
            dataset_id=benchmark.dataset,
            task_id="default" if config in (None, "*") else config,
            value=round(score, 2),
            dataset_revision=benchmark.revision,
            date=results.date,
            notes=f"{benchmark.metric} in percent; split {benchmark.split}, prompts in the style "
            f"{benchmark.prompt}, greedy decoding, no tools",
        )
        text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
        files[f"{EVAL_RESULTS}/{name}.yaml"] = text
    return files


def release_manifest(release: Release, results: Results) -> str:
    """Content of `grace_manifest.json`: the card's facts as JSON."""
    quantization = release.quantization
    manifest = {
        "format": 2,
        "repository": release.repository,
        "precision": release.precision,
        "form": release.form,
        "base_model": release.base_model,
        "backbone": release.backbone,
        "teacher": release.teacher,
        "dataset": release.dataset,
        "licence": release.licence,
        "scores": {name: results.whole.get(name) for name in results.scores},
        "training": dict(release.training),
        "quantization": None
        if quantization is None
        else {
            "bits": quantization.bits,
            "group_size": quantization.group_size,
            "layers": quantization.layers,
        },
        "lineage": release.lineage.model_dump(mode="json"),
    }
    return json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _metadata(release: Release, results: Results) -> ModelCardData:
    tags = ["grace", "distillation", "vision-language"]
    if release.quantization is not None:
        tags += [release.form, f"w{release.quantization.bits}a16", "qat", "lsq"]
    tags.append(f"arxiv:{ARXIV}")
    if release.non_commercial:
        tags.append("non-commercial")
    found = [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=asked.dataset or name,
            dataset_name=asked.title,
            dataset_config=asked.config,
            dataset_split=asked.split,
            dataset_revision=asked.revision,
            metric_type=asked.metric.lower().replace(" ", "_"),
            metric_name=f"{asked.metric[0].upper()}{asked.metric[1:]} (percent)",
            metric_value=round(score, 2),
        )
        for name, score in results.whole.items()
        for asked in [results.facts(name)]
    ]
    return ModelCardData(
        model_name=release.name,
        eval_results=found or None,
        base_model=release.base_model,
        base_model_relation="finetune" if release.quantization is None else "quantized",
        datasets=[release.dataset],
        license=release.licence,
        language="en",
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=tags,
    )
