"""Section `models`: teacher and student."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from grace_core.config.section import Section

TeacherWeights = Literal["whole", "sharded"]


class CheckpointSource(Section):
    """A Hugging Face checkpoint: a directory on this machine or a repository of the Hub."""

    path: str = Field(
        min_length=1, description="directory on this machine, or Hub repository `owner/name`"
    )
    revision: str | None = Field(
        None, description="commit of the Hub repository; pin it for a run that can be repeated"
    )


class Models(Section):
    """Teacher and student. Both must share one vocabulary and one model family's tokenizer."""

    teacher: CheckpointSource
    student: CheckpointSource
    teacher_weights: TeacherWeights = Field(
        "whole",
        description="where the frozen teacher's weights are while it teaches: whole on every GPU, "
        "or sharded over all of them (ZeRO-3), for a teacher that does not fit; slower",
    )
