"""How large the benchmarks' pictures are when a model sees them, and where that is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grace_core.artifacts import Artifact
from grace_core.evaluation.engine import generation
from grace_core.stages.evaluation import evaluate
from grace_core.stages.once import StageContext
from tests.evaluation_process import toy_config

PATCH = 8  # pixels of a side, of the toy student's checkpoint


def test_limits_are_the_checkpoints_unless_the_evaluation_has_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever `data.max_pixels` is; the toy student's own are 4096 and 16384."""
    seen: list[int] = []
    read = generation.read_pixels

    def spy(*arguments: Any) -> Any:
        pixels = read(*arguments)
        _, rows, columns = pixels.grid
        seen.append(rows * columns * PATCH**2)
        return pixels

    monkeypatch.setattr(generation, "read_pixels", spy)

    def evaluated(*settings: str) -> tuple[Artifact, list[int]]:
        small = ("evaluation.items=2", "data.min_pixels=1024", "data.max_pixels=1024")
        seen.clear()
        config = toy_config(tmp_path, *small, *settings)
        made = evaluate(config, "baseline", None, StageContext())
        assert seen
        return made, json.loads((made.path / "results.json").read_text())["pixels"]

    own, limits = evaluated()
    assert limits == [4096, 16384]
    assert all(4096 <= count <= 16384 for count in seen)
    fewer, limits = evaluated("evaluation.min_pixels=1024", "evaluation.max_pixels=2304")
    assert limits == [1024, 2304]
    assert all(1024 <= count <= 2304 for count in seen)
    assert fewer.path != own.path, "one does not stand for the other"
