"""The cache of keys and values of one batch, in memory that all batches share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# dims: B rows, T columns, N tokens of a packed row of prompts, K key-value heads, D width of a head


class KeyValues:
    """Keys and values of B rows in T columns, padded on the left so that all rows end together.

    It stands in for a cache of transformers: decoder layers call `update`. One buffer a layer is
    allocated once, for `capacity` tokens; each batch looks at its first B * T. A captured graph of
    one shape therefore stays valid while batches of other shapes come and go.
    """

    is_compileable = False
    is_sliding: tuple[bool, ...] = ()

    def __init__(self, config: Any, capacity: int, dtype: torch.dtype, device: torch.device):
        """config: the decoder's, for the number of its layers and key-value heads."""
        self.capacity = capacity
        heads, width = _heads(config)
        shape = (capacity, heads, width)
        self._keys = [
            torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)
        ]
        self._values = [torch.zeros_like(buffer) for buffer in self._keys]
        self.rows = self.columns = 0
        self._places = torch.empty(0, dtype=torch.long, device=device)
        self._visible: int | None = None

    def begin(self, rows: int, columns: int) -> None:
        """Room for a new batch, emptied: what is masked is read all the same, and zero times a
        leftover infinity would not be zero.
        """
        assert rows * columns <= self.capacity, f"{rows} rows of {columns} do not fit"
        self.rows, self.columns = rows, columns
        for buffer in (*self._keys, *self._values):
            buffer[: rows * columns].zero_()

    def write_prompts(self, lengths: Sequence[int], width: int) -> None:
        """What `update` gets next are packed prompts; row r's end in column `width` - 1.

        `update` then returns what it got.
        """
        places = [
            torch.arange(length) + row * self.columns + width - length
            for row, length in enumerate(lengths)
        ]
        self._places = torch.cat(places).to(self._places.device, non_blocking=True)
        self._visible = None

    def write_column(self, places: Tensor, visible: int) -> None:
        """What `update` gets next is one token a row.

        places: (B,) int64, row * T + column of each; visible: columns that `update` returns.
        """
        self._places, self._visible = places, visible

    def update(
        self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values, (1, K, N, D) of prompts or (B, K, 1, D) of one token a row.

        Returns:
            As given for prompts; else (B, K, visible, D) each.
        """
        kept = []
        for buffer, states in ((self._keys[layer], key), (self._values[layer], value)):
            tokens = states.transpose(1, 2).flatten(0, 1)
            buffer.index_copy_(0, self._places, tokens.to(buffer.dtype))
            kept.append(states if self._visible is None else self._seen(buffer, self._visible))
        return kept[0], kept[1]

    def keep(self, rows: Tensor, *, padded_to: int) -> None:
        """Let all rows but the given ones, (n,) int64, leave.

        padded_to: rows afterwards, at least n; the further ones repeat the first.
        """
        filler = rows[:1].expand(padded_to - len(rows))
        chosen = torch.cat((rows, filler))
        for buffer in (*self._keys, *self._values):
            whole = buffer[: self.rows * self.columns].view(self.rows, self.columns, -1)
            moved = whole.index_select(0, chosen)
            buffer[: padded_to * self.columns].view(padded_to, self.columns, -1).copy_(moved)
        self.rows = padded_to

    def get_seq_length(self, *_: Any) -> int:
        """Asked by decoders that are not given positions; ours always are."""
        raise AssertionError("positions are given")

    def _seen(self, buffer: Tensor, visible: int) -> Tensor:
        rows = buffer[: self.rows * self.columns].view(self.rows, self.columns, *buffer.shape[1:])
        return rows[:, :visible].transpose(1, 2)


def bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Of keys and values of all layers of a decoder."""
    heads, width = _heads(config)
    return 2 * int(config.num_hidden_layers) * heads * width * dtype.itemsize


def _heads(config: Any) -> tuple[int, int]:
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(config.num_key_value_heads), int(width)
