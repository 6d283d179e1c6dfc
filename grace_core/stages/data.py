"""Stages `world` and `data`: from pictures and conversations to samples."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice

from grace_core.artifacts import Artifact, ArtifactWriter, Parent, fingerprint
from grace_core.config.data import ShareGPT4VData, ToyData
from grace_core.config.tree import GraceConfig
from grace_core.data.prepare import PreparationReport, prepare
from grace_core.data.sharegpt4v import RawRecord, read_records
from grace_core.models.loading import (
    CheckpointFolder,
    check_pair,
    load_image_processor,
    load_tokenizer,
    locate_checkpoint,
)
from grace_core.models.visual_inputs import VisualInputs
from grace_core.stages.once import StageContext, once, progress
from grace_core.stages.sources import (
    annotations_parent,
    pictures_parent,
    sharegpt4v_files,
    world_section,
)
from grace_core.toy.world import write_training_set


def generate_world(config: GraceConfig, context: StageContext) -> Artifact:
    """Stage `world`: generated pictures and conversations in ShareGPT4V's schema."""
    source = config.data.source
    assert isinstance(source, ToyData), "only toy data are generated"

    def make(writer: ArtifactWriter) -> None:
        write_training_set(
            writer.path,
            count=source.records,
            seed=config.seed,
            wrong_answer_share=source.wrong_answer_share,
        )

    return once(config, context, "world", world_section(config), {}, make)


def prepare_data(config: GraceConfig, context: StageContext) -> Artifact:
    """Stage `data`: conversations and pictures as tokenized samples, bad records in quarantine."""
    student = locate_checkpoint(config.models.student)
    check_pair(locate_checkpoint(config.models.teacher), student)
    data = config.data
    parents = {"tokenizer": _tokenizer_parent(student)}
    if isinstance(data.source, ShareGPT4VData):
        root, files = sharegpt4v_files(data.source)
        parents["annotations"] = annotations_parent(files)
        parents["pictures"] = pictures_parent(root, config.run_dir)
        limit = data.source.limit
    else:
        world = generate_world(config, context)
        root, files, limit = world.path, [world.path / "train.json"], None
        parents["world"] = world.as_parent()
    section = {**data.model_dump(mode="json"), "seed": config.seed}

    def make(writer: ArtifactWriter) -> None:
        visual = VisualInputs(student, min_pixels=data.min_pixels, max_pixels=data.max_pixels)

        total = data.source.records if isinstance(data.source, ToyData) else limit
        size, bytes_read = sum(file.stat().st_size for file in files), 0

        def records() -> Iterator[RawRecord]:
            nonlocal bytes_read
            for raw in islice(read_records(files), limit):
                bytes_read = raw.bytes_read
                yield raw

        def report(counts: PreparationReport) -> None:
            # How many records a file holds is known at its end; how many bytes, from the start.
            done, of = (counts.records, total) if total else (bytes_read, size)
            values = {**_counts(counts), "done": float(done), "total": float(of)}
            context.on_event(progress("data", counts.records, values))

        counts = prepare(
            records(),
            root=root,
            tokenizer=load_tokenizer(student.path),
            image_token_id=student.image_token_id,
            picture_tokens=visual.grid_and_tokens,
            max_tokens=data.max_tokens,
            max_decoded_pixels=data.max_decoded_pixels,
            max_quarantined_share=data.max_quarantined_share,
            held_out_share=data.held_out_share,
            seed=config.seed,
            out=writer.path,
            on_progress=report,
        )
        writer.metrics |= _counts(counts)
        writer.facts["quarantined"] = counts.reasons

    return once(config, context, "data", section, parents, make)


def _tokenizer_parent(folder: CheckpointFolder) -> Parent:
    """What of a checkpoint decides how records become tokens: its small files, not its weights."""
    tokenizer, processor = load_tokenizer(folder.path), load_image_processor(folder.path)
    facts = {
        "vocabulary": tokenizer.get_vocab(),
        "template": tokenizer.get_chat_template(),
        "processor": json.loads(processor.to_json_string()),
        "image_token_id": folder.image_token_id,
        "family": folder.family.model_type,
    }
    return Parent(
        kind="tokenizer",
        path=str(folder.path),
        digest=fingerprint("tokenizer", facts, {}),
        revision=folder.revision,
    )


def _counts(counts: PreparationReport) -> dict[str, float]:
    return {name: float(value) for name, value in vars(counts).items() if isinstance(value, int)}
