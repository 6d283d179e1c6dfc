"""Generation with the project's decoder against transformers' own, dense and packed."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from grace_core.errors import GraceError
from grace_core.export.awq import AWQ
from grace_core.inference.decoder import Decoder
from grace_core.inference.decoding import Decoding
from grace_core.inference.loading import load_packed, load_release
from grace_core.inference.packed_linear import PackedLinear
from grace_core.inference.prompts import (
    Prompt,
    expanded,
    picture_starts,
    prompt_row,
    rest_of_prompt,
)
from grace_core.inference.sampling import Sampler
from grace_core.models.families import family_of
from grace_core.models.loading import load_model, read_checkpoint
from grace_core.models.visual_inputs import VisualInputs
from tests.packed_releases import packed_release
from tests.tiny_models import FAMILIES, save_tiny

STEPS = 5
VARIANTS = [("qwen3_vl", 4), ("qwen3_vl", 8), ("qwen2_vl", 4), ("llava", 8)]


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    return {
        (family, bits): packed_release(tmp_path_factory.mktemp(f"{family}{bits}"), family, bits)
        for family, bits in VARIANTS
    }


def picture(width: int, height: int, seed: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    content = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(content.numpy())


def prompts(visual: VisualInputs) -> list[Prompt]:
    """One picture, none, and two."""
    pictures = [picture(40, 56, 0), picture(64, 32, 1)]
    token = visual.image_token_id
    return [
        expanded([30, 31, token, 32, 33], pictures[:1], visual),
        Prompt([40, 41, 42]),
        expanded([50, token, 51, token, 52, 53, 54], pictures, visual),
    ]


def teacher_forced(model: Any, visual: VisualInputs, prompt: Prompt, answer: list[int]) -> Tensor:
    """Transformers' logits of each token of an answer, in one pass over the whole."""
    ids = torch.tensor([prompt.input_ids + answer])
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    arguments |= visual.token_types(ids)
    if prompt.pictures:
        arguments |= visual.tensors(list(prompt.pictures))
    with torch.no_grad():
        arguments = {name: tensor.to(model.device) for name, tensor in arguments.items()}
        output = model(**arguments)
    found: Tensor = output.logits[0, len(prompt.input_ids) - 1 :]
    return found


def assert_same_logits(model: Any, reference: Any, visual: VisualInputs) -> None:
    """Of prompts put in at different times, in rows of any order, for every token."""
    one, two, three = prompts(visual)
    decoding = Decoding(Decoder(model, family_of(model.config.model_type)), rows=4, capacity=64)
    logits: dict[int, list[Tensor]] = {2: [], 0: [], 3: []}
    answers: dict[int, list[int]] = {2: [], 0: [], 3: []}
    begun: list[int] = []

    def note() -> None:
        for row in begun:
            logits[row].append(decoding.logits[row].clone())
            answers[row].append(int(decoding.tokens[row]))

    decoding.put(prompt_row([one, two], visual), [2, 0])
    begun += [2, 0]
    note()
    decoding.step()
    note()
    decoding.put(prompt_row([three], visual), [3])
    begun.append(3)
    logits[3].append(decoding.logits[3].clone())
    answers[3].append(int(decoding.tokens[3]))
    for _ in range(STEPS):
        decoding.step()
        note()
    for row, prompt in ((2, one), (0, two), (3, three)):
        assert answers[row] == [int(one.argmax()) for one in logits[row]]
        expected = teacher_forced(reference, visual, prompt, answers[row][:-1])
        torch.testing.assert_close(torch.stack(logits[row]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_dense_models_decode_as_transformers_does(family: str, tmp_path: Path) -> None:
    checkpoint = read_checkpoint(save_tiny(FAMILIES[family](seed=3), tmp_path / "model"))
    model, reference = (load_model(checkpoint, device="cpu", dtype=torch.float32) for _ in range(2))
    visual = VisualInputs(checkpoint, min_pixels=1024, max_pixels=16384)
    assert_same_logits(model, reference, visual)
    # Joined projections are the model's own weights, not further ones.
    ids = torch.tensor([[40, 41, 42]])
    with torch.no_grad():
        found, expected = model(input_ids=ids).logits, reference(input_ids=ids).logits
    assert torch.equal(found, expected)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_packed_releases_decode_as_transformers_does(
    releases: dict[tuple[str, int], Path], variant: tuple[str, int]
) -> None:
    folder = releases[variant]
    model = load_packed(folder, "cpu", dtype=torch.float32)
    checkpoint = read_checkpoint(folder)
    reference = load_model(checkpoint, device="cpu", dtype=torch.float32)
    assert_same_logits(model, reference, VisualInputs(checkpoint, max_pixels=16384))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_packed_model_is_the_model_and_stays_packed(
    releases: dict[tuple[str, int], Path], variant: tuple[str, int]
) -> None:
    model = load_packed(releases[variant], "cpu")
    reference = load_model(read_checkpoint(releases[variant]), device="cpu")
    packed = [one for one in model.modules() if isinstance(one, PackedLinear)]
    assert len(packed) == 2 * 7
    size = sum(tensor.nbytes for one in packed for tensor in one.buffers())
    weights = sum(one.in_features * one.out_features for one in packed)
    biases = sum(2 * one.out_features for one in packed if one.bias is not None)
    assert size - biases <= weights * (variant[1] / 8 + 4 / 128)
    dense = dict(reference.named_buffers()) | dict(reference.named_parameters())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.rpartition(".")[2] not in ("words", "scales"):
            assert torch.equal(tensor, dense[name]), name
    ids = torch.tensor([[40, 41, 42, 43]])
    found = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert found.shape[1] > 4


def test_any_release_is_loaded(tmp_path: Path, releases: dict[tuple[str, int], Path]) -> None:
    dense = save_tiny(FAMILIES["qwen3_vl"](), tmp_path / "model")
    assert not [m for m in load_release(dense, "cpu").modules() if isinstance(m, PackedLinear)]
    packed = load_release(releases["qwen3_vl", 4], "cpu")
    assert [m for m in packed.modules() if isinstance(m, PackedLinear)]
    with pytest.raises(GraceError, match="is not packed"):
        load_packed(dense, "cpu")


@pytest.fixture(scope="module")
def awq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_release(tmp_path_factory.mktemp("awq"), "qwen3_vl", 4, form=AWQ)


def test_awq_is_the_same_model(releases: dict[tuple[str, int], Path], awq: Path) -> None:
    expected = load_packed(releases["qwen3_vl", 4], "cpu").state_dict()
    found = load_packed(awq, "cpu").state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_awq_of_others_is_refused(awq: Path, tmp_path: Path) -> None:
    tensors = load_file(awq / "model.safetensors")
    name = next(one for one in sorted(tensors) if one.endswith(".scales"))
    finer = tensors[name] * (1 + 2**-10)
    with pytest.raises(GraceError, match=r"no bf16 numbers.*grace import"):
        load_packed(changed(awq, tmp_path / "scales", ".scales", finer), "cpu")
    zeros = torch.zeros_like(tensors[name.replace("scales", "qzeros")])
    with pytest.raises(GraceError, match="zero points other than 8"):
        load_packed(changed(awq, tmp_path / "zeros", ".qzeros", zeros), "cpu")
    config = json.loads((awq / "config.json").read_text())
    config["quantization_config"]["version"] = "gemv"
    shutil.copytree(awq, tmp_path / "gemv")
    (tmp_path / "gemv" / "config.json").write_text(json.dumps(config))
    with pytest.raises(GraceError, match="AWQ 'gemv' of 4 bits"):
        load_packed(tmp_path / "gemv", "cpu")


def changed(release: Path, folder: Path, name: str, tensor: Tensor | None) -> Path:
    """A copy in which the first tensor whose name ends so is another, or gone."""
    shutil.copytree(release, folder)
    tensors = load_file(folder / "model.safetensors")
    found = sorted(key for key in tensors if key.endswith(name))[0]
    del tensors[found]
    if tensor is not None:
        tensors[found] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        (".weight_scale", None, "has only .weight_packed, .weight_shape"),
        (".weight_scale", torch.ones(3, 1), "weight_scale is torch.float32"),
        (".weight_shape", torch.tensor([1, 2]), "weight_shape is \\[1, 2\\]"),
        ("down_proj.weight_packed", torch.zeros(1, 1, dtype=torch.int32), "expected torch.int32"),
        ("norm.weight", None, "lacks 1 of the model's tensors"),
    ],
)
def test_damaged_releases_are_refused(
    releases: dict[tuple[str, int], Path],
    tmp_path: Path,
    name: str,
    tensor: Tensor | None,
    said: str,
) -> None:
    folder = changed(releases["qwen3_vl", 4], tmp_path / "release", name, tensor)
    with pytest.raises(GraceError, match=said):
        load_packed(folder, "cpu")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "int-quantized"}, "its format is 'int-quantized'"),
        ({"quantization_status": "frozen"}, "quantization_status is 'frozen'"),
        ({"config_groups": {}}, "several schemes"),
    ],
)
def test_other_formats_are_refused(
    releases: dict[tuple[str, int], Path], tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    folder = tmp_path / "release"
    shutil.copytree(releases["qwen3_vl", 4], folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(GraceError, match=said):
        load_release(folder, "cpu")


def test_a_prompt_must_leave_room(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(save_tiny(FAMILIES["qwen3_vl"](layers=2), tmp_path / "model"))
    decoder = Decoder(load_model(checkpoint, device="cpu"), checkpoint.family)
    decoding = Decoding(decoder, rows=1, capacity=9)
    visual = VisualInputs(checkpoint)
    with pytest.raises(GraceError, match="16 tokens leaves no room"):
        decoding.put(prompt_row([Prompt([40] * 16)], visual), [0])


def test_a_full_row_stays_within_itself(tmp_path: Path) -> None:
    """Its neighbour's answer is the one it gives alone."""
    checkpoint = read_checkpoint(save_tiny(FAMILIES["qwen3_vl"](layers=2), tmp_path / "model"))
    visual = VisualInputs(checkpoint)
    decoder = Decoder(load_model(checkpoint, device="cpu", dtype=torch.float32), checkpoint.family)
    answers = []
    for rows in ([0, 1], [1]):
        decoding = Decoding(decoder, rows=2, capacity=12)
        given = [Prompt([40] * 10), Prompt([51, 52])]
        decoding.put(prompt_row([given[row] for row in rows], visual), rows)
        answer = []
        for _ in range(8):
            decoding.step()
            answer.append(decoding.logits[1].clone())
        answers.append(torch.stack(answer))
    torch.testing.assert_close(*answers, rtol=1e-5, atol=1e-5)


def test_a_prompt_in_two_parts_is_the_prompt(tmp_path: Path) -> None:
    """Other rows are left as they are, and what a row held beyond the part is forgotten."""
    checkpoint = read_checkpoint(save_tiny(FAMILIES["qwen3_vl"](seed=3), tmp_path / "model"))
    visual = VisualInputs(checkpoint, max_pixels=16384)
    decoder = Decoder(load_model(checkpoint, device="cpu", dtype=torch.float32), checkpoint.family)
    _, short, long = prompts(visual)
    starts = picture_starts(long, visual)
    for held in (1, starts[0], starts[1], starts[1] - 1, len(long.input_ids) - 1):
        logits = []
        for parts in (False, True):
            decoding = Decoding(decoder, rows=2, capacity=64)
            decoding.put(prompt_row([long, short], visual), [1, 0])
            if parts:
                for _ in range(3):
                    decoding.step()
                decoding.put(prompt_row([short], visual), [0])
                decoding.extend(rest_of_prompt(long, held, visual), 1, held)
            for _ in range(3):
                logits.append(decoding.logits.clone())
                decoding.step()
        torch.testing.assert_close(
            torch.stack(logits[:3]), torch.stack(logits[3:]), rtol=1e-4, atol=1e-4
        )


def test_tokens_are_drawn_with_their_probabilities() -> None:
    """Against exact ones by Pearson's statistic: 4 degrees of freedom, 18.5 is 1 in 1000."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, -torch.inf])
    draws = 20_000
    for temperature in (0.5, 1.0, 2.0):
        sampler = Sampler(temperature, seed=5, device=torch.device("cpu"))
        drawn = torch.bincount(sampler(logits.expand(draws, -1)), minlength=len(logits))
        weights = [math.exp(one / temperature) for one in logits.tolist()]
        expected = [draws * weight / sum(weights) for weight in weights]
        assert drawn[5] == 0
        statistic = sum((int(n) - e) ** 2 / e for n, e in zip(drawn[:5], expected[:5], strict=True))
        assert statistic < 18.5
        assert statistic > 0.05, "draws as even as that were not drawn"


def test_drawing_repeats_with_its_seed(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(save_tiny(FAMILIES["qwen3_vl"](layers=2), tmp_path / "model"))
    visual = VisualInputs(checkpoint)
    decoder = Decoder(load_model(checkpoint, device="cpu", dtype=torch.float32), checkpoint.family)

    def drawn(seed: int) -> list[list[int]]:
        sampler = Sampler(1.0, seed=seed, device=torch.device("cpu"))
        decoding = Decoding(decoder, rows=2, capacity=32, sampler=sampler)
        decoding.put(prompt_row([Prompt([40, 41]), Prompt([40, 41])], visual), [0, 1])
        answers = []
        for _ in range(10):
            answers.append(decoding.tokens.tolist())
            decoding.step()
        return answers

    once = drawn(1)
    assert once == drawn(1) != drawn(2)
    assert [one for one, _ in once] != [other for _, other in once], "rows draw for themselves"


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_is_above_0(temperature: float) -> None:
    with pytest.raises(GraceError, match="not above 0"):
        Sampler(temperature, seed=0, device=torch.device("cpu"))
