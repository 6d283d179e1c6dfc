"""Reading checkpoints: plain Hugging Face directories, or repositories of the Hub."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from grace_core.config.models import CheckpointSource
from grace_core.errors import GraceError
from grace_core.models.cached_attention import CACHED
from grace_core.models.deepstack import add_deepstack
from grace_core.models.families import Family, family_of
from grace_core.models.packed_attention import PACKED


@dataclass(frozen=True)
class CheckpointFolder:
    """A checkpoint on disk and what its `config.json` says."""

    path: Path
    config: dict[str, Any]
    revision: str | None = None

    @property
    def family(self) -> Family:
        return family_of(self.config["model_type"])

    @property
    def vocab_size(self) -> int:
        text = self.config.get("text_config", self.config)
        return int(text["vocab_size"])

    @property
    def image_token_id(self) -> int:
        token = self.config.get("image_token_id", self.config.get("image_token_index"))
        if token is None:
            raise GraceError(f"{self.path}/config.json names no image_token_id")
        return int(token)


def locate_checkpoint(source: CheckpointSource) -> CheckpointFolder:
    """Find a checkpoint on this machine, downloading it from the Hub when it is not a directory.

    Only safetensors weights and text files are fetched; neither pickles nor code.
    """
    folder = Path(source.path).expanduser()
    revision = None
    if not folder.is_dir():
        if folder.is_absolute() or source.path.count("/") != 1:
            raise GraceError(
                f"no checkpoint directory {source.path}; give a directory or a Hub repository "
                "`owner/name`"
            )
        try:
            folder = Path(
                snapshot_download(
                    source.path,
                    revision=source.revision,
                    allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"],
                )
            )
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise GraceError(
                f"{source.path} is neither a directory here nor to be had from the Hub "
                f"({type(error).__name__}); check the name, the revision and the connection, or "
                "download it first and give its directory"
            ) from error
        revision = folder.name  # a snapshot's folder is named by its commit
    return read_checkpoint(folder, revision)


def read_checkpoint(folder: Path, revision: str | None = None) -> CheckpointFolder:
    """Read `config.json` of a checkpoint directory."""
    file = folder / "config.json"
    if not file.is_file():
        raise GraceError(f"{folder} holds no config.json: not a Hugging Face checkpoint")
    if not list(folder.glob("*.safetensors")):
        raise GraceError(f"{folder} holds no *.safetensors; only safetensors weights are read")
    return CheckpointFolder(folder, json.loads(file.read_text(encoding="utf-8")), revision)


def check_pair(teacher: CheckpointFolder, student: CheckpointFolder) -> None:
    """Raise unless teacher and student can be distilled into one another."""
    if teacher.vocab_size != student.vocab_size:
        raise GraceError(
            f"vocabularies differ: teacher {teacher.path} has {teacher.vocab_size} entries, "
            f"student {student.path} has {student.vocab_size}; distillation compares logits entry "
            "by entry, so choose two models of one vocabulary"
        )
    if teacher.image_token_id != student.image_token_id:
        raise GraceError(
            f"image tokens differ: teacher {teacher.image_token_id}, student "
            f"{student.image_token_id}; both must read the same token sequence"
        )


def load_model(
    checkpoint: CheckpointFolder,
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    attention: Literal["packed", "cached", "sdpa"] = "sdpa",
) -> Any:
    """The model in evaluation mode.

    attention: `packed` for packed training rows, `cached` for the evaluation's generation, `sdpa`
    for the library's own forward pass and `generate`. The vision tower always uses sdpa.
    """
    model = AutoModelForImageTextToText.from_pretrained(
        checkpoint.path, dtype=dtype, trust_remote_code=False, attn_implementation="sdpa"
    )
    model = model.to(device).eval()
    if "quantization_config" in checkpoint.config:
        # compressed-tensors unpacks in the first forward of the whole model; done here, its parts
        # can be called alone.
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device))
    if attention != "sdpa":
        expect_packed_rows(model, checkpoint.family, attention)
    return model


def expect_packed_rows(
    model: Any, family: Family, attention: Literal["packed", "cached"] = "packed"
) -> None:
    """Make this model, and no other of its class, take what `forward` hands to its decoder.

    With `cached`, rows of prompts that go into a cache, too, and new tokens after them.
    """
    name = CACHED if attention == "cached" else PACKED
    model.set_attn_implementation({"text_config": name, "vision_config": "sdpa"})
    decoder = model.get_submodule(family.decoder)
    if hasattr(decoder, "_deepstack_process"):
        decoder._deepstack_process = add_deepstack


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def load_tokenizer(folder: Path) -> Any:
    """The checkpoint's tokenizer with its chat template.

    Raises:
        GraceError: there are no tokenizer's files, or no chat template.
    """
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise GraceError(
            f"{folder}: no tokenizer here ({' or '.join(_TOKENIZER_FILES)}); copy the files of the "
            "model that it was made from into it"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not tokenizer.chat_template:
        raise GraceError(f"{folder}: the tokenizer has no chat template; add chat_template.jinja")
    return tokenizer


def load_image_processor(folder: Path) -> Any:
    """The checkpoint's image processor, in its form that needs no torchvision."""
    return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False, backend="pil")
