"""Conversations: answers are those of transformers' generate to the whole conversation."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from grace_core.errors import GraceError
from grace_core.inference.chat import Chat
from grace_core.inference.loading import load_release
from grace_core.inference.text_stream import TextStream
from grace_core.models.loading import load_model, load_tokenizer, read_checkpoint
from grace_core.models.visual_inputs import VisualInputs
from tests.engine_models import lively
from tests.packed_releases import packed_release
from tests.tiny_models import FAMILIES, save_tiny

LIMIT = 12


def picture(seed: int, width: int = 48, height: int = 32) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    content = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(content.numpy())


@dataclass
class ByTransformers:
    """The library's own way: template, placeholders, generate; nothing kept between turns."""

    folder: Path
    messages: list[dict[str, Any]] = field(default_factory=list)
    pictures: list[Image.Image] = field(default_factory=list)

    def __post_init__(self) -> None:
        checkpoint = read_checkpoint(self.folder)
        self.model = load_model(checkpoint, device="cpu", dtype=torch.float32)
        self.visual = VisualInputs(checkpoint)
        self.tokenizer = load_tokenizer(self.folder)

    def ask(self, text: str, *pictures: Image.Image) -> str:
        content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": text}]
        self.messages.append({"role": "user", "content": content})
        self.pictures += pictures
        written = self.tokenizer.apply_chat_template(
            self.messages, tokenize=False, add_generation_prompt=True
        )
        placeholder = self.tokenizer.convert_ids_to_tokens(self.visual.image_token_id)
        pieces = written.split(placeholder)
        counts = [self.visual.grid_and_tokens(one)[1] for one in self.pictures]
        whole = pieces[0] + "".join(
            placeholder * count + piece for count, piece in zip(counts, pieces[1:], strict=True)
        )
        ids = self.tokenizer(whole, return_tensors="pt")["input_ids"]
        arguments = self.visual.token_types(ids)
        if self.pictures:
            arguments |= self.visual.tensors(self.pictures)
        made = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=LIMIT,
            do_sample=False,
            **arguments,
        )
        said: str = self.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": [{"type": "text", "text": said}]})
        return said


def chat_with(folder: Path, **options: Any) -> Chat:
    model = load_release(folder, "cpu", dtype=torch.float32)
    return Chat(model, read_checkpoint(folder), **options)


def asked(chat: Chat, text: str, *pictures: Image.Image, limit: int = LIMIT) -> str:
    return "".join(chat.ask(text, pictures, max_new_tokens=limit))


TURNS: list[tuple[str, tuple[Image.Image, ...]]] = [
    ("hello", ()),
    ("What is this?", (picture(0),)),
    ("And now?", (picture(1), picture(2, 64, 64))),
    ("Which one did you see first?", ()),
]


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(lively(request.param), tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(lively("qwen3_vl"), tmp_path_factory.mktemp("qwen"))


def test_every_turn_is_answered_as_by_transformers(folder: Path) -> None:
    chat, other = chat_with(folder), ByTransformers(folder)
    answers = [asked(chat, text, *pictures) for text, pictures in TURNS]
    assert answers == [other.ask(text, *pictures) for text, pictures in TURNS]
    assert len(set(answers)) > 2, "constant answers would prove nothing"


@pytest.mark.parametrize(("family", "bits"), [("qwen3_vl", 4), ("qwen2_vl", 8), ("llava", 4)])
def test_packed_releases_answer_as_by_transformers(tmp_path: Path, family: str, bits: int) -> None:
    release = packed_release(tmp_path, family, bits)
    chat, other = chat_with(release), ByTransformers(release)
    for text, pictures in TURNS:
        assert asked(chat, text, *pictures) == other.ask(text, *pictures)


def test_what_was_read_is_not_read_again(qwen: Path) -> None:
    chat, large = chat_with(qwen), picture(0, 128, 128)
    asked(chat, "What is this?", large)
    first = chat.answer.read
    assert first > chat.picture_tokens(large) == 64
    asked(chat, "And?")
    assert chat.answer.read < 64
    chat.reset()
    asked(chat, "What is this?", large)
    assert chat.answer.read == first


def test_other_pictures_of_the_same_size_are_read(qwen: Path) -> None:
    """Their tokens are the same."""
    chat = chat_with(qwen)
    expected = [asked(chat_with(qwen), "What?", picture(seed)) for seed in range(4)]
    assert len(set(expected)) > 1
    for seed in range(4):
        assert asked(chat, "What?", picture(seed)) == expected[seed]
        chat._messages, chat._pictures = [], []  # as where a turn is left before its answer


def test_an_answer_that_is_left_stays_in_the_conversation_as_far_as_it_came(qwen: Path) -> None:
    chat = chat_with(qwen)
    with closing(chat.ask("hello", max_new_tokens=LIMIT)) as parts:
        begun = "".join(islice(parts, 8))
    assert not chat.answer.complete and chat.answer.tokens == 8
    other = ByTransformers(qwen)
    whole = other.ask("hello")
    (spoken,) = other.messages[-1]["content"]
    # A character whose bytes have not all come is in the conversation as a replacement character.
    spoken["text"] = chat._messages[-1]["content"][0]["text"]
    assert begun and spoken["text"].startswith(begun)
    assert whole.startswith(spoken["text"].rstrip("\N{REPLACEMENT CHARACTER}"))
    assert asked(chat, "go on") == other.ask("go on")


def test_a_conversation_outgrows_its_cache(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grace_core.inference.chat._LEAST_CAPACITY", 32)
    chat, other = chat_with(qwen), ByTransformers(qwen)
    for text, pictures in TURNS:
        assert asked(chat, text, *pictures) == other.ask(text, *pictures)


def test_the_limit_and_the_end_of_the_turn(qwen: Path) -> None:
    chat = chat_with(qwen)
    asked(chat, "hello", limit=9)
    assert chat.answer.tokens == 9 and not chat.answer.complete
    ids = chat._held[-8:]  # the last one has not been put in
    at = next(at for at in range(2, 8) if ids.index(ids[at]) == at)
    chat = chat_with(qwen)
    chat._stop_ids = frozenset({ids[at]})
    said = asked(chat, "hello", limit=9)
    assert said == load_tokenizer(qwen).decode(ids[:at])
    assert chat.answer.complete and chat.answer.tokens == at


def test_mistakes_leave_the_conversation_as_it_was(qwen: Path) -> None:
    chat = chat_with(qwen)
    asked(chat, "hello")
    with pytest.raises(GraceError, match=r"answer up to 5,000, but .* at most 4,096; start anew"):
        asked(chat, "more", limit=5000)
    with pytest.raises(GraceError, match=r"[\d,]+ tokens and an answer .* start anew \(/reset\)"):
        asked(chat, "word " * 5000)
    with pytest.raises(GraceError, match="1 picture placeholders for 0 pictures"):
        asked(chat, "<|image_pad|>")
    other = ByTransformers(qwen)
    other.ask("hello")
    assert asked(chat, "and?") == other.ask("and?")


def test_used_up_memory_is_told(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = chat_with(qwen)

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")

    monkeypatch.setattr("grace_core.inference.decoding.Decoding.put", full)
    with pytest.raises(GraceError, match=r"used up \(CUDA .* 9 GiB\.\); start anew"):
        asked(chat, "hello")


@pytest.mark.parametrize("text", ["plain words", "naïve café, 你好 🙂!", "  two\n\nlines ", "🙂🙂"])
def test_pieces_are_the_text(qwen: Path, text: str) -> None:
    tokenizer = load_tokenizer(qwen)
    stream = TextStream(tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) == text and stream.rest() == ""
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)
    cut = TextStream(tokenizer)
    begun = [
        cut.push(token) for token in tokenizer("a🙂", add_special_tokens=False)["input_ids"][:-1]
    ]
    assert "".join(begun) == "a"
    assert set(cut.rest()) == {"\N{REPLACEMENT CHARACTER}"}


DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("family", "bits"), [("qwen3_vl", 4), ("qwen2_vl", 8), ("llava", 4)])
def test_a_conversation_read_in_parts_is_the_one_read_as_a_whole(
    tmp_path: Path, family: str, bits: int, device: str
) -> None:
    """In bf16, and on a GPU with its kernels and with steps as CUDA graphs."""
    folder = packed_release(tmp_path, family, bits)
    model, checkpoint = load_release(folder, device), read_checkpoint(folder)
    in_parts, whole = Chat(model, checkpoint), Chat(model, checkpoint)
    for text, pictures in TURNS:
        asked(in_parts, text, *pictures)
    whole._messages, whole._pictures = list(in_parts._messages), list(in_parts._pictures)
    decodings = []
    for chat in (in_parts, whole):
        next(chat.ask("And then?"))
        assert chat._decoding is not None
        decodings.append(chat._decoding)
    assert in_parts.answer.read < whole.answer.read
    one, other = decodings
    for _ in range(4):
        scale = other.logits.float().abs().max()
        assert (one.logits.float() - other.logits.float()).abs().max() < 0.05 * scale
        one.tokens.copy_(other.tokens)
        one.step()
        other.step()


@pytest.mark.parametrize("device", DEVICES)
def test_sampled_conversations_repeat_with_their_seed(qwen: Path, device: str) -> None:
    said = []
    for seed in (1, 1, 2):
        model = load_release(qwen, device)
        chat = Chat(model, read_checkpoint(qwen), temperature=3.0, seed=seed)
        said.append(asked(chat, "hello", limit=20))
    assert said[0] == said[1] != said[2]
