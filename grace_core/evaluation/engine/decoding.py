"""Greedy decoding of one batch: its prompts as one packed row, then a token a row and step.

Prompts go through the decoder one after the other in a single row, so nothing is computed for
padding. In the cache they are padded on the left, so that all rows write the same column and a step
has one shape. Rows that have ended leave the batch when enough of them have.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from grace_core.evaluation.engine.features import Features
from grace_core.evaluation.engine.key_values import KeyValues
from grace_core.models.families import Family
from grace_core.models.segments import Segments

# dims: B rows, T columns of the cache, L tokens of a prompt, N tokens of all prompts, d width

LEAVE_AT = 0.75
"""Rows leave when no more than this share goes on: moving the others in the cache has its price."""


@dataclass(frozen=True)
class Row:
    """One question of a batch, on the host."""

    input_ids: Sequence[int]
    positions: Tensor
    """(3, L) or (1, L) int64."""

    places: Sequence[int]
    """Of all image tokens in the prompt."""

    features: Sequence[Features]
    """Of each picture, in order."""

    budget: int
    """Tokens of the answer, at most."""


@dataclass(frozen=True)
class Decoder:
    """The parts of a model that generation calls one by one."""

    model: Any
    """Loaded with `attention="cached"`."""

    family: Family

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    def prefill(self, rows: Sequence[Row], cache: KeyValues) -> Tensor:
        """Put the prompts of all rows into the cache; (B,) int64, the first token of each answer.

        The cache expects these prompts (`write_prompts`).
        """
        lengths = [len(row.input_ids) for row in rows]
        ids = torch.tensor([token for row in rows for token in row.input_ids])
        positions = torch.cat([row.positions for row in rows], dim=1)
        segments = Segments.of(lengths).moved(self._moved)
        embedded = self.model.get_input_embeddings()(self._moved(ids)[None])
        arguments: dict[str, Any] = {}
        features = [one for row in rows for one in row.features]
        if features:
            starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
            places = self._moved(
                torch.tensor([starts[at] + p for at, row in enumerate(rows) for p in row.places])
            )
            tokens = torch.cat([one.tokens for one in features])
            embedded = embedded.index_copy(1, places, tokens.to(embedded.dtype)[None])
            layers = [
                torch.cat(layer) for layer in zip(*(one.deepstack for one in features), strict=True)
            ]
            if layers:
                arguments = {"visual_pos_masks": places, "deepstack_visual_embeds": layers}
        shaped = self._shaped(self._moved(positions))
        hidden = self._run(embedded, shaped, cache, None, segments=segments, **arguments)
        return self._likeliest(hidden[0].index_select(0, segments.cumulative[1:].long() - 1))

    def step(
        self, tokens: Tensor, positions: Tensor, cache: KeyValues, mask: Tensor | None
    ) -> Tensor:
        """The tokens that follow the given ones, (B,) int64.

        Args:
            tokens: (B,) int64.
            positions: (B,) int64, rotary position of each.
            cache: which column they are written to is set (`write_column`).
            mask: (B, 1, 1, visible columns) bool, or None where all are to be seen.
        """
        embedded = self.model.get_input_embeddings()(tokens[:, None])
        axes = 3 if self.family.positions == "multimodal" else 1
        spread = positions[None, :, None].expand(axes, -1, -1)
        hidden = self._run(embedded, spread if axes == 3 else spread[0], cache, mask)
        return self._likeliest(hidden[:, 0])

    def _run(
        self,
        embedded: Tensor,
        positions: Tensor,
        cache: KeyValues,
        mask: Tensor | None,
        **arguments: Any,
    ) -> Tensor:
        output = self.model.get_submodule(self.family.decoder)(
            inputs_embeds=embedded,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            **arguments,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _likeliest(self, states: Tensor) -> Tensor:
        found: Tensor = self.model.lm_head(states).argmax(dim=-1)
        return found

    def _shaped(self, positions: Tensor) -> Tensor:
        """(3, 1, N) or (1, N), as decoders take them."""
        return positions[:, None] if self.family.positions == "multimodal" else positions

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)


@dataclass
class State:
    """A batch between two steps; row i of it is row `members[i]` of the whole batch."""

    members: list[int]
    tokens: Tensor
    """(rows of the cache,) int64: last of each row, not yet in the cache."""

    positions: Tensor
    """(rows of the cache,) int64: of `tokens`."""

    mask: Tensor
    """(rows of the cache, T) bool: columns that hold a token of the row."""

    column: int
    """That the next step writes."""


class Steps(Protocol):
    """How a batch goes on after its prompts, and which shapes of the cache that takes."""

    stride: int
    """Steps between two looks at what came out."""

    @staticmethod
    def rows(count: int) -> int:
        """Rows of the cache that `count` questions take."""

    @staticmethod
    def columns(count: int) -> int:
        """Columns of the cache that `count` tokens take."""

    def run(self, state: State, count: int) -> Tensor:
        """Go on by `count` tokens a row; (count, B) int64, and `state` is what it then is."""


class EagerSteps:
    """Each step launched anew: for a CPU, and wherever a graph cannot be captured."""

    stride = 1

    def __init__(self, decoder: Decoder, cache: KeyValues) -> None:
        self._decoder = decoder
        self._cache = cache

    @staticmethod
    def rows(count: int) -> int:
        """As many as there are."""
        return count

    @staticmethod
    def columns(count: int) -> int:
        """As many as there are."""
        return count

    def run(self, state: State, count: int) -> Tensor:
        """See `Steps.run`."""
        cache, made = self._cache, []
        starts = torch.arange(cache.rows, device=state.tokens.device) * cache.columns
        for _ in range(count):
            state.mask[:, state.column] = True
            visible = state.column + 1
            cache.write_column(starts + state.column, visible)
            mask = state.mask[:, None, None, :visible]
            state.tokens = self._decoder.step(state.tokens, state.positions, cache, mask)
            state.positions = state.positions + 1
            state.column += 1
            made.append(state.tokens)
        return torch.stack(made)


@torch.inference_mode()
def decode(
    decoder: Decoder,
    steps: Steps,
    cache: KeyValues,
    rows: Sequence[Row],
    stop_ids: Collection[int],
) -> list[list[int]]:
    """The answer of each row, without the token that ended it.

    A row ends with the first of `stop_ids` or at its budget, whichever comes first.
    """
    state, first = _begin(decoder, steps, cache, rows)
    answers: list[list[int]] = [[] for _ in rows]
    live = set(range(len(rows)))

    def take(made: list[list[int]]) -> None:
        for tokens in made:
            for row, member in enumerate(state.members):
                if member not in live:
                    continue
                if tokens[row] in stop_ids:
                    live.discard(member)
                    continue
                answers[member].append(tokens[row])
                if len(answers[member]) == rows[member].budget:
                    live.discard(member)

    take([first.tolist()])
    while live:
        if len(live) <= LEAVE_AT * len(state.members):
            _leave(state, steps, cache, live)
        left = max(rows[member].budget - len(answers[member]) for member in live)
        take(steps.run(state, min(steps.stride, left)).tolist())
    return answers


def _begin(
    decoder: Decoder, steps: Steps, cache: KeyValues, rows: Sequence[Row]
) -> tuple[State, Tensor]:
    lengths = [len(row.input_ids) for row in rows]
    longest = max(lengths)
    # The last token of an answer is never put to the model again.
    columns = steps.columns(longest + max(row.budget for row in rows) - 1)
    padded = steps.rows(len(rows))
    cache.begin(padded, columns)
    cache.write_prompts(lengths, longest)
    first = decoder.prefill(rows, cache)
    filled = [*lengths, *[lengths[0]] * (padded - len(rows))]
    mask = torch.zeros(padded, columns, dtype=torch.bool)
    for row, length in enumerate(filled):
        mask[row, longest - length : longest] = True
    following = [int(row.positions.max()) + 1 for row in rows]
    following += following[:1] * (padded - len(rows))
    state = State(
        members=list(range(len(rows))),
        tokens=torch.cat((first, first[:1].expand(padded - len(rows)))),
        positions=torch.tensor(following).to(decoder.device, non_blocking=True),
        mask=mask.to(decoder.device, non_blocking=True),
        column=longest,
    )
    return state, first


def _leave(state: State, steps: Steps, cache: KeyValues, live: set[int]) -> None:
    """Only the rows of `live` go on, where that makes the batch smaller."""
    kept = [row for row, member in enumerate(state.members) if member in live]
    padded = steps.rows(len(kept))
    if padded == cache.rows:
        return
    chosen = torch.tensor(kept, device=state.tokens.device)
    cache.keep(chosen, padded_to=padded)
    chosen = torch.cat((chosen, chosen[:1].expand(padded - len(kept))))
    state.members = [state.members[row] for row in kept]
    state.tokens = state.tokens[chosen]
    state.positions = state.positions[chosen]
    state.mask = state.mask[chosen]
