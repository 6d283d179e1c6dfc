"""The toy tokenizer: exact round trips, control tokens kept out of plain text, Qwen's chat form."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from grace_core.toy.conversations import Mixture, converse
from grace_core.toy.encoding import encode_conversation, picture_prefix, picture_start
from grace_core.toy.pictures import draw_scene
from grace_core.toy.tokenizer import (
    IMAGE_PAD,
    SPECIAL_TOKENS,
    VOCABULARY_SIZE,
    build_tokenizer,
    save_tokenizer,
    shared_tokenizer,
)
from grace_core.toy.world import stream


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return folder


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_any_text_comes_back_exactly(text: str) -> None:
    tokenizer = shared_tokenizer()
    ids = tokenizer(text, split_special_tokens=True).input_ids
    assert tokenizer.decode(ids) == text


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from((*SPECIAL_TOKENS, "<|", "|>", " ", "a", "\n"))).map("".join))
def test_control_tokens_in_plain_text_stay_text(text: str) -> None:
    tokenizer = shared_tokenizer()
    ids = tokenizer(text, split_special_tokens=True).input_ids
    assert not set(ids) & set(tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)))
    assert tokenizer.decode(ids) == text


def test_all_bytes_are_in_the_vocabulary_and_it_fits_the_models() -> None:
    tokenizer = shared_tokenizer()
    assert len(tokenizer) <= VOCABULARY_SIZE
    single = [
        ids for ids in range(len(tokenizer)) if len(tokenizer.convert_ids_to_tokens(ids)) == 1
    ]
    assert len(single) == 256


def test_building_twice_gives_the_same_vocabulary() -> None:
    assert build_tokenizer().get_vocab() == build_tokenizer().get_vocab()


def test_loads_with_autotokenizer(saved: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(saved)
    built = shared_tokenizer()
    assert loaded.get_vocab() == built.get_vocab()
    assert loaded.eos_token == "<|im_end|>"
    assert loaded.pad_token == "<|endoftext|>"
    text = "What colour is the circle? <|im_end|> ünï"
    assert loaded(text).input_ids == built(text).input_ids
    assert loaded.decode(loaded(text, split_special_tokens=True).input_ids) == text


def test_chat_template_gives_qwens_form(saved: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(saved)
    question = [{"type": "image"}, {"type": "text", "text": "How many rings?"}]
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "Sure?"},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>How many rings?<|im_end|>\n"
        "<|im_start|>assistant\n2<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    without = tokenizer.apply_chat_template(messages[:1], tokenize=False)
    assert without.endswith("How many rings?<|im_end|>\n")


def test_chat_template_refuses_unknown_content(saved: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(saved)
    with pytest.raises(Exception, match="unknown content part: video"):
        tokenizer.apply_chat_template(
            [{"role": "user", "content": [{"type": "video"}]}], tokenize=False
        )


def test_pieced_encoding_equals_the_rendered_template() -> None:
    """Ids equal those of the rendered chat; supervised are the replies with their end token."""
    tokenizer = shared_tokenizer()
    for index in range(60):
        rng = stream("encoding", 0, index)
        turns = converse(draw_scene(rng, held_out=False), Mixture(turns=(1, 4)), rng)
        newline = index % 2 == 1
        messages = []
        for number, turn in enumerate(turns):
            text = ("\n" if newline and not number else "") + turn.prompt
            content = [{"type": "image"}] * (not number) + [{"type": "text", "text": text}]
            messages += [
                {"role": "user", "content": content},
                {"role": "assistant", "content": turn.answer},
            ]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        expected = tokenizer(rendered.replace(IMAGE_PAD, IMAGE_PAD * 16)).input_ids
        row = encode_conversation(turns, newline_after_picture=newline, max_length=10_000)
        assert row.ids == expected
        replies = tokenizer.decode(
            [token for token, flag in zip(row.ids, row.supervised, strict=True) if flag]
        )
        assert replies == "".join(f"{turn.answer}<|im_end|>" for turn in turns)


def test_turns_that_do_not_fit_are_dropped() -> None:
    rng = stream("encoding", 0, 0)
    turns = converse(draw_scene(rng, held_out=False), Mixture(turns=(6, 6)), rng)
    whole = encode_conversation(turns, newline_after_picture=False, max_length=10_000)
    cut = encode_conversation(turns, newline_after_picture=False, max_length=100)
    assert len(cut.ids) == len(cut.supervised) == len(cut.segments) <= 100 < len(whole.ids)
    assert shared_tokenizer().decode(cut.ids).count("assistant") < len(turns)


def test_picture_prefix_holds_sixteen_image_tokens_at_its_end() -> None:
    image_id = shared_tokenizer().convert_tokens_to_ids(IMAGE_PAD)
    assert picture_prefix()[picture_start() :] == (image_id,) * 16
