"""The teacher's outputs on disk: shards of samples in safetensors, read by sample.

A shard holds its samples' tensors one after the other, and where each sample's end. Files are
mapped, so that reading a sample touches its own pages. A folder of shards is whole once
`outputs.json` is in it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from grace_core.errors import GraceError
from grace_core.losses.relational import TeacherRelation
from grace_core.losses.stored_relation import StoredRelation, restored_relation
from grace_core.losses.truncated_teacher import TruncatedRows, joined_rows
from grace_core.whole_files import write_whole

INDEX = "outputs.json"
_OF_TOKENS = tuple(field.name for field in fields(TruncatedRows))


class OutputsIndex(BaseModel):
    """What a folder of shards holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    samples: int
    shard_samples: int
    """Samples of each shard; the last one may have fewer."""
    temperature: float
    top_k: int
    tokens: int
    """Of all samples."""
    supervised: int
    pictures: int
    tail_mass: float
    """Share of the teacher's probability at T, the target's left out, that is in no kept logit: the
    mean over the first shard's supervised tokens."""


@dataclass(frozen=True)
class SampleOutputs:
    """What the teacher made of one sample."""

    rows: TruncatedRows
    """Its supervised tokens."""

    relations: list[StoredRelation]
    """Its pictures."""


def shard_file(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def write_shard(file: Path, samples: Sequence[SampleOutputs]) -> None:
    """Write a shard whole: under its name it is complete, whatever happens meanwhile."""
    relations = [relation for sample in samples for relation in sample.relations]
    rows = joined_rows([sample.rows for sample in samples])
    tensors = {name: getattr(rows, name).contiguous() for name in _OF_TOKENS}
    empty = torch.empty(0, dtype=torch.float16)
    tensors |= {
        "token_ends": _ends(len(sample.rows) for sample in samples),
        "picture_ends": _ends(len(sample.relations) for sample in samples),
        "relations": torch.cat([empty, *(relation.values for relation in relations)]),
        "relation_ends": _ends(relation.values.numel() for relation in relations),
        "scales": torch.tensor([r.scale for r in relations], dtype=torch.float64),
        "gram_norms": torch.tensor([r.gram_norm for r in relations], dtype=torch.float64),
        "visual_tokens": torch.tensor([r.num_tokens for r in relations], dtype=torch.int64),
        "are_grams": torch.tensor([r.is_gram for r in relations], dtype=torch.bool),
    }
    aside = file.with_name(f".{file.name}.new")
    save_file(tensors, aside)
    with aside.open("rb") as stream:
        os.fsync(stream.fileno())
    os.replace(aside, file)


def rows_of_shard(file: Path) -> TruncatedRows:
    """All supervised tokens of a shard."""
    with safe_open(file, framework="pt") as content:
        return TruncatedRows(**{name: content.get_tensor(name) for name in _OF_TOKENS})


def write_index(folder: Path, index: OutputsIndex) -> None:
    write_whole(folder / INDEX, index.model_dump_json(indent=1) + "\n")


def read_index(folder: Path) -> OutputsIndex:
    """Raises GraceError where the folder holds no whole outputs of this version."""
    try:
        return OutputsIndex.model_validate_json((folder / INDEX).read_text(encoding="utf-8"))
    except (FileNotFoundError, UnicodeDecodeError, ValidationError) as error:
        raise GraceError(
            f"{folder} holds no teacher outputs of this version ({type(error).__name__}); delete "
            "it and run the stage teacher-outputs again"
        ) from error


class TeacherOutputs:
    """The outputs of a data set, by sample. Shards are opened when first needed."""

    def __init__(self, folder: Path, *, samples: int, temperature: float | None) -> None:
        """
        Args:
            samples: of the data set.
            temperature: T of distillation; None where nothing is distilled.

        Raises:
            GraceError: the outputs are of other data, or were made for another temperature.
        """
        self._folder = folder
        self._index = read_index(folder)
        self._shards: dict[int, _Shard] = {}
        if self._index.samples != samples:
            raise GraceError(
                f"{folder} holds the teacher's outputs of {self._index.samples} samples, the data "
                f"have {samples}; run the stage teacher-outputs again with these data"
            )
        if temperature is not None and self._index.temperature != temperature:
            raise GraceError(
                f"{folder} was made for temperature {self._index.temperature:g}, the objective has "
                f"{temperature:g}; run the stage teacher-outputs again with this configuration"
            )

    def __getstate__(self) -> dict[str, Any]:
        # A loader's process maps files of its own.
        return {**vars(self), "_shards": {}}

    def of_samples(self, samples: Sequence[int]) -> tuple[TruncatedRows, list[TeacherRelation]]:
        """Supervised tokens and pictures of samples in the given order.

        Args:
            samples: indexes into the data set, at least one.
        """
        found = [self._of_sample(sample) for sample in samples]
        relations = [restored_relation(each) for one in found for each in one.relations]
        return joined_rows([one.rows for one in found]), relations

    def _of_sample(self, sample: int) -> SampleOutputs:
        number, within = divmod(sample, self._index.shard_samples)
        if number not in self._shards:
            self._shards[number] = _Shard(shard_file(self._folder, number))
        return self._shards[number].sample(within)


class _Shard:
    def __init__(self, file: Path) -> None:
        self._content = safe_open(file, framework="pt")
        names = ("token_ends", "picture_ends", "relation_ends", "visual_tokens")
        self._ends: dict[str, list[int]] = {name: self._all(name).tolist() for name in names}
        self._scales: list[float] = self._all("scales").tolist()
        self._gram_norms: list[float] = self._all("gram_norms").tolist()
        self._are_grams: list[bool] = self._all("are_grams").tolist()

    def sample(self, index: int) -> SampleOutputs:
        tokens = self._range("token_ends", index)
        pictures = self._range("picture_ends", index)
        rows = {name: self._part(name, tokens) for name in _OF_TOKENS}
        relations = [self._relation(i) for i in range(pictures.start, pictures.stop)]
        return SampleOutputs(TruncatedRows(**rows), relations)

    def _relation(self, picture: int) -> StoredRelation:
        return StoredRelation(
            values=self._part("relations", self._range("relation_ends", picture)),
            scale=self._scales[picture],
            is_gram=self._are_grams[picture],
            num_tokens=self._ends["visual_tokens"][picture],
            gram_norm=self._gram_norms[picture],
        )

    def _range(self, ends: str, index: int) -> slice:
        return slice(self._ends[ends][index - 1] if index else 0, self._ends[ends][index])

    def _part(self, name: str, part: slice) -> Tensor:
        tensor: Tensor = self._content.get_slice(name)[part]
        return tensor

    def _all(self, name: str) -> Tensor:
        tensor: Tensor = self._content.get_tensor(name)
        return tensor


def _ends(counts: Iterable[int]) -> Tensor:
    return torch.tensor(list(counts), dtype=torch.int64).cumsum(0)
