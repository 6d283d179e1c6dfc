"""The model card of a release and the manifest that goes with it.

The card is the `README.md` of the repository: metadata that the Hub reads (base model and relation,
data set, licence, results) above text for people. `grace_manifest.json` holds the lineage for
machines, `lineage.svg` shows it. All are made from the same facts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from grace_core.errors import GraceError
from grace_core.lineage.graph import Lineage
from grace_core.lineage.text import plain_tree

Precision = Literal["bf16", "w8", "w4"]

PAPER = "Gated Relational Alignment via Confidence-based Distillation for Efficient VLMs"
ARXIV = "2601.22709"
CITATION = f"""@article{{chen2026gated,
  title={{{PAPER}}},
  author={{Chen, Yanlong and Habibian, Amirhossein and Benini, Luca and Li, Yawei}},
  journal={{arXiv preprint arXiv:{ARXIV}}},
  year={{2026}}
}}"""

_PRECISION = {
    "bf16": "BF16, not quantized",
    "w8": "weights INT8 (W8A16), everything else BF16",
    "w4": "weights INT4 (W4A16), everything else BF16",
}


@dataclass(frozen=True)
class ZooEntry:
    """One model of the family of releases."""

    repository: str
    """`owner/name` on the Hub, or the name of a local release."""

    backbone: str
    precision: Precision
    description: str


@dataclass(frozen=True)
class Quantization:
    """How a quantized release was made."""

    bits: Literal[4, 8]
    group_size: int
    """Consecutive input weights that share one scale."""

    layers: int
    """Linear layers that are quantized."""


@dataclass(frozen=True)
class Release:
    """Everything a card says about a release, except its scores."""

    repository: str
    precision: Precision
    base_model: str
    """Hub id of the model this one was made from: the original for BF16, BF16 for W8 and W4."""

    backbone: str
    """Hub id of the student before any training."""

    teacher: str
    dataset: str
    licence: str
    zoo: Sequence[ZooEntry]
    training: Mapping[str, str | int | float]
    """Setting -> value, listed as they are."""

    files: Sequence[str]
    lineage: Lineage
    """Its published form, with this release as the one model asked for."""

    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        if (self.quantization is None) != (self.precision == "bf16"):
            raise GraceError(
                f"card of {self.repository}: a {self.precision} release "
                f"{'needs' if self.quantization is None else 'has no'} quantization details"
            )


def model_card(
    release: Release, *, scores: Mapping[str, float | None], results_markdown: str
) -> str:
    """The card's whole text, metadata block first.

    Args:
        scores: this release's own percent on each benchmark, for the Hub's result metadata;
            benchmarks without a score are left out of it.
        results_markdown: the table of all models.
    """
    sections = [
        _introduction(release),
        f"## Results\n\nAccuracy in percent on the released files, reloaded from disk.\n\n"
        f"{results_markdown}",
        _zoo(release),
        _training(release),
        *([_quantization(release.quantization)] if release.quantization else []),
        "## Files\n\n" + "\n".join(f"- `{name}`" for name in sorted(release.files)),
        _loading(release),
        _limitations(release),
        _licence(release),
        _lineage(release.lineage),
        f"## Citation\n\n```bibtex\n{CITATION}\n```",
    ]
    text = f"---\n{_metadata(release, scores).to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"
    return str(ModelCard(text))  # reads the metadata back, so a card the Hub refuses fails here


def release_manifest(release: Release, *, scores: Mapping[str, float | None]) -> str:
    """Content of `grace_manifest.json`: the card's facts as JSON."""
    manifest = {
        "format": 2,
        "repository": release.repository,
        "precision": release.precision,
        "base_model": release.base_model,
        "dataset": release.dataset,
        "licence": release.licence,
        "scores": dict(scores),
        "training": dict(release.training),
        "quantization": None
        if release.quantization is None
        else {
            "bits": release.quantization.bits,
            "group_size": release.quantization.group_size,
            "layers": release.quantization.layers,
        },
        "lineage": release.lineage.model_dump(mode="json"),
    }
    return json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _metadata(release: Release, scores: Mapping[str, float | None]) -> ModelCardData:
    tags = ["grace", "distillation", "vision-language"]
    if release.quantization is not None:
        tags += ["compressed-tensors", f"w{release.quantization.bits}a16", "qat", "lsq"]
    tags.append(f"arxiv:{ARXIV}")
    results = [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=name.lower().replace(" ", "-"),
            dataset_name=name,
            metric_type="accuracy",
            metric_name="Accuracy (percent)",
            metric_value=round(score, 2),
        )
        for name, score in scores.items()
        if score is not None
    ]
    return ModelCardData(
        model_name=release.repository.split("/")[-1],
        eval_results=results or None,
        base_model=release.base_model,
        base_model_relation="finetune" if release.quantization is None else "quantized",
        datasets=[release.dataset],
        license=release.licence,
        language="en",
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=tags,
    )


def _introduction(release: Release) -> str:
    kind = (
        "a full-precision vision-language model distilled"
        if release.quantization is None
        else f"an INT{release.quantization.bits} vision-language model, distilled and quantized "
        "while training,"
    )
    rows = {
        "Base model": release.base_model,
        "Backbone": release.backbone,
        "Teacher": release.teacher,
        "Precision": _PRECISION[release.precision],
        "Training data": release.dataset,
        "Method": f"GRACE ([arXiv {ARXIV}](https://arxiv.org/abs/{ARXIV}))",
    }
    return (
        f"# {release.repository.split('/')[-1]}\n\n"
        f"This is {kind} with GRACE from {release.teacher} into {release.backbone}. The teacher's "
        "answers weigh more where it is sure of them, and the student learns how the teacher "
        "relates the parts of a picture to each other.\n\n"
        f"## Model details\n\n{_two_columns(rows)}"
    )


def _zoo(release: Release) -> str:
    lines = ["| Model | Backbone | Weights | Description |", "|---|---|---|---|"]
    for entry in release.zoo:
        name = entry.repository.split("/")[-1]
        shown = f"**{name}** (this one)" if entry.repository == release.repository else name
        lines.append(
            f"| {shown} | {entry.backbone} | {entry.precision.upper()} | {entry.description} |"
        )
    return "## Model zoo\n\n" + "\n".join(lines)


def _training(release: Release) -> str:
    start = (
        f"It started from `{release.base_model}` and was trained in BF16."
        if release.quantization is None
        else f"It started from the distilled BF16 model `{release.base_model}` and was trained on "
        "with its weights quantized in every forward pass (QAT)."
    )
    return (
        f"## Training details\n\n{start} The vision tower was frozen unless the settings say "
        f"otherwise.\n\n{_two_columns(release.training, head=('Setting', 'Value'))}"
    )


def _quantization(quantization: Quantization) -> str:
    half = 2 ** (quantization.bits - 1)
    return (
        "## Quantization details\n\n"
        f"- Weights of {quantization.layers} linear layers of the language decoder (attention "
        "query, key, value and output; MLP gate, up and down) are "
        f"INT{quantization.bits}, symmetric, codes from {-half} to {half - 1}.\n"
        f"- {quantization.group_size} consecutive input weights share one BF16 scale; a weight is "
        "its code times the scale.\n"
        "- The scales were learnt with the weights (LSQ), not measured afterwards.\n"
        "- Embeddings, output head, norms, vision tower and its connector stay BF16.\n"
        "- Stored as compressed-tensors `pack-quantized`. The stored codes are the ones that were "
        "trained, and the reloaded model's BF16 logits equal the trained model's."
    )


def _loading(release: Release) -> str:
    needs = "transformers" if release.quantization is None else "transformers compressed-tensors"
    return f"""## Loading

`pip install {needs}` is enough; no code comes with the weights. Where torchvision is installed,
`AutoProcessor` stands in for the tokenizer and the image processor below.

```python
import torch
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

source = "{release.repository}"
model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.bfloat16)
tokenizer = AutoTokenizer.from_pretrained(source)
image_processor = AutoImageProcessor.from_pretrained(source, backend="pil")
```

With `AutoProcessor`, an answer takes four lines more:

```python
from transformers import AutoProcessor

processor = AutoProcessor.from_pretrained(source)
content = [{{"type": "image", "path": "picture.png"}}, {{"type": "text", "text": "What is this?"}}]
inputs = processor.apply_chat_template([{{"role": "user", "content": content}}], tokenize=True,
    add_generation_prompt=True, return_dict=True, return_tensors="pt")
print(processor.batch_decode(model.generate(**inputs, max_new_tokens=64), skip_special_tokens=True))
```"""


def _limitations(release: Release) -> str:
    lines = [
        "Meant for research on efficient vision-language models, distillation and quantization.",
        "Scores depend on prompts, answer parsing, preprocessing and generation settings; compare "
        "only numbers made the same way.",
        f"What {release.backbone} and {release.teacher} get wrong or are biased in, this model may "
        "have learnt as well. It may describe things that are not in the picture.",
    ]
    if release.quantization is not None:
        lines.append(
            "Plain transformers unpacks the weights at the first forward pass: the files are "
            "smaller, memory in use and speed are those of BF16. A serving engine with kernels "
            "for group-quantized weights keeps them packed."
        )
    return "## Limitations\n\n" + "\n".join(f"- {line}" for line in lines)


def _licence(release: Release) -> str:
    text = (
        f"The weights are released under `{release.licence}`; the terms of "
        f"`{release.backbone}` and `{release.teacher}` apply as well."
    )
    if "sharegpt4v" in release.dataset.lower():
        text += (
            "\n\n**Non-commercial use.** The ShareGPT4V annotations that this model was trained on "
            "are licensed CC BY-NC 4.0 and were written by GPT-4V, so the terms of OpenAI apply to "
            "them too. Use the model for non-commercial purposes only unless you have cleared "
            "this for yourself."
        )
    return f"## Licence\n\n{text}"


def _lineage(lineage: Lineage) -> str:
    (model,) = lineage.models
    tree = plain_tree(lineage, model, "whole in grace_manifest.json")
    return (
        "## Lineage\n\nEach thing stands above what it was made from, with the first digits of its "
        "SHA-256. `grace_manifest.json` holds all of it for machines, with the whole "
        "configuration, and `grace reproduce` takes it from there.\n\n"
        f"```text\n{tree}```\n\n![What this model was made from](lineage.svg)"
    )


def _two_columns(rows: Mapping[str, str | int | float], head: tuple[str, str] = ("", "")) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    for name, value in rows.items():
        shown = str(value).replace("|", "\\|")  # a bar would end the cell
        lines.append(f"| {name} | {shown} |")
    return "\n".join(lines)
