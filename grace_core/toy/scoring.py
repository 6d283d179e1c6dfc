"""Quick score on the held-out benchmark, while pretraining and for the provenance file.

An item counts when greedy decoding would reply with exactly the answer and then end its turn. One
forward pass over prompt and answer tells whether it would: the likeliest token must be the right
one at every supervised position. The pipeline's own evaluation generates and parses replies.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration

from grace_core.toy.batched import hidden_states
from grace_core.toy.conversations import Turn
from grace_core.toy.encoding import Row, encode_conversation
from grace_core.toy.pictures import render
from grace_core.toy.tokenizer import END_OF_TEXT, shared_tokenizer
from grace_core.toy.world import CHOICE_BENCHMARK, YESNO_BENCHMARK, benchmark_item

_BATCH = 256


def pad_rows(rows: Sequence[Row], *, length: int | None = None) -> dict[str, Tensor]:
    """Right-pad rows to `length`, by default that of the longest.

    Returns:
        (B, L) each: `ids` int64, `supervised` bool, `segments` int64 with -1 for padding.
    """
    length = max(len(row.ids) for row in rows) if length is None else length
    pad = shared_tokenizer().convert_tokens_to_ids(END_OF_TEXT)
    ids = torch.full((len(rows), length), pad, dtype=torch.int64)
    supervised = torch.zeros((len(rows), length), dtype=torch.bool)
    segments = torch.full((len(rows), length), -1, dtype=torch.int64)
    for index, row in enumerate(rows):
        end = len(row.ids)
        ids[index, :end] = torch.tensor(row.ids)
        supervised[index, :end] = torch.tensor(row.supervised)
        segments[index, :end] = torch.tensor(row.segments)
    return {"ids": ids, "supervised": supervised, "segments": segments}


@torch.inference_mode()
def score_benchmark(
    model: Qwen3VLForConditionalGeneration, *, seed: int, choice_count: int, yesno_count: int
) -> dict[str, float]:
    """Per cent right: `average` of the two benchmarks, each benchmark, and each family in it."""
    scores: dict[str, float] = {}
    for name, kind, count in (
        (CHOICE_BENCHMARK, "mcq", choice_count),
        (YESNO_BENCHMARK, "yesno", yesno_count),
    ):
        right: dict[str, list[bool]] = defaultdict(list)
        for first in range(0, count, _BATCH):
            items = [
                benchmark_item(kind, seed, i) for i in range(first, min(first + _BATCH, count))
            ]
            pixels = torch.from_numpy(np.stack([render(scene) for scene, _ in items]))
            turns = [[Turn(asked.prompt, asked.answer)] for _, asked in items]
            rows = [
                encode_conversation(turn, newline_after_picture=False, max_length=4096)
                for turn in turns
            ]
            correct = _exactly_right(model, pixels, rows)
            for (_, asked), flag in zip(items, correct.tolist(), strict=True):
                right[asked.family].append(flag)
        every = [flag for flags in right.values() for flag in flags]
        scores[name] = 100 * sum(every) / len(every)
        scores |= {
            f"{name}/{family}": round(100 * sum(flags) / len(flags), 2)
            for family, flags in right.items()
        }
    average = (scores[CHOICE_BENCHMARK] + scores[YESNO_BENCHMARK]) / 2
    return {"average": average} | scores


def _exactly_right(
    model: Qwen3VLForConditionalGeneration, pixels: Tensor, rows: Sequence[Row]
) -> Tensor:
    """(B,) bool: the arg max equals the target at all supervised positions of the row."""
    batch = {name: tensor.to(model.device) for name, tensor in pad_rows(rows).items()}
    hidden = hidden_states(model, pixels.to(model.device), batch["ids"], batch["segments"])
    predicted = model.lm_head(hidden[:, :-1]).argmax(-1)
    return ((predicted == batch["ids"][:, 1:]) | ~batch["supervised"][:, 1:]).all(dim=1)
