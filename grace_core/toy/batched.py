"""Fast forward pass for batches whose every row begins with one 64x64 picture.

The library runs the vision tower's attention picture by picture and works out the rotary positions
row by row, which is right for mixed sizes and slow for hundreds of equal pictures. Here the same
modules run on the whole batch at once; `tests/test_toy_checkpoints.py` compares the two.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen3VLForConditionalGeneration

from grace_core.toy.checkpoints import MERGE_SIZE, PATCH_SIZE
from grace_core.toy.pictures import SIZE

GRID = SIZE // PATCH_SIZE
MERGED_GRID = GRID // MERGE_SIZE
VISUAL_TOKENS = MERGED_GRID**2


def patchify(pixels: Tensor) -> Tensor:
    """Pixels as the image processor would deliver them.

    Args:
        pixels: (B, 64, 64, 3), uint8 RGB.

    Returns:
        (B, 64, 384) fp32 in [-1, 1]: patches in merge order, each (channel, frame, row, column).
    """
    m, n, p = MERGE_SIZE, MERGED_GRID, PATCH_SIZE
    x = pixels.float().div(127.5).sub(1.0)
    x = x.reshape(-1, n, m, p, n, m, p, 3).permute(0, 1, 4, 2, 5, 7, 3, 6)
    x = x.reshape(-1, GRID * GRID, 3, 1, p * p).expand(-1, -1, -1, 2, -1)
    return x.reshape(-1, GRID * GRID, 3 * 2 * p * p)


def encode_pictures(visual: Any, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Run the vision tower on equal pictures.

    Args:
        visual: `Qwen3VLVisionModel`.
        pixels: (B, 64, 64, 3), uint8.

    Returns:
        Merged tokens (B * 16, d) and one such tensor for each deepstack layer.
    """
    config = visual.config
    batch, patches, width = len(pixels), GRID * GRID, config.hidden_size
    heads = config.num_heads
    order = torch.arange(patches, device=pixels.device)
    order = order.view(MERGED_GRID, MERGE_SIZE, MERGED_GRID, MERGE_SIZE)
    order = order.permute(0, 2, 1, 3).reshape(-1)
    embed = visual.patch_embed.proj
    x = F.linear(patchify(pixels), embed.weight.view(width, -1), embed.bias)
    x = x + visual.pos_embed.weight[order]
    cos, sin = _rotary_angles(order, width // heads)
    features: list[Tensor] = []
    for index, block in enumerate(visual.blocks):
        qkv = block.attn.qkv(block.norm1(x)).view(batch, patches, 3, heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = _attend(_turn(q, cos, sin), _turn(k, cos, sin), v)
        x = x + block.attn.proj(attended.transpose(1, 2).reshape(batch, patches, width))
        x = x + block.mlp(block.norm2(x))
        if index in config.deepstack_visual_indexes:
            merger = visual.deepstack_merger_list[len(features)]
            features.append(merger(x.reshape(-1, width)))
    return visual.merger(x.reshape(-1, width)), features


Encoder = Callable[[Any, Tensor], tuple[Tensor, list[Tensor]]]


def hidden_states(
    model: Qwen3VLForConditionalGeneration,
    pixels: Tensor,
    input_ids: Tensor,
    segments: Tensor,
    encode: Encoder = encode_pictures,
) -> Tensor:
    """Final decoder states, before the head.

    Args:
        model: the toy model.
        pixels: (B, 64, 64, 3), uint8: one picture a row.
        input_ids: (B, L), right-padded, each with its 16 image tokens at the same columns.
        segments: (B, L): 0 for the row's opening with the picture, -1 for padding; tokens see
            the opening and what precedes them in their own segment, positions restart with it.
        encode: `encode_pictures` or a compiled version of it.

    Returns:
        (B, L, d); what stands in padded columns is meaningless.
    """
    is_visual = input_ids == model.config.image_token_id
    start = int(is_visual[0].int().argmax())
    end = start + VISUAL_TOKENS
    merged, features = encode(model.model.visual, pixels)
    text = model.model.language_model
    embedded = text.embed_tokens(input_ids)
    visual = merged.view(len(pixels), VISUAL_TOKENS, -1).to(embedded.dtype)
    embedded = torch.cat((embedded[:, :start], visual, embedded[:, end:]), dim=1)
    output = text(
        inputs_embeds=embedded,
        attention_mask=attention_bias(segments),
        position_ids=rotary_positions(segments, start),
        visual_pos_masks=is_visual,
        deepstack_visual_embeds=features,
        use_cache=False,
    )
    return output.last_hidden_state


def attention_bias(segments: Tensor) -> Tensor:
    """Additive mask (B, 1, L, L) fp32: causal, within a segment, the opening open to all."""
    keys, queries = segments[:, None, :], segments[:, :, None]
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    visible = causal & ((keys == 0) | (keys == queries))
    return torch.where(visible, 0.0, torch.finfo(torch.float32).min)[:, None]


def rotary_positions(segments: Tensor, start: int) -> Tensor:
    """Positions (3, B, L) in time, height and width: a picture advances the text by its side."""
    columns = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    # Column at which a token's segment begins, then its distance from there.
    begins = torch.where(segments[:, 1:] != segments[:, :-1], columns[:, 1:], 0)
    begins = torch.cat((begins[:, :1] * 0, begins), dim=1).cummax(dim=1).values
    opening = (segments == 0).sum(dim=1, keepdim=True) - VISUAL_TOKENS + MERGED_GRID
    after_picture = columns - VISUAL_TOKENS + MERGED_GRID
    text = torch.where(segments == 0, after_picture, opening + columns - begins)
    positions = torch.where(columns < start, columns, text).repeat(3, 1, 1)
    cells = torch.arange(VISUAL_TOKENS, device=segments.device)
    picture = start + torch.stack((cells * 0, cells // MERGED_GRID, cells % MERGED_GRID))
    positions[:, :, start : start + VISUAL_TOKENS] = picture[:, None]
    return positions


def _rotary_angles(order: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    half = head_dim // 2
    frequencies = 10000.0 ** -(torch.arange(0, half, 2, device=order.device) / half)
    angles = torch.cat(
        [axis[:, None] * frequencies for axis in (order // GRID, order % GRID)], dim=-1
    ).repeat(1, 2)
    return angles.cos(), angles.sin()


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention, spelt out: for so few patches the fused CPU kernel's backward is slow."""
    weights = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    return weights.softmax(dim=-1).to(v.dtype) @ v


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)
