"""A Hugging Face checkpoint directory as files: tensors by name, and how to write a new one whole.

Tensor names on disk need not be those of the model in memory. Transformers keeps the names that a
family was first published with (``language_model.model.layers...`` for LLaVA-1.5,
``model.layers...`` for Qwen2-VL) and renames on loading. :func:`model_names` asks transformers for
that renaming instead of repeating its rules here.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from grace_core.errors import GraceError
from grace_core.export.lazy_tensors import DTYPES

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*processor_config.json",
    "LICENSE*",
    "NOTICE*",
)
"""Files that belong to a release as they are; the rest of a trained directory stays there."""


@dataclass(frozen=True)
class WeightFiles:
    """The safetensors files of a checkpoint, from which tensors are read one at a time.

    Attributes:
        folder: the checkpoint directory.
        files: tensor names in each file, by file name.
        headers: dtype and shape of every tensor.
    """

    folder: Path
    files: dict[str, tuple[str, ...]]
    headers: dict[str, tuple[torch.dtype, tuple[int, ...]]]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.headers)

    def read(self, name: str) -> Tensor:
        """One tensor by its name on disk, on the CPU.

        The file is mapped for this tensor alone: what was read before takes no memory.
        """
        file = next(file for file, names in self.files.items() if name in names)
        with safe_open(self.folder / file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor

    def tensors(self, file: str) -> Iterator[tuple[str, Tensor]]:
        """Every (name, tensor) of one file."""
        for name in self.files[file]:
            yield name, self.read(name)


def weight_files(folder: Path) -> WeightFiles:
    """Find the weights of a checkpoint, in one file or in several with an index.

    Raises:
        GraceError: there are none, a file is missing or damaged, a dtype is none that models are
            trained in, or the index names a path outside of the directory.
    """
    index = folder / INDEX_FILE
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(weight_map.values()))
    else:
        weight_map = None
        files = [SINGLE_FILE]
    outside = [file for file in files if Path(file).name != file]
    if outside:
        raise GraceError(f"{index}: {outside[0]!r} is not a file of this directory")
    found = {}
    headers: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for file in files:
        try:
            with safe_open(folder / file, framework="pt") as opened:
                found[file] = tuple(opened.keys())
                for name in found[file]:
                    header = opened.get_slice(name)
                    headers[name] = DTYPES[header.get_dtype()], tuple(header.get_shape())
        except FileNotFoundError as error:
            raise GraceError(f"{folder}: {file} is missing; no complete checkpoint") from error
        except SafetensorError as error:
            raise GraceError(f"{folder}: {file} is damaged ({error})") from error
        except KeyError as error:
            raise GraceError(f"{folder}: {file} holds {name} as {error}, not supported") from error
    if weight_map is not None:
        listed = {(name, file) for name, file in weight_map.items()}
        present = {(name, file) for file, names in found.items() for name in names}
        if listed != present:
            name, file = min(listed ^ present)
            raise GraceError(f"{folder}: {INDEX_FILE} and {file} disagree about {name}")
    return WeightFiles(folder, found, headers)


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a trained bf16 checkpoint.

    Raises:
        GraceError: it is missing, not bf16, or already describes a quantized release.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise GraceError(f"{folder} holds no config.json: not a Hugging Face checkpoint")
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    dtype = config.get("dtype", config.get("torch_dtype"))
    if dtype != "bfloat16":
        raise GraceError(f"{file}: dtype is {dtype!r}; releases are made from bfloat16 checkpoints")
    if "quantization_config" in config:
        raise GraceError(f"{file}: already a quantized release; give the trained checkpoint")
    return config


def skeleton(folder: Path) -> Any:
    """The checkpoint's model without weights, on the meta device."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, trust_remote_code=False)


def model_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Names of tensors on disk -> names in the model, as ``from_pretrained`` maps them."""
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    return {
        name: rename_source_key(name, renamings, converters, model.base_model_prefix, state)[0]
        for name in names
    }


def companions(folder: Path) -> list[str]:
    """Names of the files of a checkpoint that belong to its release as they are."""
    return [
        file.name
        for file in sorted(folder.iterdir())
        if file.is_file() and any(fnmatch(file.name, pattern) for pattern in COMPANIONS)
    ]


def copy_companions(source: Path, destination: Path) -> None:
    """Copy tokenizer, chat template, processor and licence files."""
    for name in companions(source):
        shutil.copyfile(source / name, destination / name)


@contextmanager
def new_directory(destination: Path) -> Iterator[Path]:
    """A sibling of ``destination`` to write into, renamed to it at the end, removed on error.

    Raises:
        GraceError: the destination exists and is not empty.
    """
    if destination.exists() and any(destination.iterdir()):
        raise GraceError(f"{destination} exists already; remove it or choose another directory")
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = destination.with_name(f".{destination.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir()
    try:
        yield partial
        os.replace(partial, destination)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
