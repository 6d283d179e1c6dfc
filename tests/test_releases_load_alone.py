"""A user's three lines: transformers alone, in a process where this project cannot be imported."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from textwrap import indent
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from grace_core.export.card_loading import loading
from grace_core.export.compressed import COMPRESSED
from grace_core.export.release import export_bf16, export_packed
from grace_core.models.loading import load_image_processor, load_tokenizer
from grace_core.quantization.checkpoint import load_scales
from grace_core.quantization.convert import convert_with_scales
from tests.qat_models import trained
from tests.test_publish_card import code_of, release
from tests.tiny_models import FAMILIES, save_tiny

WITH_PROCESSOR, WITHOUT, _ = code_of(loading(release("w4")))
SOURCE = f'source = "{release("w4").repository}"'
"""The line of the card's code that says which release."""

_LOADS = WITH_PROCESSOR.partition("processor =")[0].replace(SOURCE, "") + WITHOUT

ALONE = f"""
import sys
sys.modules["grace_core"] = None
import hashlib, json
from PIL import Image

def digest(tensor):
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy()).hexdigest()

for source in sys.argv[1:]:
{indent(_LOADS, "    ")}
    turns = [{{"role": "user", "content": "What is two plus two?"}}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits
        answer = model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)
    picture = Image.linear_gradient("L").convert("RGB").resize((64, 64))
    pixels = image_processor(images=[picture], return_tensors="pt")["pixel_values"]
    print(json.dumps({{
        "ids": ids, "logits": digest(logits), "pixels": digest(pixels.float()),
        "answer": tokenizer.decode(answer[0, len(ids):]), "dtype": str(model.dtype),
    }}))
"""


def _alone(program: str, *folders: Path) -> list[str]:
    """The lines that a program prints, which knows of transformers only."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", program, *map(str, folders)],
        cwd=folders[0],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().data).hexdigest()


def _released(folder: Path, family: str, bits: int | None) -> tuple[Path, Path]:
    """(trained, release); bits None is BF16."""
    if bits is None:
        source = save_tiny(FAMILIES[family](layers=1), folder / "trained")
        export_bf16(source, folder / "release")
    else:
        source = trained(folder / "trained", family, bits, layers=1)
        export_packed(source, folder / "release", COMPRESSED)
    return source, folder / "release"


PRECISIONS = {"bf16": None, "w8": 8, "w4": 4}
Variant = tuple[str, str]
VARIANTS: list[Variant] = [(family, name) for family in FAMILIES for name in PRECISIONS]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[Variant, tuple[Path, dict[str, Any]]]:
    """(trained, what a user sees of the release) of every variant, all seen by one process."""
    root = tmp_path_factory.mktemp("alone")
    made = {
        variant: _released(root / "-".join(variant), variant[0], PRECISIONS[variant[1]])
        for variant in VARIANTS
    }
    lines = _alone(ALONE, *(release for _, release in made.values()))
    seen = [json.loads(line) for line in lines if line.startswith("{")]
    assert len(seen) == len(made)
    sources = [source for source, _ in made.values()]
    return dict(zip(made, zip(sources, seen, strict=True), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS, ids="-".join)
def test_three_lines_of_transformers(
    loaded: dict[Variant, tuple[Path, dict[str, Any]]], variant: Variant
) -> None:
    source, seen = loaded[variant]
    model = AutoModelForImageTextToText.from_pretrained(source)
    bits = PRECISIONS[variant[1]]
    if bits is not None:
        convert_with_scales(model, load_scales(source).scales, bits=bits, group_size=128)
    tokenizer = load_tokenizer(source)
    turns = [{"role": "user", "content": "What is two plus two?"}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert seen["ids"] == ids and seen["dtype"] == "torch.bfloat16"
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits
        answer = model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)
    assert seen["logits"] == _digest(logits)
    assert seen["answer"] == tokenizer.decode(answer[0, len(ids) :])
    picture = Image.linear_gradient("L").convert("RGB").resize((64, 64))
    pixels = load_image_processor(source)(images=[picture], return_tensors="pt")["pixel_values"]
    assert seen["pixels"] == _digest(pixels.float())


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None,
    reason="needs torchvision, without which Qwen's video processor, part of AutoProcessor, "
    "does not load",
)
def test_the_lines_with_a_processor(tmp_path: Path) -> None:
    _, folder = _released(tmp_path, "qwen3_vl", 4)
    Image.linear_gradient("L").convert("RGB").save(folder / "picture.png")
    assert SOURCE in WITH_PROCESSOR
    program = WITH_PROCESSOR.replace(SOURCE, "import sys; source = sys.argv[1]")
    _alone(program.replace("max_new_tokens=64", "max_new_tokens=4"), folder)
