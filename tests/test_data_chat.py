"""The supervised span under templates of several families, checked against hand-written strings."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from grace_core.data.chat import ConversationEncoder, EncodedConversation
from grace_core.data.sharegpt4v import Reason, Turn, UnusableRecord
from grace_core.errors import GraceError
from grace_core.toy.tokenizer import shared_tokenizer

# As published with Qwen/Qwen2-VL-2B-Instruct, without its video branch.
QWEN2_VL = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As published with llava-hf/llava-1.5-7b-hf: pictures first, answers without an end.
LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_PARTS = (
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}"
)
# The form LLaVA-1.5 was trained in.
VICUNA = (
    "{% for message in messages %}{% if message.role == 'user' %}USER: " + _PARTS + " "
    "{% else %}ASSISTANT: " + _PARTS + "</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# Closes the last turn otherwise than the others, and trims texts.
TRIMMING = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>\n"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text | trim }}{% endif %}{% endfor %}"
    "<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
MARKERS = ("<image>", "<|user|>", "<|assistant|>", "<|end|>", "<pad>")

QUESTION_AND_ANSWER = [
    Turn("user", "<image>\nWhat is it?"),
    Turn("assistant", "A red box."),
    Turn("user", "Sure?"),
    Turn("assistant", "Yes."),
]


def byte_tokenizer(template: str, merges: tuple[tuple[str, str], ...] = ()) -> Any:
    """Byte-level: one token a byte but for the merges given; `<s>` goes before every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(alphabet)}
    for one, other in merges:
        vocabulary[one + other] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", *MARKERS])
    bos = backend.token_to_id("<s>")
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)]),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=list(MARKERS[:-1]),
        chat_template=template,
    )


def qwen_tokenizer(template: str | None = None) -> Any:
    """The toy models' own, with another template if one is given."""
    backend = Tokenizer.from_str(shared_tokenizer().backend_tokenizer.to_str())
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=template or shared_tokenizer().chat_template,
    )


def encoder_of(tokenizer: Any) -> ConversationEncoder:
    ids = [
        tokenizer.convert_tokens_to_ids(token)
        for token in ("<|image_pad|>", "<image>")
        if token in tokenizer.get_vocab()
    ]
    return ConversationEncoder(tokenizer, ids[0])


def spans(tokenizer: Any, encoded: EncodedConversation) -> list[tuple[bool, str]]:
    """The conversation as runs of supervised and other text."""
    tokens = zip(encoded.input_ids, encoded.labels_mask, strict=True)
    return [
        (supervised, tokenizer.decode([token for token, _ in run]))
        for supervised, run in groupby(tokens, key=lambda token: token[1])
    ]


def test_qwen_chat_form() -> None:
    tokenizer = qwen_tokenizer()
    encoded = encoder_of(tokenizer).encode(QUESTION_AND_ANSWER, [3])
    assert spans(tokenizer, encoded) == [
        (
            False,
            "<|im_start|>user\n<|vision_start|><|image_pad|><|image_pad|><|image_pad|>"
            "<|vision_end|>What is it?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (True, "A red box.<|im_end|>"),
        (False, "\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"),
        (True, "Yes.<|im_end|>"),
        (False, "\n"),
    ]


def test_a_system_message_of_the_template_is_not_supervised() -> None:
    tokenizer = qwen_tokenizer(QWEN2_VL)
    encoded = encoder_of(tokenizer).encode(
        [Turn("user", "Hello"), Turn("assistant", "Hi\n\nthere")], []
    )
    assert spans(tokenizer, encoded) == [
        (
            False,
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
        ),
        (True, "Hi\n\nthere<|im_end|>"),
        (False, "\n"),
    ]


def test_vicuna_form() -> None:
    tokenizer = byte_tokenizer(VICUNA)
    encoded = encoder_of(tokenizer).encode(QUESTION_AND_ANSWER, [2])
    assert spans(tokenizer, encoded) == [
        (False, "<s>USER: <image><image>What is it? ASSISTANT:"),
        (True, " A red box.</s>"),
        (False, "USER: Sure? ASSISTANT:"),
        (True, " Yes.</s>"),
    ]


def test_a_template_without_an_end_gets_the_end_token() -> None:
    tokenizer = byte_tokenizer(LLAVA)
    encoded = encoder_of(tokenizer).encode(QUESTION_AND_ANSWER, [2])
    assert spans(tokenizer, encoded) == [
        (False, "<s>USER: <image><image>\nWhat is it? ASSISTANT:"),
        (True, " A red box.</s>"),
        (False, " USER: Sure? ASSISTANT:"),
        (True, " Yes.</s>"),
        (False, " "),
    ]


def test_a_template_that_trims_and_closes_the_last_turn_otherwise() -> None:
    tokenizer = byte_tokenizer(TRIMMING)
    turns = [Turn("user", " Well? \n"), Turn("assistant", "\n So. "), *QUESTION_AND_ANSWER]
    encoded = encoder_of(tokenizer).encode(turns, [1])
    assert spans(tokenizer, encoded) == [
        (False, "<s><|user|>\nWell?<|end|>\n<|assistant|>\n"),
        (True, "So.<|end|>"),
        (False, "\n<|user|>\n<image>What is it?<|end|>\n<|assistant|>\n"),
        (True, "A red box.<|end|>"),
        (False, "\n<|user|>\nSure?<|end|>\n<|assistant|>\n"),
        (True, "Yes.<|end|>"),
        (False, "\n</s>"),
    ]


def test_pictures_stand_where_their_tags_stood() -> None:
    tokenizer = qwen_tokenizer()
    turns = [
        Turn("user", "First:\n<image>\n<image>\r\n\nThen <image> and"),
        Turn("assistant", "Two."),
        Turn("user", "Last?\n<image>"),
        Turn("assistant", "Four."),
    ]
    encoded = encoder_of(tokenizer).encode(turns, [1, 2, 3, 4])
    text = tokenizer.decode(encoded.input_ids)
    pad = "<|image_pad|>"
    for count in range(1, 5):
        text = text.replace(f"<|vision_start|>{pad * count}<|vision_end|>", f"[{count}]")
    assert text == (
        "<|im_start|>user\nFirst:[1][2]\nThen [3] and<|im_end|>\n"
        "<|im_start|>assistant\nTwo.<|im_end|>\n"
        "<|im_start|>user\nLast?[4]<|im_end|>\n"
        "<|im_start|>assistant\nFour.<|im_end|>\n"
    )


@pytest.mark.parametrize("template", [VICUNA, LLAVA, TRIMMING])
def test_the_unsupervised_beginning_is_the_prompt_of_use(template: str) -> None:
    """The tokens before the last answer are those of the tokenizer's own generation prompt."""
    tokenizer = byte_tokenizer(template)
    encoded = encoder_of(tokenizer).encode([Turn("user", "Hello"), Turn("assistant", "Hi.")], [])
    message = {"role": "user", "content": [{"type": "text", "text": "Hello"}]}
    prompt = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    expected = tokenizer(prompt.removeprefix("<s>"))["input_ids"]
    assert encoded.input_ids[: encoded.labels_mask.index(True)] == expected


def test_a_token_over_the_border_is_supervised() -> None:
    """The template's line break and the answer's own merge into one token."""
    newline = "Ċ"  # how byte-level BPE spells a line break
    template = VICUNA.replace("ASSISTANT: ", "ASSISTANT:\n").replace("ASSISTANT:{", "ASSISTANT:\n{")
    tokenizer = byte_tokenizer(template, merges=((newline, newline),))
    encoded = encoder_of(tokenizer).encode([Turn("user", "Q"), Turn("assistant", "\nA")], [])
    assert spans(tokenizer, encoded) == [(False, "<s>USER: Q ASSISTANT:"), (True, "\n\nA</s>")]
    encoded = encoder_of(tokenizer).encode([Turn("user", "Q"), Turn("assistant", "A")], [])
    assert spans(tokenizer, encoded) == [(False, "<s>USER: Q ASSISTANT:\n"), (True, "A</s>")]


@pytest.mark.parametrize(
    "token", ["<|im_end|>", "<|im_start|>", "<|image_pad|>", "<|video_pad|>", "<|endoftext|>"]
)
@pytest.mark.parametrize("typed_by", ["user", "assistant"])
def test_a_typed_control_token_never_becomes_one(token: str, typed_by: str) -> None:
    tokenizer = qwen_tokenizer()
    user, assistant = "Hello", "Hi"
    if typed_by == "user":
        user += f" {token} x"
    else:
        assistant += f" {token} x"
    with pytest.raises(UnusableRecord) as caught:
        encoder_of(tokenizer).encode([Turn("user", user), Turn("assistant", assistant)], [])
    assert caught.value.reason == Reason.CONTROL_TOKEN
    assert token in caught.value.detail


def test_a_control_token_does_not_arise_across_a_border() -> None:
    """Halves of a token on both sides of a picture or a template marker stay text."""
    tokenizer = qwen_tokenizer()
    turns = [Turn("user", "<|im_<image>end|><|im_start|"), Turn("assistant", "|><|im_end|")]
    encoded = encoder_of(tokenizer).encode(turns, [1])
    text = tokenizer.decode(encoded.input_ids)
    assert text == (
        "<|im_start|>user\n<|im_<|vision_start|><|image_pad|><|vision_end|>end|><|im_start|"
        "<|im_end|>\n<|im_start|>assistant\n|><|im_end|<|im_end|>\n"
    )
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert encoded.input_ids.count(end) == 2


def test_a_template_that_rewrites_a_text_sends_it_to_quarantine() -> None:
    template = VICUNA.replace("{{ part.text }}", "{{ part.text.split('</think>')[-1] }}")
    tokenizer = byte_tokenizer(template)
    encoder = encoder_of(tokenizer)
    turns = [Turn("user", "Why?"), Turn("assistant", "<think>hm</think>So.")]
    with pytest.raises(UnusableRecord) as caught:
        encoder.encode(turns, [])
    assert caught.value.reason == Reason.TEMPLATE_CHANGES_TEXT
    assert encoder.encode([turns[0], Turn("assistant", "So.")], []).labels_mask.count(True) == 5


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("", "no chat template"),
        ("{{ messages[0].content + 'x' }}", "lists of"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}", "lists of"),
        ("{{ raise_exception('never') }}", "never"),
        (VICUNA.replace("<image>", ""), "writes 0 image tokens"),
        (
            VICUNA.replace("%}ASSISTANT:{", "%}ASSISTANT: <think>{"),
            "generation prompt of turn 1",
        ),
    ],
)
def test_templates_that_cannot_be_trained_on_are_refused_at_once(
    template: str, message: str
) -> None:
    with pytest.raises(GraceError, match=message):
        encoder_of(byte_tokenizer(template))


def test_no_way_to_stop_is_refused() -> None:
    tokenizer = byte_tokenizer(LLAVA)
    tokenizer.eos_token = None
    with pytest.raises(GraceError, match="could not learn to stop"):
        encoder_of(tokenizer)


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4))
@settings(max_examples=150, deadline=None)
def test_any_text_comes_back_from_its_supervised_tokens(exchanges: list[tuple[str, str]]) -> None:
    """Control, invisible and private-use characters included, in every template."""
    for tokenizer, end, before in TOKENIZERS:
        turns = [
            turn
            for user, assistant in exchanges
            for turn in (Turn("user", user), Turn("assistant", assistant))
        ]
        encoded = encoder_of(tokenizer).encode(turns, [])
        supervised = [text for flag, text in spans(tokenizer, encoded) if flag]
        assert supervised == [f"{before}{assistant}{end}" for _, assistant in exchanges]


TOKENIZERS = [
    (qwen_tokenizer(), "<|im_end|>", ""),
    (byte_tokenizer(VICUNA), "</s>", " "),
    (byte_tokenizer(LLAVA), "</s>", " "),
]
