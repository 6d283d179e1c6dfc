"""Generated answers: those of the library's `generate` to each question alone."""

from __future__ import annotations

import errno
import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from grace_core.errors import GraceError
from grace_core.evaluation.engine import decoding
from grace_core.evaluation.engine.decoding import EagerSteps, State
from grace_core.evaluation.engine.graphs import FixedStep, GraphSteps
from grace_core.evaluation.engine.journal import Journal
from grace_core.evaluation.engine.run import ask_all
from grace_core.evaluation.items import FileSlice, Picture, Question
from grace_core.models.families import Family
from grace_core.models.fused_forward import use_fused_forward
from grace_core.models.kernels import PLAIN
from tests.engine_models import BUDGETS, Loaded, lively, picture, questions
from tests.tiny_models import FAMILIES, save_tiny


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only lose time to a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return Loaded(save_tiny(lively(request.param), tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return Loaded(save_tiny(lively("qwen3_vl"), tmp_path_factory.mktemp("qwen")))


def test_answers_are_those_of_the_library_alone(loaded: Loaded) -> None:
    asked = questions(17)
    found = loaded.answers(asked)
    assert [one.error for one in found] == [None] * len(asked)
    expected = [loaded.alone(question, BUDGETS[question.kind]) for question in asked]
    assert [one.response for one in found] == expected
    assert len(set(expected)) > 10, "a constant answer would prove nothing"


@pytest.mark.parametrize("batch_tokens", [1, 300, 10_000])
def test_answers_do_not_depend_on_the_batch(loaded: Loaded, batch_tokens: int) -> None:
    asked = questions(9)
    assert loaded.answers(asked, batch_tokens) == loaded.answers(asked[::-1])[::-1]


def test_answers_do_not_depend_on_who_leaves_the_batch(
    qwen: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With many tokens that end a turn, rows end at many moments."""
    asked = questions(12)
    budgets = dict.fromkeys(BUDGETS, 14)
    monkeypatch.setattr(qwen.model.generation_config, "eos_token_id", list(range(7, 60)))
    alone = qwen.answers(asked, 1, budgets=budgets)
    kept: list[int] = []
    keep = decoding.KeyValues.keep

    def spy(cache: Any, rows: torch.Tensor, *, padded_to: int) -> None:
        kept.append(len(rows))
        keep(cache, rows, padded_to=padded_to)

    monkeypatch.setattr(decoding.KeyValues, "keep", spy)
    assert qwen.answers(asked, 100_000, budgets=budgets) == alone
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) > 1
    assert len({one.tokens for one in alone}) > 3


def test_steps_of_fixed_shapes_give_the_same_answers(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a CUDA graph: rows and columns are padded, several steps lie between two looks."""
    asked = questions(13)
    budgets = dict.fromkeys(BUDGETS, 14)
    monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", list(range(7, 40)))
    expected = loaded.answers(asked, budgets=budgets)
    shapes: set[tuple[int, int]] = set()

    class Fixed(EagerSteps):
        stride = GraphSteps.stride
        rows = staticmethod(GraphSteps.rows)
        columns = staticmethod(GraphSteps.columns)

        def run(self, state: State, count: int) -> torch.Tensor:
            shapes.add((self._cache.rows, self._cache.columns))
            step = FixedStep(self._decoder, self._cache)
            step.compute()  # as before a capture
            return step.run(state, count)

    monkeypatch.setattr("grace_core.evaluation.engine.generation.EagerSteps", Fixed)
    found = loaded.answers(asked, 100_000, budgets=budgets)
    assert found == expected
    assert {rows for rows, _ in shapes} >= {16, 8}
    assert all(columns % 64 == 0 for _, columns in shapes)


def test_fused_forward_passes_give_the_same_answers(loaded: Loaded, tmp_path: Path) -> None:
    """As on a GPU, with the plain kernels."""
    asked = questions(9)
    expected = loaded.answers(asked)
    family: Family = loaded.family
    fused = Loaded(save_tiny(lively(family.model_type), tmp_path))
    use_fused_forward(fused.model, family, PLAIN)
    assert fused.answers(asked) == expected


def test_each_picture_goes_through_the_vision_tower_once(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = questions(24)
    seen: list[int] = []
    compute = loaded.model.model.get_image_features

    def spy(**arguments: Any) -> Any:
        found = compute(**arguments)
        seen.append(len(found.pooler_output))
        return found

    monkeypatch.setattr(loaded.model.model, "get_image_features", spy)
    loaded.answers(asked, batch_tokens=300)
    assert len(seen) > 1
    assert sum(seen) == 4


def test_features_are_bounded(qwen: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = questions(12)
    expected = qwen.answers(asked)
    monkeypatch.setattr("grace_core.evaluation.engine.generation._FEATURES", {"cpu": 1})
    engine = qwen.engine()
    found = [one for part in engine.answer(engine.plan(asked, 300).batches) for one in part]
    assert sorted(found, key=str) == sorted(expected, key=str)
    assert len(engine._features._held) == 0


def test_a_response_ends_with_the_turn(qwen: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    (question,) = questions(1)
    ends = lambda token: monkeypatch.setattr(  # noqa: E731
        qwen.model.generation_config, "eos_token_id", token
    )
    whole = _tokens(qwen, question)
    assert len(whole) == BUDGETS["mcq"]
    at = next(at for at in range(2, len(whole)) if whole.index(whole[at]) == at)
    ends([whole[at], 5])
    assert _tokens(qwen, question) == whole[:at]
    ends(whole[0])
    assert _tokens(qwen, question) == []


def _tokens(loaded: Loaded, question: Question) -> list[int]:
    engine = loaded.engine()
    prompt = engine._encoder.encode(question)
    (answer,) = engine._generate([prompt], {})
    return answer


def test_an_early_letter_does_not_end_a_response(qwen: Loaded) -> None:
    """Only the budget and the end of the turn do: a later declaration would count."""
    found = qwen.answers(questions(12), budgets=dict.fromkeys(BUDGETS, 9))
    assert {one.tokens for one in found} == {9}


def test_budgets_go_by_kind(qwen: Loaded) -> None:
    asked = questions(12)
    found = qwen.answers(asked, budgets={"mcq": 1, "yesno": 2, "open": 7})
    limit = {"mcq": 1, "yesno": 2, "open": 7}
    assert [one.tokens for one in found] == [limit[question.kind] for question in asked]


def test_generation_settings_of_the_checkpoint_do_not_matter(qwen: Loaded) -> None:
    plain = qwen.answers(questions(4))
    settings = qwen.model.generation_config
    settings.do_sample, settings.repetition_penalty, settings.temperature = True, 5.0, 9.0
    try:
        assert qwen.answers(questions(4)) == plain
    finally:
        settings.do_sample, settings.repetition_penalty, settings.temperature = False, None, None


def test_one_bad_item_costs_no_other_its_answer(qwen: Loaded) -> None:
    good = questions(5)
    whole = picture(3).source
    assert isinstance(whole, bytes)
    bad = [
        Question("broken", "mcq", (Picture(b"no picture"), "What?")),
        Question("cut", "mcq", (Picture(whole[: len(whole) // 2]), "What?")),
        Question("sly", "mcq", (picture(0), "What <|image_pad|>?")),
    ]
    found = qwen.answers([*bad[:2], *good, *bad[2:]])
    errors = {one.item_id: str(one.error) for one in found if one.error is not None}
    assert set(errors) == {"broken", "cut", "sly"}
    assert "none of the formats" in errors["broken"]
    assert "2 picture placeholders" in errors["sly"]
    assert found[2:7] == qwen.answers(good)


def test_what_another_try_may_mend_is_asked_again(
    qwen: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One read of the pack fails, and one question alone finds no memory."""
    pack = tmp_path / "pictures.tar"
    one, other = picture(0).source, picture(1).source
    assert isinstance(one, bytes) and isinstance(other, bytes)
    pack.write_bytes(one + other)
    packed = [
        Picture(FileSlice(pack, start, len(data), hashlib.sha256(data).hexdigest()))
        for start, data in ((0, one), (len(one), other))
    ]
    asked = [
        *(Question(f"one{number}", "mcq", (packed[0], f"What {number}?")) for number in range(3)),
        *(Question(f"two{number}", "mcq", (packed[1], f"What {number}?")) for number in range(3)),
        Question("long", "open", ("What is it? " * 30,)),
    ]
    expected = qwen.answers(asked, 1)
    read, prefill = FileSlice.read, decoding.Decoder.prefill
    times: Counter[str] = Counter()

    def cannot_be_read(piece: FileSlice) -> bytes:
        times[piece.sha256] += 1
        if piece.offset > 0 and times[piece.sha256] > 1:  # the header was read
            raise OSError(errno.EIO, "Input/output error")
        return read(piece)

    def finds_no_memory(decoder: Any, rows: Any, cache: Any) -> torch.Tensor:
        if max(len(row.input_ids) for row in rows) > 100:
            raise torch.cuda.OutOfMemoryError("no memory left")
        return prefill(decoder, rows, cache)

    with monkeypatch.context() as patch:
        patch.setattr(FileSlice, "read", cannot_be_read)
        patch.setattr(decoding.Decoder, "prefill", finds_no_memory)
        with pytest.raises(GraceError, match="run the same again") as caught:
            ask_all(qwen.engine(batch_tokens=1), asked, tmp_path / "work")
    for named in ("4 questions", "no memory left", "Input/output error"):
        assert named in str(caught.value)
    kept = Journal(tmp_path / "work" / "answers").predictions
    assert set(kept) == {"one0", "one1", "one2"}
    assert ask_all(qwen.engine(batch_tokens=1), asked, tmp_path / "work") == expected


def test_a_header_that_cannot_be_read_now_is_nobodys_answer(qwen: Loaded, tmp_path: Path) -> None:
    gone = Question("gone", "mcq", (Picture(tmp_path / "gone.png"), "What?"))
    with pytest.raises(FileNotFoundError):
        ask_all(qwen.engine(), [gone], tmp_path / "work")
    assert Journal(tmp_path / "work" / "answers").predictions == {}


def test_a_batch_that_does_not_fit_is_asked_in_halves(
    qwen: Loaded, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = questions(11)
    expected = qwen.answers(asked)
    tried: list[int] = []
    prefill = decoding.Decoder.prefill

    def refuses_many(decoder: Any, rows: Any, cache: Any) -> torch.Tensor:
        tried.append(len(rows))
        if len(rows) > 3:
            raise torch.cuda.OutOfMemoryError("no memory left")
        return prefill(decoder, rows, cache)

    monkeypatch.setattr(decoding.Decoder, "prefill", refuses_many)
    budgets = dict.fromkeys(BUDGETS, 14)
    assert qwen.answers(asked, 100_000, budgets=budgets) == qwen.answers(asked, 1, budgets=budgets)
    assert tried[:4] == [11, 5, 2, 3]
    assert "asked again in halves" in caplog.text
    assert qwen.answers(asked) == expected


def test_no_questions_no_answers(qwen: Loaded) -> None:
    assert qwen.answers([]) == []
