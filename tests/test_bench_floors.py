"""Floors against values worked by hand from the models' published shapes.

At 790 TFLOP/s and 4.3 TB/s, the rates of one H200, in milliseconds.
"""

from __future__ import annotations

import pytest

from grace_core.bench import floors
from grace_core.bench.floors import Ceilings, ModelWork, Work
from grace_core.bench.shapes import REAL

H200 = Ceilings(790e12, 4.3e12)
TOKENS = 16 * 498


def test_a_sample_has_two_markers_a_picture_a_prompt_and_an_answer() -> None:
    assert REAL.visual_tokens == 196
    assert REAL.sample_tokens == 2 + 196 + 50 + 250 == 498


def test_quantized_weights_are_those_of_28_layers() -> None:
    attention = 2 * 2048 * 2048 + 2 * 2048 * 1024
    assert floors.decoder_weights(REAL.config("student")) == 28 * (attention + 3 * 2048 * 6144)
    assert floors.decoder_weights(REAL.config("student")) == 1_409_286_144


@pytest.mark.parametrize(
    ("head_tokens", "milliseconds"), [(TOKENS, 289.0), (16 * 250, 273.4)], ids=["all", "supervised"]
)
def test_language_part_of_a_step(head_tokens: int, milliseconds: float) -> None:
    """Both decoders and heads alone, the student's decoder recomputed: about 290, and 273."""
    teacher, student = (
        ModelWork.of(REAL.config(role), REAL, 16, head_tokens=head_tokens)
        for role in ("teacher", "student")
    )
    work = Work(
        {
            "teacher": teacher.decoder + teacher.attention + teacher.head,
            "student": 4 * (student.decoder + student.attention) + 3 * student.head,
        }
    )
    assert H200.milliseconds(work) == pytest.approx(milliseconds, abs=0.1)
    # Two samples are an eighth: 36.1 and 34.2.
    assert H200.milliseconds(work.times(1 / 8)) == pytest.approx(milliseconds / 8, abs=0.1)


def test_parts_of_the_teacher() -> None:
    """36 layers of 192.9 M weights; 27 vision blocks over 16 x 784 patches."""
    work = ModelWork.of(REAL.config("teacher"), REAL, 16)
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12288
    assert work.decoder == 2 * TOKENS * 36 * layer
    assert work.attention == 16 * 36 * (4 * 498**2 * 4096) / 2
    assert work.head == 2 * 16 * 250 * 151_936 * 4096
    block = 4 * 1152 * 1152 + 2 * 1152 * 4304
    embedding = 2 * 16 * 784 * 3 * 2 * 16 * 16 * 1152
    attention = 16 * 27 * 4 * 784**2 * 1152
    assert work.vision == 2 * 16 * 784 * 27 * block + attention + embedding
    assert work.connector == 2 * 16 * 196 * (4608 * 4608 + 4608 * 4096)
    assert work.deepstack == 3 * work.connector


def test_a_step_counts_what_is_frozen_once() -> None:
    student = ModelWork.of(REAL.config("student"), REAL, 2)
    training = student.training("student", recomputed=False).operations
    assert training["student vision"] == student.vision
    assert training["student connector"] == 3 * student.connector
    again = student.training("student", recomputed=True).operations
    assert again["student decoder"] - training["student decoder"] == student.decoder
    assert again["student head"] == training["student head"]


def test_floors_by_bytes() -> None:
    weights = 1_409_286_144
    assert H200.milliseconds(floors.fake_quantization(weights, 128)) == pytest.approx(3.3, abs=0.05)
    once, twice = (floors.distillation(4096, 151_936, sweeps=sweeps) for sweeps in (3, 5))
    assert H200.milliseconds(once) == pytest.approx(0.87, abs=0.005)
    assert H200.milliseconds(twice) == pytest.approx(1.45, abs=0.005)


def test_heads_are_products_of_4096_rows() -> None:
    assert H200.milliseconds(floors.heads(REAL, 4096)) == pytest.approx(16.1, abs=0.05)


def test_adamw_reads_four_and_writes_three_and_a_half() -> None:
    assert floors.adamw(10).moved == {"AdamW": 10 * (4 * 4 + 3 * 4 + 2)}


def test_operations_and_bytes_add_up() -> None:
    work = Work({"a": 3e12}, {"b": 5e9}) + Work({"c": 1e12}).times(2)
    assert Ceilings(1e15, 1e12).milliseconds(work) == pytest.approx(5 + 5)
