"""Packed products and the decoder on a GPU: at the real layers' sizes, in bf16, as CUDA graphs.

pytest tests/test_inference_cuda.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from grace_core.bench.decode import model_bytes
from grace_core.bench.products import SHAPES
from grace_core.inference import layer_operations, packed_linear, plans
from grace_core.inference.decoder import Decoder
from grace_core.inference.decoding import Decoding
from grace_core.inference.loading import load_packed
from grace_core.inference.packed_linear import KernelLinear
from grace_core.inference.prompts import prompt_row
from grace_core.models.families import family_of
from grace_core.models.loading import load_model, read_checkpoint
from grace_core.models.visual_inputs import VisualInputs
from grace_core.quantization.packing import pack_codes
from tests.packed_releases import multiplied_out, packed_release, random_codes, random_scales
from tests.test_inference_decoding import STEPS, assert_same_logits, prompts
from tests.test_inference_layers import SIZES, drawn

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

DEVICE = torch.device("cuda")
ROWS = (1, 2, 8, 13, 32, 64, 300)
PRODUCTS = [("qkv", 4), ("gate_up", 8), ("down", 4), ("down", 8), ("odd", 4)]
VARIANTS = [("qwen3_vl", 4), ("qwen3_vl", 8), ("qwen2_vl", 4), ("llava", 8), ("llava", None)]


@pytest.mark.parametrize(("name", "bits"), PRODUCTS)
def test_products_of_the_real_layers(name: str, bits: int) -> None:
    """Every number of rows, by the plan that is used for it; inputs bf16, compared in float64."""
    outputs, inputs = SHAPES.get(name, (1000, 11008))
    codes, scales = random_codes(outputs, inputs, bits), random_scales(outputs, inputs // 128)
    bias = drawn(outputs).bfloat16()
    layer = packed_linear.make(
        KernelLinear,
        pack_codes(codes.to(DEVICE), bits),
        scales.to(DEVICE),
        bias.to(DEVICE),
        in_features=inputs,
        bits=bits,
        group_size=128,
    )
    weight = multiplied_out(codes.to(DEVICE), scales.to(DEVICE))
    assert torch.equal(layer.dense(torch.float32).double(), weight)
    assert torch.equal(layer.dense(torch.bfloat16), weight.bfloat16())
    for rows in ROWS:
        x = drawn(rows, inputs, seed=rows).to(DEVICE, torch.bfloat16)
        exact = x.double() @ weight.T + bias.to(DEVICE).double()
        size = x.double().abs() @ weight.T.abs()
        found = layer(x)
        assert found.dtype == torch.bfloat16 and found.shape == (rows, outputs)
        # The result's own rounding; of many rows each weight's too, whose errors average out.
        apart = (found.double() - exact).abs() - 2.0**-8 * exact.abs()
        bound = 1e-5 if rows <= plans.MOST_ROWS else 2.0**-10
        assert float((apart / size).max()) < bound, rows


@pytest.mark.parametrize(
    "size", [*SIZES, (1, 4, 2048, 16, 8, 128, 512), (4, 2, 2048, 16, 8, 128, 300)]
)
def test_layer_kernels_and_their_plain_twins_agree(size: tuple[int, ...]) -> None:
    from grace_core.inference import layer_kernels

    parts, rows, width, heads, kept, head, capacity = size

    def on(*shape: int, seed: int = 0) -> Tensor:
        return drawn(*shape, seed=seed).to(DEVICE)

    results: list[list[Tensor]] = []
    operations: Any
    for operations in (layer_operations, layer_kernels):
        residual = on(rows, width, seed=1)
        found = [operations.add_and_norm(on(parts, rows, width), residual, on(width), 1e-6)]
        found += [residual, operations.silu_times(on(parts, rows, 2 * width), torch.float32)]
        angles = on(capacity, head // 2, seed=4)
        both = torch.cat((angles, angles), dim=-1)
        keys, values = on(rows, capacity, kept, head, seed=5), on(rows, capacity, kept, head)
        lengths = torch.arange(rows, device=DEVICE) * 11 % capacity
        lengths[0] = capacity - 1
        places = torch.arange(rows, device=DEVICE) * capacity + lengths
        turned = operations.turn_and_keep(
            on(parts, rows, (heads + 2 * kept) * head),
            (on(head, seed=2), on(head, seed=3), 1e-6),
            both.cos(),
            both.sin(),
            lengths,
            places,
            keys.flatten(0, 1),
            values.flatten(0, 1),
        )
        found += [turned, keys, values]
        found.append(operations.attend_to_cache(turned, keys, values, places, head**-0.5))
        results.append(found)
    for plain, kernel in zip(*results, strict=True):
        torch.testing.assert_close(kernel, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "bits"), VARIANTS)
def test_decoding_in_fp32_as_transformers_does(
    family: str, bits: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    folder = packed_release(tmp_path, family, bits or 4)
    checkpoint = read_checkpoint(tmp_path / "trained")
    reference = load_model(checkpoint, device=DEVICE, dtype=torch.float32)
    if bits is None:
        model = load_model(checkpoint, device=DEVICE, dtype=torch.float32)
    else:
        model = load_packed(folder, DEVICE, dtype=torch.float32)
        for name, layer in model.named_modules():
            if isinstance(layer, KernelLinear):  # exact, see above
                reference.get_submodule(name).weight.data = layer.dense(torch.float32)
    assert_same_logits(model, reference, VisualInputs(checkpoint, max_pixels=16384))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_recorded_step_is_the_step(bits: int, tmp_path: Path) -> None:
    """In bf16, to the bit; the prompt is long enough for the weights to be multiplied out."""
    folder = packed_release(tmp_path, "qwen3_vl", bits)
    checkpoint = read_checkpoint(folder)
    visual = VisualInputs(checkpoint, max_pixels=16384)
    decoder = Decoder(load_packed(folder, DEVICE), checkpoint.family)
    assert decoder._expands
    row = prompt_row(prompts(visual) * 9, visual)
    assert row.input_ids.numel() > 128
    answers = []
    for graph in (False, True):
        decoding = Decoding(decoder, rows=27, capacity=64, graph=graph)
        decoding.put(row, range(27))
        logits = []
        for _ in range(STEPS):
            decoding.step()
            logits.append(decoding.logits.clone())
        answers.append(torch.stack(logits))
    assert torch.equal(*answers)


def test_memory_of_the_2b_shapes() -> None:
    """Weights of W4 at most 52 %, of W8 at most 69 % of BF16's, and nothing else is kept."""
    from grace_core.bench.random_models import random_model, random_packed_model
    from grace_core.bench.shapes import REAL

    before = torch.cuda.memory_allocated()
    dense = model_bytes(random_model(REAL, "student", torch.device("meta")))
    for bits, share in ((4, 0.52), (8, 0.69)):
        model = random_packed_model(REAL, "student", DEVICE, bits=bits, group_size=128)
        held = torch.cuda.memory_allocated() - before
        Decoder(model, family_of(model.config.model_type))
        assert torch.cuda.memory_allocated() - before <= held + 2**20
        assert held <= share * dense
        del model
