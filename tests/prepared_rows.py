"""Small prepared data sets as data preparation leaves them, made from a seed without files."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value
from PIL import Image
from transformers import PreTrainedModel

FEATURES = Features(
    {
        "record_id": Value("string"),
        "record_index": Value("int64"),
        "input_ids": List(Value("int32")),
        "labels_mask": List(Value("bool")),
        "images": List(Value("binary")),
        "image_grids": List(List(Value("int32"))),
        "num_tokens": Value("int32"),
        "num_supervised": Value("int32"),
    }
)

_FIRST_TEXT_TOKEN = 7
_PATCH, _MERGE = 8, 2


def prepared_row(
    model: PreTrainedModel, index: int, *, pictures: int, seed: int = 0
) -> dict[str, Any]:
    """One sample of random tokens with so many random pictures of 32 x 48 pixels."""
    rng = random.Random(f"{seed}-{index}")
    vocab = model.config.get_text_config().vocab_size
    ids = [rng.randrange(_FIRST_TEXT_TOKEN, vocab) for _ in range(rng.randrange(3, 9))]
    images, grids = [], []
    for _ in range(pictures):
        content = io.BytesIO()
        Image.frombytes("RGB", (48, 32), rng.randbytes(48 * 32 * 3)).save(content, "PNG")
        images.append(content.getvalue())
        if model.config.model_type == "llava":
            grid = [1, 4, 4]
            tokens = 16
        else:
            grid = [1, 32 // _PATCH, 48 // _PATCH]
            tokens = grid[1] * grid[2] // _MERGE**2
        grids.append(grid)
        ids += [model.config.image_token_id] * tokens
        ids += [rng.randrange(_FIRST_TEXT_TOKEN, vocab) for _ in range(2)]
    prompt = len(ids)
    ids += [rng.randrange(_FIRST_TEXT_TOKEN, vocab) for _ in range(rng.randrange(2, 12))]
    mask = [i >= prompt for i in range(len(ids))]
    return {
        "record_id": f"r{index}",
        "record_index": index,
        "input_ids": ids,
        "labels_mask": mask,
        "images": images,
        "image_grids": grids,
        "num_tokens": len(ids),
        "num_supervised": sum(mask),
    }


def write_prepared(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """Write the rows as the Arrow directory that training reads."""
    Dataset.from_list(rows, features=FEATURES).save_to_disk(str(folder))
    return folder
