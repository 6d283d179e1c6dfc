"""Both models, without loading them: do they fit one another and the configuration?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from grace_core.config.tree import GraceConfig
from grace_core.doctor.checkpoints import AREA, Checkpoint, is_local, to_be_downloaded
from grace_core.doctor.findings import Finding, ok, problem, unchecked, warning
from grace_core.models.families import FAMILIES

_SHOWN = 3


def misfits(config: GraceConfig, teacher: Checkpoint, student: Checkpoint) -> Iterator[Finding]:
    """What no machine can run."""
    yield from _families(teacher, student)
    sizes = teacher.of_text("vocab_size"), student.of_text("vocab_size")
    if None not in sizes and sizes[0] != sizes[1]:
        yield problem(
            AREA,
            f"models: the teacher's vocabulary has {sizes[0]} entries, the student's {sizes[1]}",
            "distillation compares them one by one, choose two models of one vocabulary",
        )
    yield from _image_tokens(teacher, student)
    yield from _group_size(config, student)


def _families(*checkpoints: Checkpoint) -> Iterator[Finding]:
    for checkpoint in checkpoints:
        family = checkpoint.config.get("model_type")
        if checkpoint.config and family not in FAMILIES:
            yield problem(
                AREA,
                f"{checkpoint.source.path} is of the family {family!r}, which is not supported",
                f"choose one of {', '.join(sorted(FAMILIES))}",
            )


def _image_tokens(teacher: Checkpoint, student: Checkpoint) -> Iterator[Finding]:
    numbers = [
        checkpoint.config.get("image_token_id", checkpoint.config.get("image_token_index"))
        for checkpoint in (teacher, student)
    ]
    if None not in numbers and numbers[0] != numbers[1]:
        yield problem(
            AREA,
            f"models: the teacher's image token is {numbers[0]}, the student's {numbers[1]}",
            "both must read the same token sequence, choose two models of one tokenizer",
        )


def _group_size(config: GraceConfig, student: Checkpoint) -> Iterator[Finding]:
    """Every quantized layer by the weights' own shapes; else by the configuration."""
    group = config.quantize.group_size
    layers = student.projections()
    bad = {key: width for key, width in layers.items() if width % group}
    if bad:
        yield problem(
            AREA,
            f"quantize.group_size ({group}) does not divide the inputs of {len(bad)} of "
            f"{len(layers)} layers of the student: {_in_ranges(student.decoder, bad)}",
            "choose one that does, or another student",
        )
    if layers:
        return
    heads, size = student.of_text("num_attention_heads"), student.of_text("head_dim")
    widths = {name: student.of_text(name) for name in ("hidden_size", "intermediate_size")}
    widths["num_attention_heads x head_dim"] = heads * size if heads and size else None
    misfit = [f"{name} {width}" for name, width in widths.items() if width and width % group]
    if misfit:
        yield problem(
            AREA,
            f"quantize.group_size ({group}) does not divide the student's {' and '.join(misfit)}",
            "choose one that does, or another student",
        )


def _in_ranges(decoder: str, widths: dict[tuple[int, str], int]) -> str:
    """Layers by name and inputs, consecutive ones as `layers.0-27`."""
    shown = []
    by_kind = sorted(widths, key=lambda key: (key[1], widths[key], key[0]))
    for (name, width), keys in groupby(by_kind, key=lambda key: (key[1], widths[key])):
        numbers = [number for number, _ in keys]
        runs: list[list[int]] = []
        for number in numbers:
            if runs and number == runs[-1][-1] + 1:
                runs[-1].append(number)
            else:
                runs.append([number])
        ranges = ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
        shown.append(f"{decoder}.layers.{ranges}.{name} ({width})")
    return ", ".join(shown)


def unpinned(teacher: Checkpoint, student: Checkpoint) -> Iterator[Finding]:
    """Repositories whose content may change."""
    for role, checkpoint in (("teacher", teacher), ("student", student)):
        source = checkpoint.source
        if source.revision is None and not is_local(source):
            yield warning(
                AREA,
                f"models.{role}: {source.path} may change between two runs",
                "pin `revision` to a commit, so that the run can be repeated",
            )


def check_models(
    config: GraceConfig, teacher: Checkpoint, student: Checkpoint
) -> Iterator[Finding]:
    """Everything about the two models that this machine can tell without loading them."""
    found = [*misfits(config, teacher, student), *unpinned(teacher, student)]
    yield from found
    if student.shapes and not student.projections():
        yield problem(
            AREA,
            f"models.student: {student.folder} holds no layer that could be quantized "
            "(layers.<number>.self_attn.q_proj and its like)",
            f"choose a model of the families {', '.join(sorted(FAMILIES))}",
        )
    elif not student.shapes:
        yield unchecked(
            AREA,
            f"models.student: the weights of {student.source.path} are not here; its layers were "
            f"judged by {'its configuration alone' if student.config else 'nothing yet'}",
            "download the model first, or let the run do it",
        )
    elif not any("group_size" in finding.text for finding in found):
        yield ok(
            AREA,
            f"quantize.group_size ({config.quantize.group_size}) divides the inputs of all "
            f"{len(student.projections())} layers that are quantized",
        )
    yield from _vocabularies(teacher, student)


def _vocabularies(teacher: Checkpoint, student: Checkpoint) -> Iterator[Finding]:
    """Entry by entry: two vocabularies of one size may still disagree on what a number means."""
    folders = {"teacher": teacher.folder, "student": student.folder}
    away = [role for role, folder in folders.items() if folder is None]
    files = {role: folder / "tokenizer.json" for role, folder in folders.items() if folder}
    away += [role for role, file in files.items() if not file.is_file()]
    if away:
        yield unchecked(
            AREA,
            f"vocabularies were not compared: no tokenizer.json of the {' and '.join(away)} here",
            "download the models first, or save their tokenizers with save_pretrained",
        )
        return
    contents = {role: file.read_bytes() for role, file in files.items()}
    if len({hashlib.sha256(content).digest() for content in contents.values()}) == 1:
        yield ok(AREA, "teacher and student have the same tokenizer, file by file")
        return
    try:
        entries = {role: _entries(json.loads(content)) for role, content in contents.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        yield problem(
            AREA,
            f"a tokenizer.json cannot be read ({type(error).__name__}: {error})",
            f"fetch the tokenizers again: {', '.join(map(str, files.values()))}",
        )
        return
    theirs, ours = entries["teacher"], entries["student"]
    numbers = sorted(theirs.keys() | ours.keys())
    differing = [number for number in numbers if theirs.get(number) != ours.get(number)]
    if not differing:
        yield ok(AREA, f"teacher and student share all {len(ours):,} entries of their vocabulary")
        return
    shown = ", ".join(
        f"{number}: {theirs.get(number)!r} and {ours.get(number)!r}"
        for number in differing[:_SHOWN]
    )
    more = f", and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
    yield problem(
        AREA,
        f"{len(differing):,} entries of the teacher's vocabulary differ from the student's "
        f"({shown}{more})",
        "distillation compares them one by one, choose two models of one tokenizer",
    )


def _entries(tokenizer: dict[str, Any]) -> dict[int, str]:
    """Token by number; unigram models list their pieces, the others map them."""
    vocabulary = tokenizer["model"]["vocab"]
    if isinstance(vocabulary, list):
        entries = {number: str(piece[0]) for number, piece in enumerate(vocabulary)}
    else:
        entries = {int(number): str(token) for token, number in vocabulary.items()}
    added = tokenizer.get("added_tokens") or []
    return entries | {int(token["id"]): str(token["content"]) for token in added}


def downloads(teacher: Checkpoint, student: Checkpoint) -> list[Checkpoint]:
    """What a run must fetch from the Hub, each once."""
    by_place = {
        (checkpoint.source.path, checkpoint.source.revision): checkpoint
        for checkpoint in (teacher, student)
        if to_be_downloaded(checkpoint)
    }
    return list(by_place.values())
