"""The bench on toy shapes: both implementations do the same work; failures stay in their row."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from grace_core.bench import run
from grace_core.bench.cases import Case, Goal, Prepared, cases
from grace_core.bench.decode import DecodeLine, DecodeTable
from grace_core.bench.floors import Ceilings
from grace_core.bench.measure import Measured, Meter, Runner
from grace_core.bench.random_models import save_random_checkpoint, tokenizer_of
from grace_core.bench.samples import RandomRows, folder_without_weights
from grace_core.bench.shapes import REAL, REAL_TOKENS, TOY
from grace_core.bench.table import BenchTable, Floor, Line
from grace_core.bench.workbench import Workbench
from grace_core.cli.app import app
from grace_core.data.chat import ConversationEncoder
from grace_core.data.sharegpt4v import IMAGE_TAG, Turn
from grace_core.errors import GraceError
from grace_core.models.loading import load_tokenizer, read_checkpoint

CPU = torch.device("cpu")


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    return Workbench(TOY, CPU, tmp_path / "bench", dtype=torch.float32)


def gradients(bench: Workbench) -> dict[str, torch.Tensor]:
    return {
        name: parameter.grad.clone()
        for name, parameter in bench.student.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("quantized", [False, True])
def test_both_implementations_compute_the_same(bench: Workbench, quantized: bool) -> None:
    (row,) = bench.rows(TOY.samples, 1)
    batch = bench.batch(row, TOY.samples)
    (case,) = (c for c in cases(bench) if c.name == ("w4-step-alone" if quantized else "bf16-step"))
    with case.prepare(bench) as prepared:
        prepared.ours.reset()
        ours = prepared.ours.run()
        of_ours = gradients(bench)
        prepared.plain.reset()
        plain = prepared.plain.run()
        of_plain = gradients(bench)
    assert ours is not None and plain is not None
    assert len(batch.labels) == TOY.samples * TOY.supervised_tokens
    assert float(ours) == pytest.approx(float(plain), rel=1e-5)
    assert of_ours.keys() == of_plain.keys()
    assert of_ours
    for name, gradient in of_plain.items():
        gap = torch.linalg.vector_norm(of_ours[name] - gradient)
        assert gap <= 1e-3 * torch.linalg.vector_norm(gradient) + 1e-7, name


def test_models_are_put_back_after_a_quantized_row(bench: Workbench) -> None:
    before = [type(m) for m in (*bench.student.modules(), *bench.plain_student.modules())]
    with bench.quantized():
        pass
    assert before == [type(m) for m in (*bench.student.modules(), *bench.plain_student.modules())]


def test_layers_are_recomputed_until_the_memory_goal_is_kept(tmp_path: Path) -> None:
    """9 GiB less 3.4 for bf16 gradients of the trained weights; a layer keeps 0.7 GiB and more."""
    real = Workbench(REAL, CPU, tmp_path / "real")
    assert 7 < real.recomputed_layers(16) < 28
    assert real.recomputed_layers(2) == 0
    assert Workbench(REAL, CPU, tmp_path / "none", recompute=0).recomputed_layers(16) == 0


def test_weights_are_held_once(bench: Workbench) -> None:
    ours, plain = dict(bench.student.named_parameters()), bench.plain_student.named_parameters()
    assert all(parameter is ours[name] for name, parameter in plain)
    assert bench.plain_student.lm_head.weight is bench.student.lm_head.weight


def test_rotary_frequencies_are_those_of_an_ordinary_model(bench: Workbench) -> None:
    ordinary = AutoModelForImageTextToText.from_config(TOY.config("student"))
    for name, buffer in ordinary.named_buffers():
        made = bench.student.get_buffer(name)
        assert made.dtype == torch.float32
        assert torch.equal(made, buffer), name


def test_rows_have_the_tokens_that_the_shapes_say(tmp_path: Path) -> None:
    folder = folder_without_weights(tmp_path / "student", REAL, "student")
    row = RandomRows(REAL, folder).row(2)
    assert row.input_ids.shape == (1, 996)
    assert row.visual_spans == [(1, 196), (499, 196)]
    assert len(row.labels) == 500
    assert row.pictures["pixel_values"].shape == (2 * 784, 3 * 2 * 16 * 16)


def test_real_tokenizer_has_the_published_control_tokens(tmp_path: Path) -> None:
    tokenizer_of(REAL).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    names = list(REAL_TOKENS)
    assert tokenizer.convert_tokens_to_ids(names) == list(REAL_TOKENS.values())
    assert tokenizer.eos_token_id == REAL_TOKENS["<|im_end|>"]
    turns = [Turn("user", f"{IMAGE_TAG}\nWhat is it?"), Turn("assistant", "A red square.")]
    encoded = ConversationEncoder(tokenizer, REAL_TOKENS["<|image_pad|>"]).encode(turns, [3])
    assert encoded.input_ids.count(REAL_TOKENS["<|image_pad|>"]) == 3
    answer = [t for t, s in zip(encoded.input_ids, encoded.labels_mask, strict=True) if s]
    assert tokenizer.decode(answer) == "A red square.<|im_end|>"
    assert tokenizer.decode([5000, *answer, 151_000]) == "A red square.<|im_end|>"


def test_a_random_checkpoint_is_an_ordinary_one(tmp_path: Path) -> None:
    folder = tmp_path / "student"
    save_random_checkpoint(folder, TOY, "student", CPU, seed=3)
    assert read_checkpoint(folder).family.model_type == "qwen3_vl"
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert float(model.lm_head.weight.detach().float().std()) == pytest.approx(0.02, rel=0.05)
    with pytest.raises(GraceError, match="exists already"):
        save_random_checkpoint(folder, TOY, "student", CPU, seed=3)


def broken_case(title: str) -> Case:
    @contextmanager
    def prepare(_bench: Workbench) -> Iterator[Prepared]:
        raise torch.OutOfMemoryError("tried to allocate too much")
        yield

    return Case("broken", title, Goal(), prepare)


def test_a_row_that_fails_leaves_the_others(tmp_path: Path) -> None:
    bench = run.Bench("toy", CPU, tmp_path / "bench", repeats=2)
    bench.cases = [broken_case("cannot be made"), *(c for c in bench.cases if c.name == "gdkd")]
    *_, table = bench.run(["broken", "gdkd"])
    broken, gdkd = table.lines
    assert table.failed
    assert broken.ours is None
    assert broken.failures == ("OutOfMemoryError: tried to allocate too much",)
    assert gdkd.ours is not None
    assert "broken failed: OutOfMemoryError" in table.to_markdown()


def test_an_implementation_that_fails_leaves_the_other() -> None:
    def fail() -> None:
        raise RuntimeError("no such kernel")

    meter = Meter(CPU, repeats=2)
    assert meter.measure(Runner(lambda: torch.ones(()), lambda: None)).loss == 1.0
    with pytest.raises(RuntimeError, match="no such kernel"):
        meter.measure(Runner(fail, lambda: None))


def test_a_profile_names_operations(tmp_path: Path) -> None:
    bench = run.Bench("toy", CPU, tmp_path / "bench", repeats=2)
    assert "aten::_log_softmax" in bench.profile("gdkd")


def test_unknown_rows_are_named(tmp_path: Path) -> None:
    bench = run.Bench("toy", CPU, tmp_path / "bench", repeats=2)
    with pytest.raises(GraceError, match="no row speed; the rows are bf16-step"):
        next(bench.run(["speed"]))


def line(milliseconds: float, memory: float | None) -> Line:
    return Line(
        "gdkd",
        "GDKD alone",
        Goal(4, 1.5),
        floor=Floor(2.0, 3.0, {}, {}),
        ours=Measured(milliseconds, milliseconds, milliseconds, 2, memory, 1.0),
        plain=Measured(60.0, 59.0, 61.0, 2, 15.0, 1.001),
    )


@pytest.mark.parametrize(
    ("milliseconds", "memory", "met"), [(4.0, 1.5, True), (4.1, 1.0, False), (3.0, 1.6, False)]
)
def test_goals_are_of_time_and_memory(milliseconds: float, memory: float, met: bool) -> None:
    assert line(milliseconds, memory).met is met


def test_what_a_line_says_in_proportion() -> None:
    of_line = line(5.0, 1.0)
    assert of_line.speed_up == 12.0
    assert of_line.of_floor == 2.5
    assert of_line.loss_gap == pytest.approx(0.001, rel=0.01)


def test_throughput_beside_one_gpu(tmp_path: Path) -> None:
    step = Line("training-step", "", None, ours=Measured(1000.0, 1, 1, 2, None, None), tokens=900)
    table = BenchTable("real", "a GPU", {}, 2, 0, Ceilings(1.0, 1.0), [step])
    alone = tmp_path / "bench.json"
    alone.write_text(
        BenchTable("real", "a GPU", {}, 1, 0, Ceilings(1.0, 1.0), [line(1, 1), step]).to_json()
    )
    assert "100.0 % of one process's" in table.compared_with(alone).to_markdown()
    alone.write_text("{}")
    with pytest.raises(GraceError, match="holds no training step"):
        table.compared_with(alone)


@pytest.mark.slow
def test_the_whole_bench_on_a_cpu(tmp_path: Path) -> None:
    options = ["bench", "--shapes", "toy", "--device", "cpu", "--repeats", "2"]
    done = CliRunner().invoke(app, [*options, "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "bench.json").read_text())
    assert [row["name"] for row in found["lines"]] == [
        "bf16-step",
        "w4-step",
        "w4-step-alone",
        "w4-micro-step",
        "gdkd",
        "heads",
        "fake-quantization",
        "training-step",
    ]
    for row in found["lines"]:
        assert row["ours"]["milliseconds"] > 0, row
        assert row["plain"]["milliseconds"] > 0, row
        assert row["floor"]["milliseconds"] > 0, row
        assert row["goal"] is None, "goals are for one H200"
        assert row["loss_gap"] is None or row["loss_gap"] < 2e-3, row
    assert found["lines"][-1]["tokens_per_second"] > 0
    assert (tmp_path / "bench.md").read_text().count("\n| ") == 1 + 1 + 8


def test_decoding_is_measured(tmp_path: Path) -> None:
    """Every row of toy shapes on a CPU, and the table as JSON and Markdown."""
    arguments = ["--shapes", "toy", "--device", "cpu", "--weights", "bf16,w4", "--batches", "2"]
    result = CliRunner().invoke(app, ["bench", "decode", *arguments, "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    table = json.loads((tmp_path / "decode.json").read_text())
    found = [(line["weights"], line["what"], line["batch"]) for line in table["lines"]]
    rows = [("decode", 2), ("prefill", 1), ("prefill of the decoder", 1)]
    assert found == [(weights, *row) for weights in ("bf16", "w4") for row in rows]
    for line in table["lines"]:
        assert line["eager"] > 0 and line["graph"] is None and line["failures"] == []
        assert line["tokens_per_second"] == pytest.approx(1e3 * line["tokens"] / line["eager"])
    sizes = {line["weights"]: line["weights_gib"] for line in table["lines"]}
    assert sizes["w4"] < sizes["bf16"]
    text = (tmp_path / "decode.md").read_text()
    assert "| w4 | decode | 2 |" in text and "w4, decode, batch 2, against bf16: eager" in text


def test_decoding_is_asked_for_by_known_names(tmp_path: Path) -> None:
    for arguments, said in ((["--weights", "w3"], "w3"), (["--batches", "1,x"], "'x'")):
        with pytest.raises(GraceError, match=said):
            CliRunner().invoke(
                app,
                ["bench", "decode", "--device", "cpu", *arguments],
                catch_exceptions=False,
            )


def test_the_table_of_decoding_shows_failures_and_ratios() -> None:
    lines = [
        DecodeLine("bf16", "decode", 1, eager=4.0, graph=2.0, floor=1.0, tokens=1, weights_gib=4.0),
        DecodeLine("w4", "decode", 1, eager=4.0, graph=1.0, floor=0.5, tokens=1, weights_gib=2.0),
        DecodeLine("w4", "decode", 2, failures=("OutOfMemoryError: all of it",)),
    ]
    table = DecodeTable("a model", "a device", {"torch": "2"}, 4e12, lines)
    assert table.failed and lines[1].of_floor == 2.0 and lines[1].tokens_per_second == 1e3
    text = table.to_markdown()
    assert "against bf16: eager 1.00 x, CUDA graph 2.00 x, weights 50.0 %" in text
    assert "w4, decode, batch 2 failed: OutOfMemoryError: all of it" in text
