"""How fast tokens are decoded with weights in BF16, W8 and W4, by the same code on all of them.

Random weights of the 2B shapes, or a release. Each row of the table is one batch size: a step puts
one token of each row through the decoder, with a cache that holds a prompt before it.
"""

from __future__ import annotations

import gc
import json
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from rich.table import Table
from torch import Tensor

from grace_core.bench.markdown import markdown_table
from grace_core.inference.decoder import Decoder
from grace_core.inference.decoding import Decoding
from grace_core.inference.prompts import Prompt, prompt_row
from grace_core.models.cuda_graph import record
from grace_core.models.families import family_of
from grace_core.models.forward import picture_features
from grace_core.models.rows import PackedRow
from grace_core.models.visual_inputs import VisualInputs

log = logging.getLogger(__name__)

GIB = 2.0**30
PREFILL_BATCHES = (1, 8)
CONTEXT = 256
"""Tokens in the cache before the first measured step."""

_STEPS = 30
_REPEATS = 5
_COLUMNS = (
    "weights",
    "what",
    "batch",
    "eager ms",
    "CUDA graph ms",
    "tokens/s",
    "floor ms",
    "of floor",
    "weights GiB",
    "peak GiB",
)

What = Literal["decode", "prefill", "prefill of the decoder", "decode by transformers"]


@dataclass(frozen=True)
class DecodeLine:
    """One row of the table."""

    weights: str
    """bf16, w8 or w4."""

    what: What
    batch: int
    eager: float | None = None
    """Milliseconds of a step, or of a prefill; the median of the repeats."""

    graph: float | None = None
    floor: float | None = None
    """Milliseconds that the bytes of a step take at the rate of a large copy."""

    tokens: int = 0
    """Of a step or prefill."""

    weights_gib: float | None = None
    peak_gib: float | None = None
    """Allocated while the row was measured: weights, cache and everything between."""

    failures: tuple[str, ...] = ()

    @property
    def best(self) -> float | None:
        """Milliseconds, recorded as a graph where that was measured."""
        return self.eager if self.graph is None else self.graph

    @property
    def tokens_per_second(self) -> float | None:
        return None if self.best is None else 1e3 * self.tokens / self.best

    @property
    def of_floor(self) -> float | None:
        if self.best is None or self.floor is None:
            return None
        return self.best / self.floor


@dataclass(frozen=True)
class DecodeTable:
    """All rows, with what they were measured on."""

    model: str
    device: str
    environment: Mapping[str, str]
    bytes_per_second: float
    lines: list[DecodeLine] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return any(line.failures for line in self.lines)

    def to_json(self) -> str:
        """Everything, for programs."""
        lines = [
            asdict(line) | {"tokens_per_second": line.tokens_per_second, "of_floor": line.of_floor}
            for line in self.lines
        ]
        return json.dumps(asdict(self) | {"lines": lines}, indent=1) + "\n"

    def to_markdown(self) -> str:
        """For documents."""
        return markdown_table(self._heading(), _COLUMNS, map(_cells, self.lines), self._notes())

    def to_rich(self) -> Table:
        """For the terminal."""
        table = Table(title=self._heading(), caption="\n".join(self._notes()))
        for name in _COLUMNS:
            table.add_column(name, justify="left" if name in _COLUMNS[:2] else "right")
        for line in self.lines:
            table.add_row(*_cells(line))
        return table

    def _heading(self) -> str:
        return (
            f"{self.model} on {self.device}, torch {self.environment['torch']}; "
            f"{CONTEXT} tokens before each step; copy {self.bytes_per_second / 1e12:.3g} TB/s"
        )

    def _notes(self) -> list[str]:
        """Every row beside the bf16 row of the same batch, and what failed."""
        dense = {(one.what, one.batch): one for one in self.lines if one.weights == "bf16"}
        notes = []
        for line in self.lines:
            beside = dense.get((line.what, line.batch))
            if line.weights != "bf16" and beside is not None:
                ratios = [
                    f"{name} {of_bf16 / own:.2f} x"
                    for name, own, of_bf16 in (
                        ("eager", line.eager, beside.eager),
                        ("CUDA graph", line.graph, beside.graph),
                    )
                    if own and of_bf16
                ]
                if line.weights_gib and beside.weights_gib and line.batch == 1:
                    share = line.weights_gib / beside.weights_gib
                    ratios.append(f"weights {100 * share:.1f} %")
                notes.append(
                    f"{line.weights}, {line.what}, batch {line.batch}, against bf16: "
                    + ", ".join(ratios)
                )
            notes += [
                f"{line.weights}, {line.what}, batch {line.batch} failed: {failure}"
                for failure in line.failures
            ]
        return notes


class DecodeBench:
    """Measures one model after the other on one device."""

    def __init__(self, device: torch.device, visual: VisualInputs, bytes_per_second: float) -> None:
        self.device = device
        self._visual = visual
        self._rate = bytes_per_second
        self._cuda = device.type == "cuda"

    @torch.inference_mode()
    def lines(
        self, weights: str, model: Any, batches: Sequence[int], picture: Any, text_tokens: int
    ) -> Iterator[DecodeLine]:
        """Rows of one model.

        Args:
            weights: what its weights are called.
            model: on the device; a transformers model with dense or packed layers.
            batches: of decoding.
            picture: of each prompt that is prefilled, with `text_tokens` of text.
        """
        gib = model_bytes(model) / GIB
        if weights == "bf16" and self._cuda:
            yield self._by_transformers(model, gib)
        decoder = Decoder(model, family_of(model.config.model_type))
        for batch in batches:
            yield self._attempt(
                DecodeLine(weights, "decode", batch, tokens=batch, weights_gib=gib),
                partial(self._decode, decoder, batch),
            )
        _, count = self._visual.grid_and_tokens(picture)
        for batch in PREFILL_BATCHES if self._cuda else PREFILL_BATCHES[:1]:
            prompt = Prompt([self._visual.image_token_id] * count + [9] * text_tokens, (picture,))
            row = prompt_row([prompt] * batch, self._visual).to(self.device)
            tokens = row.input_ids.numel()
            parts: tuple[What, ...] = ("prefill", "prefill of the decoder")
            for what in parts:
                yield self._attempt(
                    DecodeLine(weights, what, batch, tokens=tokens, weights_gib=gib),
                    partial(self._prefill, decoder, row, what),
                )

    def _attempt(
        self, line: DecodeLine, measure: Callable[[], dict[str, float | None]]
    ) -> DecodeLine:
        """The line with what was measured, or with why that failed; the others go on."""
        self._clear()
        try:
            measured = measure()
        except Exception as error:  # whatever it is, the other rows are worth having
            log.warning("%s, %s: %s", line.weights, line.what, error, exc_info=True)
            told = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            return DecodeLine(**asdict(line) | {"failures": (told,)})
        if self._cuda:
            measured["peak_gib"] = torch.cuda.max_memory_allocated(self.device) / GIB
        return DecodeLine(**asdict(line) | measured)

    def _decode(self, decoder: Decoder, batch: int) -> dict[str, float | None]:
        found: dict[str, float | None] = {"graph": None}
        prompt = Prompt([9 + i % 50 for i in range(CONTEXT)])
        row = prompt_row([prompt] * batch, self._visual)
        for name in ("eager", "graph") if self._cuda else ("eager",):
            decoding = Decoding(
                decoder,
                rows=batch,
                capacity=CONTEXT + _STEPS * (_REPEATS + 2) + 8,
                graph=name == "graph",
            )
            decoding.put(row, range(batch))
            found[name] = self._median(decoding.step, _STEPS if self._cuda else 3)
            del decoding
            gc.collect()
        found["floor"] = 1e3 * self._moved(decoder, batch) / self._rate
        return found

    def _prefill(self, decoder: Decoder, row: PackedRow, what: What) -> dict[str, float | None]:
        found: dict[str, float | None] = {}
        tokens = row.input_ids.numel()
        shape = (len(decoder.layers), tokens, decoder.kept_heads, decoder.head_width)
        keys = torch.empty(shape, dtype=decoder.dtype, device=self.device)
        values = torch.empty_like(keys)
        places = torch.arange(tokens, device=self.device)
        features = None
        if what == "prefill of the decoder":
            features = picture_features(
                decoder.model, decoder.family, row.pictures, row.grids, row.frames
            )

        def run() -> Tensor:
            return decoder.logits(decoder.first_states(row, keys, values, places, features))

        found["eager"] = self._median(run, 3)
        if self._cuda and features is not None:
            found["graph"] = self._median(record(run, device=self.device).replay, 3)
        return found

    def _by_transformers(self, model: Any, gib: float) -> DecodeLine:
        """What `generate` takes a token in eager mode, with its growing cache."""

        def measure() -> dict[str, float | None]:
            ids = torch.full((1, 64), 9, device=self.device)
            few, many = 4, 36

            def seconds(tokens: int) -> float:
                self._wait()
                began = time.perf_counter()
                model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=tokens,
                    min_new_tokens=tokens,
                    do_sample=False,
                )
                self._wait()
                return time.perf_counter() - began

            seconds(few)
            return {"eager": 1e3 * (seconds(many) - seconds(few)) / (many - few)}

        line = DecodeLine("bf16", "decode by transformers", 1, tokens=1, weights_gib=gib)
        return self._attempt(line, measure)

    def _median(self, run: Callable[[], object], steps: int) -> float:
        """Milliseconds of one run: the median of several stretches of `steps` runs."""
        for _ in range(3):
            run()
        taken = []
        for _ in range(_REPEATS):
            self._wait()
            began = time.perf_counter()
            for _ in range(steps):
                run()
            self._wait()
            taken.append(1e3 * (time.perf_counter() - began) / steps)
        return statistics.median(taken)

    def _moved(self, decoder: Decoder, batch: int) -> float:
        """Bytes that a step reads at least: weights once, and each row's keys and values."""
        layers = [one for layer in decoder.layers for one in layer.projections]
        weights = sum(model_bytes(module) for one in layers for module in one.layers)
        head = model_bytes(decoder.model.get_output_embeddings())
        width = decoder.kept_heads * decoder.head_width
        cache = 2 * batch * CONTEXT * width * len(decoder.layers) * decoder.dtype.itemsize
        return weights + head + cache

    def _clear(self) -> None:
        gc.collect()
        if self._cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def _wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize(self.device)


def model_bytes(model: Any) -> int:
    """Of all weights and buffers, shared ones counted once."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _cells(line: DecodeLine) -> tuple[str, ...]:
    def number(value: float | None, digits: str = ".3f") -> str:
        return "" if value is None else format(value, digits)

    return (
        line.weights,
        line.what,
        str(line.batch),
        "failed" if line.failures else number(line.eager),
        number(line.graph),
        number(line.tokens_per_second, ",.0f"),
        number(line.floor),
        number(line.of_floor, ".2f"),
        number(line.weights_gib, ".2f"),
        number(line.peak_gib, ".2f"),
    )
