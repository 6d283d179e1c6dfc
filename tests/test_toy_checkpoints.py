"""The toy models: make, fast forward pass against the library's, and the shipped checkpoints."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from grace_core.toy.batched import hidden_states, patchify
from grace_core.toy.checkpoints import Role, build_model, save_checkpoint
from grace_core.toy.conversations import Mixture, converse
from grace_core.toy.encoding import encode_conversation
from grace_core.toy.pictures import draw_scene, render
from grace_core.toy.scoring import pad_rows, score_benchmark
from grace_core.toy.tokenizer import shared_tokenizer
from grace_core.toy.world import benchmark_item, stream

SHIPPED = Path(__file__).resolve().parent.parent / "assets" / "toy"
ROLES: tuple[Role, ...] = ("teacher", "student")


@pytest.fixture(scope="module", params=ROLES)
def random_checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A freshly built model and the directory it was saved to."""
    model = build_model(request.param, seed=1)
    folder = tmp_path_factory.mktemp(request.param)
    save_checkpoint(model, folder)
    return request.param, model, folder


def test_make_of_the_models(random_checkpoint) -> None:
    role, model, _ = random_checkpoint
    low, high = {"teacher": (5.0e6, 6.0e6), "student": (0.9e6, 1.2e6)}[role]
    assert low <= sum(p.numel() for p in model.parameters()) <= high
    layers = model.model.language_model.layers
    assert len(layers) >= 4
    linears = [m for m in layers.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 7 * len(layers)
    assert all(linear.in_features % 128 == 0 for linear in linears)
    tied = model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert tied == (role == "student")


def test_saved_directory_loads_with_the_auto_classes(random_checkpoint) -> None:
    _, model, folder = random_checkpoint
    loaded = AutoModelForImageTextToText.from_pretrained(folder)
    for name, parameter in loaded.named_parameters():
        expected = model.get_parameter(name).to(torch.bfloat16)
        assert torch.equal(parameter, expected), name
    assert loaded.generation_config.eos_token_id == shared_tokenizer().eos_token_id
    assert loaded.generation_config.do_sample is False
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == shared_tokenizer().get_vocab()


@pytest.mark.parametrize(
    ("size", "grid"),
    [((64, 64), (8, 8)), ((128, 128), (16, 16)), ((640, 480), (12, 18)), ((20, 20), (8, 8))],
)
def test_image_processor_keeps_pictures_between_16_and_64_tokens(
    random_checkpoint, size: tuple[int, int], grid: tuple[int, int]
) -> None:
    processor = AutoImageProcessor.from_pretrained(random_checkpoint[2])
    encoded = processor(images=[Image.new("RGB", size)], return_tensors="pt")
    assert tuple(encoded.image_grid_thw[0].tolist()) == (1, *grid)
    assert 16 <= grid[0] * grid[1] // 4 <= 64


def test_fast_forward_equals_the_librarys(random_checkpoint) -> None:
    """Logits at every real position, rows of different length, against `model(...)`."""
    _, model, folder = random_checkpoint
    processor = AutoImageProcessor.from_pretrained(folder)
    pictures, rows = [], []
    for index in range(4):
        rng = stream("forward", 0, index)
        scene = draw_scene(rng, held_out=False)
        turns = converse(scene, Mixture(turns=(1, 3)), rng)
        pictures.append(render(scene))
        rows.append(encode_conversation(turns, newline_after_picture=True, max_length=400))
    pixels = torch.from_numpy(np.stack(pictures))
    padded = pad_rows(rows)
    ids, segments = padded["ids"], padded["segments"]
    attended = (segments >= 0).long()
    encoded = processor(images=[Image.fromarray(p) for p in pictures], return_tensors="pt")
    # The processor scales by 1/255 first and may round once more.
    assert torch.allclose(encoded.pixel_values, patchify(pixels).flatten(0, 1), atol=1e-6)
    with torch.no_grad():
        expected = model(
            input_ids=ids,
            attention_mask=attended,
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
            **encoded,
        ).logits
        found = model.lm_head(hidden_states(model, pixels, ids, segments))
    real = attended.bool()
    assert torch.allclose(found[real], expected[real], atol=1e-4 * expected[real].abs().max())


def test_independent_turns_equal_conversations_of_their_own(random_checkpoint) -> None:
    _, model, _ = random_checkpoint
    rng = stream("independent", 0, 0)
    scene = draw_scene(rng, held_out=False)
    turns = converse(scene, Mixture(turns=(4, 4)), rng)
    pixels = torch.from_numpy(render(scene))[None]
    together = encode_conversation(
        turns, newline_after_picture=False, max_length=1000, independent=True
    )

    def states(row) -> torch.Tensor:
        padded = pad_rows([row])
        with torch.no_grad():
            return hidden_states(model, pixels, padded["ids"], padded["segments"])[0]

    shared = states(together)
    segments = torch.tensor(together.segments)
    assert segments.max() == len(turns) > 1
    for index, turn in enumerate(turns):
        alone = encode_conversation([turn], newline_after_picture=False, max_length=1000)
        expected = states(alone)[torch.tensor(alone.segments) == 1]
        found = shared[segments == index + 1]
        assert torch.allclose(found, expected, atol=1e-4 * expected.abs().max())


@pytest.fixture(scope="module", params=ROLES)
def shipped(request: pytest.FixtureRequest) -> tuple[Role, Path]:
    return request.param, SHIPPED / request.param


def test_shipped_weights_fit_their_budget() -> None:
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 15_000_000
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pkl", ".pickle")]


def test_shipped_provenance_tells_how_they_were_made(shipped: tuple[Role, Path]) -> None:
    role, folder = shipped
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["role"] == role
    assert provenance["command"].startswith(f"grace toy pretrain {role} ")
    assert {"seed", "recipes", "scores", "versions", "records_seen"} <= set(provenance)
    average = provenance["scores"]["per_cent"]["average"]
    assert average >= 95 if role == "teacher" else 55 <= average <= 75


def test_shipped_vocabulary_is_the_one_the_code_builds(shipped: tuple[Role, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shipped[1])
    assert tokenizer.get_vocab() == shared_tokenizer().get_vocab()
    assert tokenizer.chat_template == shared_tokenizer().chat_template


def test_shipped_checkpoint_reproduces_its_recorded_scores(shipped: tuple[Role, Path]) -> None:
    """A third of the recorded items is scored again, all families; sampling allows a few points."""
    role, folder = shipped
    provenance = json.loads((folder / "provenance.json").read_text())
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    scores = score_benchmark(
        model,
        seed=provenance["scores"]["benchmark_seed"],
        choice_count=240,
        yesno_count=240,
    )
    recorded = provenance["scores"]["per_cent"]["average"]
    assert abs(scores["average"] - recorded) < (3 if role == "teacher" else 7)


def test_shipped_teacher_answers_by_generation() -> None:
    """Through the public path: Auto classes, chat template, image processor, `generate`."""
    folder = SHIPPED / "teacher"
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    items = [benchmark_item(kind, 77, index) for index in range(30) for kind in ("mcq", "yesno")]
    texts = []
    for _, asked in items:
        content = [{"type": "image"}, {"type": "text", "text": asked.prompt}]
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        texts.append(chat.replace("<|image_pad|>", "<|image_pad|>" * 16))
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    assert tokenizer.padding_side == "left"
    pictures = [Image.fromarray(render(scene)) for scene, _ in items]
    generated = model.generate(
        **inputs,
        **processor(images=pictures, return_tensors="pt"),
        mm_token_type_ids=(inputs.input_ids == model.config.image_token_id).int(),
        max_new_tokens=8,
    )
    replies = tokenizer.batch_decode(
        generated[:, inputs.input_ids.shape[1] :], skip_special_tokens=True
    )
    right = [reply == asked.answer for reply, (_, asked) in zip(replies, items, strict=True)]
    assert sum(right) >= 57
