"""A checkpoint as far as its small files and the headers of its weight files tell."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from grace_core.config.models import CheckpointSource
from grace_core.doctor.findings import Finding, problem
from grace_core.models.families import FAMILIES, PROJECTIONS

AREA = "models"

_MAX_HEADER = 100_000_000  # bytes; the format's own bound
_VISION = ("visual.", "model.visual.", "vision_tower.", "model.vision_tower.")
# Hub checkpoints that are older than transformers 5 have other names in front of `layers`.
_PROJECTION = re.compile(
    r"(?:.*\.)?layers\.(\d+)\.(" + "|".join(map(re.escape, PROJECTIONS)) + r")\.weight"
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, its files read as far as they are here."""

    source: CheckpointSource
    folder: Path | None
    """Where it lies on this machine; None where it is to be downloaded."""
    config: Mapping[str, Any] = field(default_factory=dict)
    processor: Mapping[str, Any] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Of the tensors in its weight files, by name; empty where those are not here."""
    listed_parameters: int | None = None
    """What the Hub says of a checkpoint that is not here."""

    def of_text(self, name: str) -> Any:
        """A value of the language decoder's configuration."""
        return self.config.get("text_config", self.config).get(name)

    @property
    def parameters(self) -> int | None:
        """Number of weights; None where nothing tells."""
        if not self.shapes:
            return self.listed_parameters
        return sum(map(math.prod, self.shapes.values()))

    @property
    def pixels_per_token(self) -> int | None:
        """Pixels behind one merged visual token."""
        patch, merge = self.processor.get("patch_size"), self.processor.get("merge_size")
        return (patch * merge) ** 2 if isinstance(patch, int) and isinstance(merge, int) else None

    def projections(self) -> dict[tuple[int, str], int]:
        """Inputs of every layer that quantization replaces, by decoder layer and projection."""
        found = {}
        for name, shape in self.shapes.items():
            match = None if name.startswith(_VISION) else _PROJECTION.fullmatch(name)
            if match and len(shape) == 2:
                found[int(match.group(1)), match.group(2)] = shape[1]
        return found

    def quantized_weights(self) -> int:
        """Number of weights in those layers."""
        return sum(
            math.prod(shape)
            for name, shape in self.shapes.items()
            if not name.startswith(_VISION) and _PROJECTION.fullmatch(name)
        )

    def trained_shapes(self, what: Literal["language", "all"]) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that are trained (:func:`..models.families.set_trainable`)."""
        family = FAMILIES.get(str(self.config.get("model_type")))
        connectors = tuple(
            name.rpartition(".")[2] + "." for name in (family.connectors if family else ())
        )
        found = {}
        for name, shape in self.shapes.items():
            prefix = next((prefix for prefix in _VISION if name.startswith(prefix)), None)
            frozen = prefix is not None and not name.removeprefix(prefix).startswith(connectors)
            if what == "all" or not frozen:
                found[name] = shape
        return found

    @property
    def decoder(self) -> str:
        """Name of the language decoder, for messages."""
        family = FAMILIES.get(str(self.config.get("model_type")))
        return family.decoder if family else "decoder"


def read_checkpoint(source: CheckpointSource, key: str) -> tuple[Checkpoint, list[Finding]]:
    """The checkpoint that `source` names, and what is wrong with its files.

    key: of the configuration, such as models.teacher.path, for messages.
    """
    folder = _folder(source)
    if folder is None:
        wrong = [] if may_be_on_hub(source.path) else [_nowhere(source, key)]
        return Checkpoint(source, None), wrong
    weights = sorted(folder.glob("*.safetensors"))
    try:
        config = _read_json(folder / "config.json")
        processor_file = folder / "preprocessor_config.json"
        processor = _read_json(processor_file) if processor_file.is_file() else {}
        shapes: dict[str, tuple[int, ...]] = {}
        for file in weights:
            shapes |= _read_shapes(file)
    except (OSError, ValueError, struct.error) as error:
        text = f"{key}: {folder} is no readable Hugging Face checkpoint: {error}"
        return Checkpoint(source, folder), [problem(AREA, text, "fetch it again, or mend the path")]
    wrong = []
    if not weights and is_local(source):
        text = f"{key}: {folder} holds no *.safetensors"
        wrong.append(problem(AREA, text, "only safetensors are read; convert the weights"))
    return Checkpoint(source, folder, config, processor, shapes), wrong


def is_local(source: CheckpointSource) -> bool:
    """Whether a folder of this machine is meant, not a repository of the Hub."""
    return Path(source.path).expanduser().is_dir()


def may_be_on_hub(path: str) -> bool:
    return path.count("/") == 1 and not path.startswith(("/", ".", "~"))


def to_be_downloaded(checkpoint: Checkpoint) -> bool:
    """Whether a run must fetch the checkpoint, or what of it is missing, from the Hub."""
    return not is_local(checkpoint.source) and not checkpoint.shapes


def _nowhere(source: CheckpointSource, key: str) -> Finding:
    return problem(
        AREA,
        f"{key}: no folder {source.path} here ({Path.cwd()}), and that is no Hub repository "
        "`owner/name`",
        "mend the path, or run in the folder it starts from",
    )


def _folder(source: CheckpointSource) -> Path | None:
    """Where a checkpoint lies on this machine, the Hub's cache included."""
    folder = Path(source.path).expanduser()
    if folder.is_dir():
        return folder
    if not may_be_on_hub(source.path):
        return None
    from huggingface_hub import try_to_load_from_cache  # slow to import

    file = try_to_load_from_cache(source.path, "config.json", revision=source.revision)
    return Path(file).parent if isinstance(file, str) else None


def _read_json(file: Path) -> dict[str, Any]:
    value = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"{file.name} is no JSON object")
    return value


def _read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a safetensors file, from its header."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > _MAX_HEADER:
            raise ValueError(f"{file.name} is no safetensors file")
        header = json.loads(stream.read(length))
    return {
        name: tuple(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__"
    }
