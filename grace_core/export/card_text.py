"""The text of a model card, section by section."""

from __future__ import annotations

from collections.abc import Mapping

from grace_core.export.amounts import in_bytes, in_short
from grace_core.export.card_facts import (
    ARXIV,
    AUTHORS,
    PAPER,
    VENUE,
    Quantization,
    Release,
    Results,
    ZooEntry,
)
from grace_core.export.card_loading import loading
from grace_core.lineage.text import plain_tree

CITATION = f"""@article{{chen2026gated,
  title={{{PAPER}}},
  author={{{" and ".join(", ".join(reversed(name.rsplit(" ", 1))) for name in AUTHORS)}}},
  journal={{arXiv preprint arXiv:{ARXIV}}},
  year={{2026}}
}}"""

_PRECISION = {
    "bf16": "BF16 full precision, not quantized",
    "w8": "weights INT8 (W8A16), everything else BF16",
    "w4": "weights INT4 (W4A16), everything else BF16",
}


_STYLES = {"llava": "LLaVA", "qwen3-vl": "Qwen3-VL", "vlmevalkit": "VLMEvalKit", "grace": "GRACE"}


def body(release: Release, results: Results) -> str:
    """Everything below the metadata."""
    sections = [
        _introduction(release, results),
        _results(release, results),
        _zoo(release),
        _intended_use(release),
        _training(release),
        *([_quantization(release, release.quantization)] if release.quantization else []),
        "## Files\n\n" + "\n".join(f"- `{name}`" for name in sorted(release.files)),
        loading(release),
        _limitations(release),
        _licence(release),
        _lineage(release),
        f"## Citation\n\n```bibtex\n{CITATION}\n```",
    ]
    return "\n\n".join(sections) + "\n"


def _introduction(release: Release, results: Results) -> str:
    kind = (
        "a full-precision vision-language model distilled"
        if release.quantization is None
        else f"an INT{release.quantization.bits} vision-language model, distilled and quantized "
        "while training,"
    )
    rows = {
        "Repository": release.repository,
        "Base model": release.base_model,
        "Backbone": release.backbone,
        "Teacher": release.teacher,
        "Training framework": f"GRACE ([arXiv {ARXIV}](https://arxiv.org/abs/{ARXIV}))",
        "Precision": _PRECISION[release.precision],
        "Parameters": in_short(release.parameters),
        "Weight files": in_bytes(release.size),
        "Training data": release.dataset,
        "Evaluation protocol": _protocol(results),
    }
    return (
        f"# {release.name}\n\n"
        f"This is {kind} with GRACE from {release.teacher} into {release.backbone}. The teacher's "
        "answers weigh more where it is sure of them, and the student learns how the teacher "
        f"relates the parts of a picture to each other. The method is that of *{PAPER}* by "
        f"{', '.join(AUTHORS[:-1])} and {AUTHORS[-1]} ({VENUE}).\n\n"
        f"## Model details\n\n{_two_columns(rows)}"
    )


def _protocol(results: Results) -> str:
    styles = dict.fromkeys(
        prompt for name in results.scores if (prompt := results.facts(name).prompt) is not None
    )
    shown = " and ".join(f"{_STYLES.get(style, style)}-style" for style in styles)
    asked = f"greedy answers to {shown} prompts" if styles else "greedy answers"
    if results.pixels is not None:
        asked += " about pictures of {:,} to {:,} pixels".format(*results.pixels)
    return f"{asked}, scored by each benchmark's own rule"


def _asked(results: Results) -> str:
    """Where the questions came from, how they were worded, and what the scores are."""
    lines = ["| Benchmark | Questions | Prompts | Score |", "|---|---|---|---|"]
    for name in results.scores:
        facts = results.facts(name)
        place = "no data set of the Hub"
        if facts.dataset is not None:
            commit = f" at `{facts.revision[:12]}`" if facts.revision else ""
            names = ", ".join(filter(None, (facts.config, facts.split)))
            place = f"`{facts.dataset}`{commit}{f', {names}' if names else ''}"
        part = "" if facts.part is None else f"**a part: {facts.part}**; "
        prompt = "its own" if facts.prompt is None else _STYLES.get(facts.prompt, facts.prompt)
        lines.append(f"| {facts.title} | {part}{place} | {prompt} | {facts.metric} |")
    return "\n".join(lines)


def _results(release: Release, results: Results) -> str:
    measured = (
        "on the released files, reloaded from disk"
        if release.form != "awq"
        else "of the compressed-tensors form, which holds the same codes and scales; the files of "
        "this form were compared with it and not scored themselves"
    )
    parts = [
        "## Results",
        f"Scores in percent {measured}. The teacher is a reference, the baseline the student "
        "before training.",
        results.table,
        *([results.summary] if results.summary else []),
        _asked(results),
    ]
    return "\n\n".join(parts)


def _zoo(release: Release) -> str:
    lines = ["| Model | Backbone | Bits | Group | Description |", "|---|---|---|---:|---|"]
    lines += [_zoo_line(entry, release) for entry in release.zoo]
    return "## Model zoo\n\n" + "\n".join(lines)


def _zoo_line(entry: ZooEntry, release: Release) -> str:
    name = entry.repository.split("/")[-1]
    shown = (
        f"[{name}](https://huggingface.co/{entry.repository})" if "/" in entry.repository else name
    )
    if entry.repository == release.repository:
        shown = f"**{name}** (this one)"
    group = entry.group_size or ""
    return f"| {shown} | {entry.backbone} | {entry.bits} | {group} | {entry.description} |"


def _intended_use(release: Release) -> str:
    uses = [
        "efficient vision-language models",
        "knowledge distillation for vision-language models, and multimodal alignment",
        "comparisons of teacher, student before and student after",
    ]
    if release.quantization is not None:
        uses.append("inference with low-bit weights")
    return "## Intended use\n\nResearch on\n\n" + "\n".join(f"- {use}" for use in uses)


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


def _quantization(release: Release, quantization: Quantization) -> str:
    half = 2 ** (quantization.bits - 1)
    stored = (
        "Stored as compressed-tensors `pack-quantized`. The stored codes are the ones that were "
        "trained, and the reloaded model's BF16 logits equal the trained model's."
        if release.form == "compressed-tensors"
        else f"Stored as AWQ GEMM: the codes that were trained, plus {half}, beside zero points of "
        f"{half} and the trained scales, which FP16 holds exactly."
    )
    return (
        "## Quantization details\n\n"
        f"- Weights of {quantization.layers} linear layers of the language decoder (attention "
        "query, key, value and output; MLP gate, up and down) are "
        f"INT{quantization.bits}, symmetric, codes from {-half} to {half - 1}.\n"
        f"- {quantization.group_size} consecutive input weights share one BF16 scale; a weight is "
        "its code times the scale.\n"
        "- The scales were learnt with the weights (LSQ), not measured afterwards.\n"
        "- Embeddings, output head, norms, vision tower and its connector stay BF16.\n"
        f"- {stored}"
    )


def _limitations(release: Release) -> str:
    lines = [
        "Released for research purposes.",
        "Scores depend on prompts, answer parsing, preprocessing and generation settings; compare "
        "only numbers made the same way.",
        f"What {release.backbone} and {release.teacher} get wrong or are biased in, this model may "
        "have learnt as well. It may describe things that are not in the picture.",
    ]
    if release.quantization is None:
        lines.append("It is not made for low-bit inference; the W8 and W4 models of the zoo are.")
    elif release.form == "compressed-tensors":
        lines.append(
            "Plain transformers unpacks the weights at the first forward pass: the files are "
            "smaller, memory in use and speed are those of BF16. A serving engine with kernels "
            "for group-quantized weights keeps them packed."
        )
    else:
        lines.append("AWQ's kernels compute in FP16 or BF16 and need a GPU.")
    return "## Limitations\n\n" + "\n".join(f"- {line}" for line in lines)


def _licence(release: Release) -> str:
    text = (
        f"The weights are released under `{release.licence}`; the terms of "
        f"`{release.backbone}` and `{release.teacher}` apply as well."
    )
    if release.non_commercial:
        assert release.data_licence is not None
        text += (
            f"\n\n**Non-commercial use.** The data that this model was trained on, "
            f"`{release.dataset}`, are licensed `{release.data_licence}`"
        )
        if "sharegpt4v" in release.dataset.lower():
            text += (
                ", and the annotations were written by GPT-4V, so the terms of OpenAI apply to "
                "them too"
            )
        text += (
            ". Use the model for non-commercial purposes only unless you have cleared this for "
            "yourself."
        )
    return f"## Licence\n\n{text}"


def _lineage(release: Release) -> str:
    (model,) = release.lineage.models
    tree = plain_tree(release.lineage, model, "whole in grace_manifest.json")
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
