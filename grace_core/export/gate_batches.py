"""Inputs on which a release is compared with the trained model: text alone, and pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from grace_core.data.chat import ConversationEncoder
from grace_core.data.sharegpt4v import IMAGE_TAG, Turn
from grace_core.models.loading import load_tokenizer, read_checkpoint
from grace_core.models.visual_inputs import VisualInputs

_CONVERSATIONS = (
    [
        Turn("user", "What is two plus two?"),
        Turn("assistant", "Four."),
        Turn("user", "And three more?"),
        Turn("assistant", "Seven."),
    ],
    [Turn("user", f"{IMAGE_TAG}\nDescribe the picture."), Turn("assistant", "A gradient.")],
    [
        Turn("user", f"{IMAGE_TAG}\nIs the left side red?"),
        Turn("assistant", "No, it is dark."),
        Turn("user", "Which side is brighter?"),
        Turn("assistant", "The right one."),
    ],
)


def gate_batches(folder: Path) -> list[dict[str, Tensor]]:
    """Keyword arguments of the model's forward pass, one conversation each, unpadded.

    They are made by the tokenizer, the chat template and the image processor of this checkpoint.
    Raises GraceError where it lacks one.
    """
    visual = VisualInputs(read_checkpoint(folder))
    encoder = ConversationEncoder(load_tokenizer(folder), visual.image_token_id)
    batches = []
    for number, turns in enumerate(_CONVERSATIONS):
        pictures = [_gradient(64 + 32 * number)] if IMAGE_TAG in turns[0].text else []
        counts = [visual.grid_and_tokens(picture)[1] for picture in pictures]
        input_ids = torch.tensor([encoder.encode(turns, counts).input_ids])
        batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        if pictures:
            batch |= visual.tensors(pictures) | visual.token_types(input_ids)
        batches.append(batch)
    return batches


def _gradient(side: int) -> Image.Image:
    """A square picture whose channels run in different directions."""
    ramp = Image.linear_gradient("L").resize((side, side))
    return Image.merge(
        "RGB",
        (
            ramp,
            ramp.transpose(Image.Transpose.ROTATE_90),
            Image.radial_gradient("L").resize((side, side)),
        ),
    )
