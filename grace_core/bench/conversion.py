"""How long it takes to pack a quantized checkpoint, and what memory: from disk to disk, on a CPU.

Each conversion is `export_packed` in a process of its own, whose peak of resident memory the kernel
tells, whatever the libraries need included. The source is dropped from the page cache before, and
what was written is flushed to the disk within the time.

Packing alone stands beside :func:`plain_awq`, which goes column by column as the published code
does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from grace_core.bench.markdown import markdown_table
from grace_core.bench.random_models import random_model, save_random_checkpoint
from grace_core.bench.shapes import GROUP_SIZE, Shapes
from grace_core.errors import GraceError
from grace_core.export.awq import AWQ
from grace_core.export.compressed import COMPRESSED
from grace_core.export.release import export_packed
from grace_core.models.families import family_of
from grace_core.quantization.awq import ORDER, PER_WORD, pack_awq
from grace_core.quantization.checkpoint import save_scales
from grace_core.quantization.convert import quantizable_linears
from grace_core.quantization.lsq import MIN_SCALE, code_range, grouped, quantize, stored_scale
from grace_core.quantization.packing import pack_codes
from grace_core.quantization.scales import ScaleBank

CONVERSIONS: Mapping[str, int] = {"W4": 4, "W8": 8, "W4 as AWQ": 4}
"""Bits of the source, by what is made of it."""

GOAL_SECONDS, GOAL_MEMORY, GOAL_PACKING = 20.0, 1.3, 8.0
"""At real size on 2 cores: a conversion, its peak over the source's size, packing over a loop."""

_COLUMNS = ("conversion", "seconds", "of", "peak GB", "of the source", "written GB")


@dataclass(frozen=True)
class Conversion:
    """One conversion: the fastest of its repeats, and the largest peak."""

    name: str
    seconds: float
    repeats: int
    peak: int
    """Bytes of resident memory."""

    read: int
    """Bytes of the source's weights."""

    written: int


@dataclass(frozen=True)
class Packing:
    """One decoder layer's matrices, codes and packing, in memory: seconds."""

    name: str
    ours: float
    plain: float | None
    """Column by column, once; None where there is no such loop to compare with."""


@dataclass
class ConversionTable:
    """Everything measured, with the machine it was measured on."""

    environment: Mapping[str, str]
    cores: int
    conversions: list[Conversion]
    packings: list[Packing]

    def to_json(self) -> str:
        """Everything, for programs."""
        return json.dumps(asdict(self), indent=1) + "\n"

    def to_markdown(self) -> str:
        """For documents."""
        return markdown_table(self._heading(), _COLUMNS, self._rows(), self._notes())

    def to_rich(self) -> Table:
        """For the terminal."""
        table = Table(title=self._heading(), caption="\n".join(self._notes()))
        for name in _COLUMNS:
            table.add_column(name, justify="left" if name == "conversion" else "right")
        for row in self._rows():
            table.add_row(*row)
        return table

    def _heading(self) -> str:
        return f"conversion on {self.cores} cores of {self.environment['cpu']}"

    def _rows(self) -> Iterable[tuple[str, ...]]:
        for one in self.conversions:
            yield (
                one.name,
                f"{one.seconds:.1f}",
                f"best of {one.repeats}",
                f"{one.peak / 1e9:.2f}",
                f"{one.peak / one.read:.2f}",
                f"{one.written / 1e9:.2f}",
            )

    def _notes(self) -> list[str]:
        notes = [
            f"Goals at real size on 2 cores: {GOAL_SECONDS:g} s, {GOAL_MEMORY:g} of the source's "
            f"size, packing {GOAL_PACKING:g} times as fast as column by column."
        ]
        for one in self.packings:
            beside = ""
            if one.plain is not None:
                beside = f"; column by column {one.plain:.2f} s, {one.plain / one.ours:.0f} times"
            notes.append(
                f"{one.name}, one decoder layer in memory: {1e3 * one.ours:.0f} ms{beside}."
            )
        return notes


def measure_conversions(shapes: Shapes, folder: Path, *, repeats: int) -> Iterator[Conversion]:
    """Write a random student of the shapes, and convert it in each way.

    Args:
        folder: for the source and one release at a time; real shapes take 8 GB there.
    """
    source = folder / "source"
    save_random_checkpoint(source, shapes, "student", torch.device("cpu"), seed=0)
    read = _weight_bytes(source)
    for name, bits in CONVERSIONS.items():
        _add_scales(source, shapes, bits)
        runs = [_convert_apart(source, folder / "release", name) for _ in range(repeats)]
        seconds = min(run["seconds"] for run in runs)
        peak = int(max(run["peak"] for run in runs))
        yield Conversion(name, seconds, repeats, peak, read, int(runs[0]["written"]))


def measure_packing(shapes: Shapes, *, repeats: int) -> list[Packing]:
    """Codes and packing of one decoder layer's matrices, in memory."""
    config = shapes.config("student").text_config
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    sides = [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries)]
    sides += [(inner, hidden), (inner, hidden), (hidden, inner)]
    generator = torch.Generator().manual_seed(0)
    weights = [(0.02 * torch.randn(side, generator=generator)).bfloat16() for side in sides]
    scales = {
        bits: [stored_scale(_log_scale(weight, bits)) for weight in weights] for bits in (4, 8)
    }

    def packed(bits: int, pack: Callable[[Tensor], Tensor]) -> None:
        for weight, scale in zip(weights, scales[bits], strict=True):
            pack(quantize(weight, scale, bits, GROUP_SIZE))

    def plain() -> None:
        for weight, scale in zip(weights, scales[4], strict=True):
            plain_awq(weight, scale)

    ours = {
        name: min(_seconds(partial(packed, bits, pack)) for _ in range(repeats))
        for name, bits, pack in (
            ("W4", 4, partial(pack_codes, bits=4)),
            ("W8", 8, partial(pack_codes, bits=8)),
            ("W4 as AWQ", 4, pack_awq),
        )
    }
    loop = _seconds(plain)
    return [
        Packing(name, seconds, loop if name == "W4 as AWQ" else None)
        for name, seconds in ours.items()
    ]


def plain_awq(weight: Tensor, scale: Tensor) -> Tensor:
    """AWQ's words (I, O / 8) of a weight (O, I), one column after the other."""
    columns = [
        (weight[:, number].float() / scale[:, number // GROUP_SIZE].float()).round()
        for number in range(weight.shape[1])
    ]
    codes = (torch.stack(columns).clamp(-8, 7) + 8).to(torch.int32)
    words = torch.zeros(codes.shape[0], codes.shape[1] // PER_WORD, dtype=torch.int32)
    for word in range(words.shape[1]):
        for nibble, output in enumerate(ORDER):
            words[:, word] |= codes[:, PER_WORD * word + output] << (4 * nibble)
    return words


def _seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _log_scale(weight: Tensor, bits: int) -> Tensor:
    """Some reasonable scales: the search for the best takes longer than what is measured."""
    largest = grouped(weight.float(), GROUP_SIZE).abs().amax(dim=-1)
    return (0.8 * largest / code_range(bits)[1]).clamp(min=MIN_SCALE).log()


def _add_scales(source: Path, shapes: Shapes, bits: int) -> None:
    """Make the checkpoint one of quantization-aware training, with random scales of 0.01."""
    skeleton = random_model(shapes, "student", torch.device("meta"))
    linears = quantizable_linears(skeleton, family_of(skeleton.config.model_type).decoder)
    thetas = {
        name: torch.normal(-4.6, 0.2, (layer.out_features, layer.in_features // GROUP_SIZE))
        for name, layer in linears.items()
    }
    save_scales(source, ScaleBank(thetas), bits=bits, group_size=GROUP_SIZE)


def _convert_apart(source: Path, destination: Path, name: str) -> dict[str, float]:
    """Seconds, peak and bytes written of one conversion in a process of its own."""
    command = [sys.executable, "-m", "grace_core.bench.conversion"]
    command += [str(source), str(destination), name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise GraceError(f"the conversion to {name} failed:\n{done.stderr[-2000:]}")
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    for file in destination.iterdir():
        file.unlink()
    destination.rmdir()
    return measured


def _convert(source: Path, destination: Path, name: str) -> dict[str, float]:
    for file in source.iterdir():
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    began = time.perf_counter()
    export_packed(source, destination, AWQ if name == "W4 as AWQ" else COMPRESSED)
    for file in destination.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "peak": _peak(), "written": _weight_bytes(destination)}


def _peak() -> int:
    """The most that this process has had resident, mapped files included."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise GraceError("this system does not tell a process's peak of memory; measure on Linux")


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


if __name__ == "__main__":
    print(json.dumps(_convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])))
