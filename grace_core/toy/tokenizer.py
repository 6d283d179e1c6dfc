"""The toy models' own tokenizer: byte-level BPE, so that any text encodes and decodes back exactly.

The vocabulary: the 256 bytes, seven special tokens of Qwen's names, and merges learnt from a fixed
sample of the toy world's conversations (they halve the length of a record and more). The words that
pictures show (`lettering.WORDS`) come last, one token each. The models' embeddings are padded to
512 rows, as the real ones' are to a round number.

Special tokens in user text: `tokenizer(text)` would take a literal `<|im_end|>` for the control
token, as every Hugging Face tokenizer does. Text that is not a rendered chat has to be encoded with
`split_special_tokens=True`, which gives plain bytes; a rendered chat is safe when each message's
text is encoded that way and only the template's own markers as control tokens.
"""

import json
import random
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from grace_core.toy.conversations import Mixture, converse
from grace_core.toy.lettering import WORDS
from grace_core.toy.pictures import draw_scene

VOCABULARY_SIZE = 512
"""Rows of the models' embeddings; the tokenizer itself has some 455 tokens."""

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (
    *(END_OF_TEXT, IM_START, IM_END),
    *(VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD),
)

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string %}{{- message.content }}"
    "{%- else %}{%- for part in message.content %}"
    "{%- if part.type == 'image' %}"
    "{{- '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- elif part.type == 'text' %}{{- part.text }}"
    "{%- else %}{{- raise_exception('unknown content part: ' + part.type) }}"
    "{%- endif %}{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""Qwen's chat form without tools or a default system message."""

_SAMPLE_SIZE = 2000


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer from nothing: always the same one."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_sample(), trainer)
    backend = _with_whole_words(backend)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[t for t in SPECIAL_TOKENS if t not in (IM_END, END_OF_TEXT)],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
        padding_side="left",
    )


@cache
def shared_tokenizer() -> PreTrainedTokenizerFast:
    """One tokenizer a process, built once."""
    return build_tokenizer()


def save_tokenizer(folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into the folder."""
    shared_tokenizer().save_pretrained(folder)


def _with_whole_words(backend: Tokenizer) -> Tokenizer:
    """Append merges until every word, with and without a blank before it, is one token.

    Merges learnt before come first, so no other text is encoded differently.
    """
    for word in (form for plain in WORDS for form in (plain, f" {plain}")):
        while len(tokens := backend.encode(word, add_special_tokens=False).tokens) > 1:
            state = json.loads(backend.to_str())
            model = state["model"]
            model["merges"].append(tokens[:2] if " " not in word else tokens[-2:])
            model["vocab"]["".join(model["merges"][-1])] = backend.get_vocab_size()
            backend = Tokenizer.from_str(json.dumps(state))
    assert backend.get_vocab_size() <= VOCABULARY_SIZE
    return backend


def _sample() -> Iterator[str]:
    """Texts the merges are learnt from, with the pictures' words taken out."""
    rng = random.Random("grace-toy/tokenizer")
    spelt_out = re.compile("|".join(WORDS))
    for _ in range(_SAMPLE_SIZE):
        scene = draw_scene(rng, held_out=False)
        for turn in converse(scene, Mixture(), rng):
            text = f"user\n{turn.prompt}\nassistant\n{turn.answer}"
            yield spelt_out.sub("", text)
