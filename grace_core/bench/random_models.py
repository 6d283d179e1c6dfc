"""Models with random weights, made directly on the device, and complete checkpoints of them.

Random weights cost what trained ones do, and nothing has to be downloaded: the whole path, from
reading checkpoints to the release, can be measured on a machine without a network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoModelForImageTextToText, GenerationConfig, PreTrainedTokenizerFast

from grace_core.bench.shapes import REAL_TOKENS, Shapes
from grace_core.errors import GraceError
from grace_core.inference.loading import make_buffers
from grace_core.inference.packed_store import PackedStore
from grace_core.models.families import Family, family_of, set_trainable
from grace_core.quantization.convert import quantizable_linears
from grace_core.toy.checkpoints import Role, image_processor_settings
from grace_core.toy.tokenizer import CHAT_TEMPLATE, END_OF_TEXT, IM_END, shared_tokenizer

SHARD_SIZE = "5GB"
STANDARD_DEVIATION = 0.02


def random_model(
    shapes: Shapes, role: Role, device: torch.device, *, dtype: torch.dtype = torch.bfloat16
) -> Any:
    """The role's model on the device, in evaluation mode.

    Weights are drawn there as transformers initialises the family (standard deviation 0.02, norms
    1), so that a large model takes seconds and no memory of the host. Buffers such as the rotary
    frequencies are computed as in any other model, in fp32.
    """
    with device:
        model = AutoModelForImageTextToText.from_config(
            shapes.config(role), dtype=dtype, attn_implementation="sdpa"
        )
    return model.eval()


def random_packed_model(
    shapes: Shapes, role: Role, device: torch.device, *, bits: int, group_size: int
) -> Any:
    """The role's model with random codes in its quantized layers, which never exist unpacked.

    Everything else is drawn as in :func:`random_model`; scales are such that weights have about the
    same spread.
    """
    model = random_model(shapes, role, torch.device("meta"))
    make_buffers(model, device)
    linears = quantizable_linears(model, family_of(model.config.model_type).decoder)
    store = PackedStore(linears, device, bits=bits, group_size=group_size)
    for name, linear in linears.items():
        size, width = (linear.out_features, linear.in_features), linear.in_features * bits // 32
        words = torch.randint(-(2**31), 2**31, (size[0], width), dtype=torch.int64, device=device)
        scales = torch.full(
            (size[0], size[1] // group_size),
            STANDARD_DEVIATION * 12**0.5 / 2**bits,  # of a uniform distribution
            dtype=torch.bfloat16,
            device=device,
        )
        model.set_submodule(name, store.layer(name, words.to(torch.int32), scales))
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and weight.is_meta:
                drawn = torch.empty(weight.shape, dtype=weight.dtype, device=device)
                if weight.ndim > 1:
                    drawn.normal_(std=STANDARD_DEVIATION)
                else:
                    drawn.fill_(float(name == "weight"))
                module._parameters[name] = nn.Parameter(drawn, requires_grad=False)
    model.tie_weights()
    return model


def twin(model: Any, shapes: Shapes, role: Role) -> Any:
    """The role's model as transformers builds it, over the very parameters and buffers of `model`.

    For a plain implementation beside a changed one: modules are apart, weights are held once.
    """
    with torch.device("meta"):
        plain = AutoModelForImageTextToText.from_config(
            shapes.config(role), dtype=model.dtype, attn_implementation="sdpa"
        )
    shared: dict[str, nn.Module] = dict(model.named_modules())
    for name, module in plain.named_modules():
        for own in module._parameters:
            module._parameters[own] = shared[name]._parameters[own]
        for own in module._buffers:
            module._buffers[own] = shared[name]._buffers[own]
    assert all(not tensor.is_meta for tensor in plain.parameters()), "every weight is shared"
    return plain.train(model.training)


def trained_weights(shapes: Shapes, family: Family) -> int:
    """Numbers in the student that GRACE trains."""
    student = random_model(shapes, "student", torch.device("meta"))
    set_trainable(student, family, "language")
    return sum(weight.numel() for weight in student.parameters() if weight.requires_grad)


def save_random_checkpoint(
    folder: Path, shapes: Shapes, role: Role, device: torch.device, *, seed: int
) -> None:
    """Write a random model as an ordinary Hugging Face folder: weights and all companions.

    Raises:
        GraceError: the folder exists and is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise GraceError(f"{folder} exists already; remove it or name another folder")
    torch.manual_seed(seed)
    model = random_model(shapes, role, device)
    text = model.config.text_config
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
    )
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    save_companions(folder, shapes)


def save_companions(folder: Path, shapes: Shapes) -> None:
    """Tokenizer, chat template and image processor that go with the shapes' token ids."""
    tokenizer_of(shapes).save_pretrained(folder)
    settings = image_processor_settings()
    if shapes.name == "real":
        settings |= {
            "patch_size": shapes.patch_size,
            "merge_size": shapes.merge_size,
            "size": {"shortest_edge": 784, "longest_edge": shapes.picture_side**2},
        }
    text = json.dumps(settings, indent=2) + "\n"
    (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")


def tokenizer_of(shapes: Shapes) -> PreTrainedTokenizerFast:
    """The toy tokenizer; for the real shapes with its control tokens at their published ids.

    Other ids of the large vocabulary have no text: a model may answer with them, and they decode to
    nothing.
    """
    toy = shared_tokenizer()
    if shapes.name == "toy":
        return toy
    state: dict[str, Any] = json.loads(toy.backend_tokenizer.to_str())
    state["model"]["vocab"] = _moved(state["model"]["vocab"])
    for added in state["added_tokens"]:
        added["id"] = REAL_TOKENS[added["content"]]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[t for t in REAL_TOKENS if t not in (IM_END, END_OF_TEXT)],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=toy.model_max_length,
        padding_side="left",
    )


def _moved(vocabulary: Mapping[str, int]) -> dict[str, int]:
    return {token: REAL_TOKENS.get(token, number) for token, number in vocabulary.items()}
