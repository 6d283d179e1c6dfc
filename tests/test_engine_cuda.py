"""The generation engine on a GPU, CUDA graphs included.

pytest tests/test_engine_cuda.py
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from grace_core.evaluation.engine.graphs import GraphSteps
from tests.engine_models import BUDGETS, Loaded, lively, questions
from tests.tiny_models import FAMILIES, save_tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.fixture(autouse=True)
def _full_precision() -> Iterator[None]:
    """cuDNN rounds fp32 convolutions to TF32 unless told not to."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(lively(request.param), tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("graphs", [True, False])
def test_answers_are_those_of_the_library_alone(
    folder: Path, graphs: bool, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = Loaded(folder, "cuda")
    asked = questions(17)
    with caplog.at_level(logging.WARNING):
        found = loaded.answers(asked, graphs=graphs)
    assert [one.error for one in found] == [None] * len(asked)
    assert "without CUDA graphs" not in caplog.text
    expected = [loaded.alone(question, BUDGETS[question.kind]) for question in asked]
    assert [one.response for one in found] == expected


def test_graphs_are_captured_and_used_for_every_size(folder: Path) -> None:
    loaded = Loaded(folder, "cuda", torch.bfloat16)
    asked = questions(40)
    engine = loaded.engine(budgets=dict.fromkeys(BUDGETS, 20))
    for part in engine.answer(engine.plan(asked, 1200).batches):
        assert [one.error for one in part] == [None] * len(part)
    steps = engine._steps
    assert isinstance(steps, GraphSteps)
    assert steps._obstacle is None
    assert len(steps._held) > 1
