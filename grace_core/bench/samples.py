"""Packed rows of random pictures and tokens, as many and as long as the shapes say."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import save_file

from grace_core.bench.random_models import save_companions
from grace_core.bench.shapes import Shapes
from grace_core.models.loading import CheckpointFolder, read_checkpoint
from grace_core.models.rows import PackedRow, packed_row
from grace_core.models.visual_inputs import VisualInputs
from grace_core.toy.checkpoints import Role

FIRST_TEXT_TOKEN = 7
"""Smaller ids are control tokens of the toy tokenizer."""

LAST_TEXT_TOKEN = 151_642
"""Of Qwen's published tokenizer; its control tokens follow."""


def folder_without_weights(folder: Path, shapes: Shapes, role: Role) -> CheckpointFolder:
    """A checkpoint folder whose weights are made in memory: only its configuration is read."""
    folder.mkdir(parents=True)
    config = shapes.config(role).to_dict()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({}, folder / "model.safetensors")
    save_companions(folder, shapes)
    return read_checkpoint(folder)


class RandomRows:
    """Makes packed rows; the same ones for the same seed."""

    def __init__(self, shapes: Shapes, folder: CheckpointFolder, *, seed: int = 0) -> None:
        self._shapes = shapes
        self._config = shapes.config("student")
        self._random = random.Random(seed)
        self.visual = VisualInputs(folder, max_pixels=shapes.picture_side**2)

    def row(self, samples: int) -> PackedRow:
        """One row, on the CPU."""
        return packed_row([self._sample(index) for index in range(samples)], self.visual)

    def _sample(self, index: int) -> dict[str, Any]:
        shapes, config = self._shapes, self._config
        side = shapes.picture_side
        picture = Image.frombytes("RGB", (side, side), self._random.randbytes(3 * side * side))
        content = io.BytesIO()
        picture.save(content, "PNG", compress_level=0)
        ids = [
            config.vision_start_token_id,
            *[config.image_token_id] * shapes.visual_tokens,
            config.vision_end_token_id,
            *self._text(shapes.prompt_tokens + shapes.supervised_tokens),
        ]
        assert len(ids) == shapes.sample_tokens
        unsupervised = len(ids) - shapes.supervised_tokens
        return {
            "record_index": index,
            "input_ids": ids,
            "labels_mask": [position >= unsupervised for position in range(len(ids))],
            "images": [content.getvalue()],
            "image_grids": [[1, side // shapes.patch_size, side // shapes.patch_size]],
        }

    def _text(self, tokens: int) -> list[int]:
        last = min(LAST_TEXT_TOKEN, self._config.text_config.vocab_size - 1)
        return [self._random.randint(FIRST_TEXT_TOKEN, last) for _ in range(tokens)]
