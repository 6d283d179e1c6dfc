"""The bench of conversions: what it compares computes the same, and what it writes down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from grace_core.bench.conversion import (
    Conversion,
    ConversionTable,
    Packing,
    measure_conversions,
    plain_awq,
)
from grace_core.bench.shapes import TOY
from grace_core.cli.app import app
from grace_core.quantization.awq import pack_awq
from grace_core.quantization.lsq import quantize


def test_the_loop_gives_the_same_words() -> None:
    weight = torch.randn(24, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    scale = torch.full((24, 2), 0.25, dtype=torch.bfloat16)
    assert torch.equal(plain_awq(weight, scale), pack_awq(quantize(weight, scale, 4, 128)))


@pytest.mark.slow
def test_each_conversion_is_made_apart_and_removed(tmp_path: Path) -> None:
    found = list(measure_conversions(TOY, tmp_path, repeats=1))
    assert [one.name for one in found] == ["W4", "W8", "W4 as AWQ"]
    w4, w8, awq = (one.written for one in found)
    assert w4 < w8 and w4 < awq < w8  # zero points take a little more
    assert all(one.peak > one.read and one.seconds > 0 for one in found)
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


def test_the_table_says_how_it_was_measured() -> None:
    table = ConversionTable(
        {"cpu": "a CPU"},
        2,
        [Conversion("W4", 12.34, 3, peak=1_200_000_000, read=4_000_000_000, written=2_000_000_000)],
        [Packing("W4 as AWQ", ours=0.1, plain=2.0)],
    )
    text = table.to_markdown()
    assert text.startswith("conversion on 2 cores of a CPU\n")
    assert "| W4 | 12.3 | best of 3 | 1.20 | 0.30 | 2.00 |" in text
    assert "100 ms; column by column 2.00 s, 20 times" in text
    assert json.loads(table.to_json())["conversions"][0]["seconds"] == 12.34


@pytest.mark.slow
def test_on_the_command_line(tmp_path: Path) -> None:
    arguments = ["bench", "convert", "--shapes", "toy", "--repeats", "1", "--output", str(tmp_path)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "W4 as AWQ" in (tmp_path / "convert.md").read_text()
