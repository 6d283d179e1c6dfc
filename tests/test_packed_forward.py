"""Packing must not change what a model computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from grace_core.data.packing import pack_epoch, planned_steps, rows_of_steps
from grace_core.models.forward import row_states
from grace_core.models.loading import load_model, read_checkpoint
from grace_core.models.rows import packed_row
from grace_core.models.visual_inputs import VisualInputs
from tests.prepared_rows import prepared_row
from tests.tiny_models import FAMILIES, save_tiny


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_packed_rows_equal_the_plain_forward_of_each_sample(name: str, tmp_path: Path) -> None:
    tiny = FAMILIES[name](seed=3)
    folder = read_checkpoint(save_tiny(tiny, tmp_path / "m"))
    visual = VisualInputs(folder, min_pixels=1024, max_pixels=16384)
    samples = [prepared_row(tiny, i, pictures=n) for i, n in enumerate((1, 0, 2))]
    packed_model = load_model(folder, device="cpu", dtype=torch.float32, attention="packed")
    plain_model = load_model(folder, device="cpu", dtype=torch.float32)

    row = packed_row(samples, visual)
    with torch.no_grad():
        states = row_states(packed_model, folder.family, row)
    start = 0
    seen_supervised = seen_pictures = 0
    for sample in samples:
        # Oracle: transformers' own forward of the one sample, padded by nothing.
        ids = torch.tensor([sample["input_ids"]])
        inputs = {}
        if sample["images"]:
            alone = packed_row([sample], visual)
            inputs = dict(alone.pictures)
            inputs |= visual.token_types(ids)
        with torch.no_grad():
            output = plain_model(input_ids=ids, output_hidden_states=True, **inputs)
        final = output.hidden_states[-1][0]
        penultimate = output.hidden_states[-2][0]
        positions = [i - 1 for i, flag in enumerate(sample["labels_mask"]) if flag]
        count = len(positions)
        torch.testing.assert_close(
            states.predicting[seen_supervised : seen_supervised + count],
            final[positions],
            atol=2e-5,
            rtol=1e-4,
        )
        image_places = (ids[0] == folder.image_token_id).nonzero().flatten()
        per_picture = len(image_places) // max(1, len(sample["images"]))
        for picture in range(len(sample["images"])):
            places = image_places[picture * per_picture : (picture + 1) * per_picture]
            torch.testing.assert_close(
                states.visual[seen_pictures], penultimate[places], atol=2e-5, rtol=1e-4
            )
            seen_pictures += 1
        seen_supervised += count
        start += len(sample["input_ids"])
    assert seen_supervised == len(row.labels) == states.predicting.shape[0]
    assert seen_pictures == len(states.visual) == 3


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_row_of_text_alone_gets_an_uncounted_picture(name: str, tmp_path: Path) -> None:
    tiny = FAMILIES[name](seed=3)
    folder = read_checkpoint(save_tiny(tiny, tmp_path / "m"))
    visual = VisualInputs(folder, min_pixels=1024, max_pixels=16384)
    samples = [prepared_row(tiny, i, pictures=0) for i in range(2)]
    row = packed_row(samples, visual)
    assert row.visual_spans == []
    assert row.pictures["pixel_values"].shape[0] > 0
    model = load_model(folder, device="cpu", dtype=torch.float32, attention="packed").train()
    states = row_states(model, folder.family, row)
    states.predicting.sum().backward()
    for connector in folder.family.connectors:
        gradients = [p.grad for p in model.get_submodule(connector).parameters()]
        assert all(g is not None and not g.any() for g in gradients)


def test_every_sample_is_packed_once_and_fits() -> None:
    lengths = [1 + (i * 37) % 90 for i in range(200)]
    rows = pack_epoch(lengths, row_tokens=100, seed=5, epoch=0)
    assert sorted(sample for row in rows for sample in row) == list(range(200))
    assert all(sum(lengths[s] for s in row) <= 100 for row in rows)
    fill = sum(lengths) / (100 * len(rows))
    assert fill > 0.85
    assert pack_epoch(lengths, 100, 5, 0) == rows != pack_epoch(lengths, 100, 5, 1)


def test_the_plan_goes_on_from_any_step() -> None:
    lengths = [10, 20, 30, 40, 50, 60, 70]
    plan = dict(row_tokens=80, rows_per_step=3, seed=1)
    whole = rows_of_steps(lengths, **plan)
    steps = [next(whole) for _ in range(9)]
    for first in range(9):
        assert next(rows_of_steps(lengths, **plan, first_step=first)) == steps[first]


def test_epochs_become_steps() -> None:
    lengths = [40] * 20  # two to a row of 80: ten rows
    assert planned_steps(lengths, row_tokens=80, rows_per_step=4, seed=0, steps=None, epochs=2) == 5
