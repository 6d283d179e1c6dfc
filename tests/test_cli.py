"""The command line: what it runs, what it shows, and how it ends."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file

from grace_core.artifacts import Artifact
from grace_core.cli import findings, main
from grace_core.cli.app import app
from grace_core.cli.live import LiveProgress
from grace_core.config import GraceConfig, load_config
from grace_core.errors import GraceError
from grace_core.events import Event
from grace_core.progress import RunMeter
from grace_core.stages import StageContext
from tests.recorded_evaluations import recorded_files
from tests.stand_in_stages import StandIns

ROOT = Path(__file__).resolve().parent.parent
TOY = str(ROOT / "configs" / "toy.yaml")
REAL = str(ROOT / "configs" / "qwen3vl-8b-to-2b.yaml")
COMMANDS = ("check", "run", "data", "teacher", "distill", "quantize", "release", "evaluate")
RECORD = "teacher_outputs={}"
FIT = "teacher_fit={training: {steps: 3, row_tokens: 1024, rows_per_step: 4}}"

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Cli]:
    """Runs `grace` in this process, in the project root: exit code, standard output and error."""
    monkeypatch.chdir(ROOT)
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int | None)
        return ended.value.code or 0, out, err

    yield run
    signal.signal(signal.SIGTERM, before)


class Scored(StandIns):
    """Evaluations with the file that the results table is read from."""

    def evaluate(
        self, config: GraceConfig, label: str, model: Artifact | None, context: StageContext
    ) -> Artifact:
        context.on_event(
            Event(time.time(), f"evaluate-{label}", 1, "progress", {"done": 1.0, "total": 2.0})
        )
        right = {"baseline": 5}.get(label, 8)
        parent = {} if model is None else {"model": model.as_parent()}
        return self._once(
            config,
            context,
            f"evaluate-{label}",
            {},
            parent,
            files=recorded_files(label, {"toy-choice": [True] * right + [False] * (10 - right)}),
        )


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Scored:
    stand_ins = Scored()
    stand_ins.install(monkeypatch)
    return stand_ins


@pytest.fixture
def to(tmp_path: Path) -> tuple[str, str]:
    """Options that send a run to a folder of its own."""
    return "--set", f"run_dir={tmp_path / 'run'}"


def words(text: str) -> str:
    return " ".join(text.split())


SCORING = ("score", "extract")

GROUPED = (
    "toy",
    "toy world",
    "toy pretrain",
    "bench",
    "bench checkpoint",
    "bench decode",
    "bench memory",
    "bench pipeline",
)


@pytest.mark.parametrize("command", ["", *COMMANDS, "publish", *SCORING, *GROUPED])
def test_help_is_there(cli: Cli, command: str) -> None:
    code, out, _ = cli(*command.split(), "--help")
    assert code == 0
    assert f"Usage: grace {command}".rstrip() in words(out)


def test_examples_are_shown_whole(cli: Cli) -> None:
    """Brackets in them are not taken for markup."""
    shown = 0
    for names, command in every_command(typer.main.get_command(app)):
        if command.epilog is None:
            continue
        out = cli(*names, "--help")[1]
        for line in command.epilog.replace("\\[", "[").splitlines():
            if "grace " in line:
                assert " ".join(line.split()) in words(out)
                shown += 1
    assert shown > 20


def every_command(
    command: Any, names: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield names, command
    for name, below in getattr(command, "commands", {}).items():
        yield from every_command(below, (*names, name))


def test_help_teaches_by_example(cli: Cli) -> None:
    out = words(cli("--help")[1])
    assert "grace run configs/toy.yaml --set seed=3" in out
    for command in (*COMMANDS, "publish", *SCORING):
        assert f" {command} " in out


@pytest.mark.parametrize(
    "arguments",
    [
        ("--version",),
        ("check", TOY),
        ("check", REAL),
        ("quantize", "--help"),
        ("bench", "pipeline", "--help"),
    ],
)
def test_quick_commands_import_nothing_heavy(arguments: tuple[str, ...]) -> None:
    program = f"""
import sys
from grace_core.cli import main
try:
    main({arguments!r})
except SystemExit as end:
    assert not end.code, end
print("heavy:", sorted({{"torch", "transformers", "deepspeed", "datasets"}} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_a_wrong_command_is_a_usage_error(cli: Cli) -> None:
    code, _, err = cli("chek", TOY)
    assert code == 2
    assert "check" in err


def test_check_shows_what_would_run(cli: Cli) -> None:
    code, out, err = cli("check", TOY, "--set", "distill.training.steps=77", "-s", "seed=5")
    assert (code, err) == (0, "")
    shown = words(out)
    assert "seed: 5" in shown and "77 steps" in shown and "4 x 1,024 tokens" in shown
    for stage in ("data", "bf16", "w8", "w4", "release", "evaluate", "publish"):
        assert f"\n {stage} " in out
    assert "The configuration is valid." in out


def test_check_reads_the_sizes_of_the_checkpoints(cli: Cli) -> None:
    expected = 0
    with safe_open(ROOT / "assets/toy/teacher/model.safetensors", "pt") as file:
        for name in file.keys():
            expected += file.get_tensor(name).numel()
    assert f"{expected:,}" in cli("check", TOY)[1]


def test_check_says_what_fits_where(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    sections = ("distill", "quantize")
    gpu = ["-s", "launch.device=cuda"]
    gpu += [word for name in sections for word in ("-s", f"{name}.training.recompute=auto")]
    shown = words(cli("check", TOY, *gpu)[1])
    # Two processes share the optimizer's state; buckets of 2 x 10^9 bytes dwarf the toy models.
    assert "Memory of 1 GPU of 2 in GB, at most, all layers recomputed" in shown
    assert "bf16 w8, w4" in shown
    for row in ("teacher's weights", "W_hat and scales", "+ backward pass", "peak"):
        assert row in shown
    for stage in (1, 2, 3):
        assert f"ZeRO-{stage} {' '.join(['0 of 4'] * 5)}" in shown
    # A GPU smaller than the least.
    monkeypatch.setattr("grace_core.cli.memory.CARDS", (1, 80))
    shown = words(cli("check", TOY, *gpu)[1])
    assert "ZeRO-2 no 0 of 4" in shown
    assert "models.teacher_weights: sharded divides the teacher's 0.0 GB by 2." in shown
    shown = words(cli("check", TOY, *gpu, "-s", "models.teacher_weights=sharded")[1])
    assert "+ teacher's pass" in shown and "divides the teacher's" not in shown
    assert "Memory of" not in cli("check", TOY, "-s", "launch.device=cpu")[1]


def test_check_says_whose_size_is_not_known(cli: Cli) -> None:
    said = words(cli("check", REAL, "-s", "models.student.path=owner/none")[1])
    assert "Memory of a GPU: not known, the weights of models.teacher and models.student" in said


@pytest.mark.parametrize("name", ["qwen3vl-8b-to-2b", "toy", "tuxpaint"])
def test_check_accepts_the_shipped_configurations(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delenv("GRACE_DATA_ROOT", raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    code, out, err = cli("check", f"configs/{name}.yaml")
    assert (code, err) == (0, "")
    assert "The configuration is valid." in out


def test_check_accepts_the_real_recipe_anywhere_and_warns(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GRACE_DATA_ROOT", raising=False)
    monkeypatch.setattr(findings, "_GPUS", tmp_path / "no-driver")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    code, out, err = cli("check", REAL)
    assert (code, err) == (0, "")
    shown = words(out)
    assert "warning: models.teacher: Qwen/Qwen3-VL-8B-Instruct is not on this machine" in shown
    assert "warning: data.source: not on this machine: data/sharegpt4v" in shown
    assert "warning: launch.device: no NVIDIA GPU on this machine" in shown


def test_check_lists_all_problems_without_a_traceback(cli: Cli) -> None:
    code, out, err = cli("check", TOY, "-s", "seed=-1", "-s", "distill.training.stesp=3")
    assert (code, out) == (1, "")
    assert "2 problems" in err
    assert "seed: " in err
    assert "distill.training.stesp: unknown key; did you mean 'steps'?" in err
    assert "Traceback" not in err


def test_check_tells_a_wrong_folder(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = cli("check", TOY)
    assert code == 1
    assert "models.teacher.path: no folder assets/toy/teacher here" in err
    assert "models.student.path: no folder assets/toy/student here" in err


def toy_config(*overrides: str) -> GraceConfig:
    return load_config(TOY, overrides)


def found_problems(config: GraceConfig) -> list[str]:
    with pytest.raises(GraceError) as raised:
        findings.check_machine(config, "test")
    return raised.value.problems  # type: ignore[attr-defined]


@pytest.fixture
def student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the toy student without its weights."""
    monkeypatch.chdir(ROOT)
    folder = tmp_path / "student"
    shutil.copytree("assets/toy/student", folder, ignore=lambda *_: {"model.safetensors"})
    return folder


def edit_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    fields = json.loads(file.read_text())
    change(fields)
    file.write_text(json.dumps(fields))


def test_checkpoints_that_cannot_work_are_found_together(student: Path) -> None:
    save_file({"w": torch.zeros(2, 3), "v": torch.zeros(())}, student / "model.safetensors")
    edit_json(student / "config.json", lambda c: c["text_config"].update(vocab_size=513))
    edit_json(student / "config.json", lambda c: c["text_config"].update(hidden_size=96))
    config = toy_config(f"models.student.path={student}", "data.min_pixels=16384")
    config = config.model_copy(update={"data": config.data.model_copy(update={"max_tokens": 64})})
    vocabulary, group, pixels = found_problems(config)
    assert "512 entries" in vocabulary and "513" in vocabulary
    assert "(128) does not divide the student's hidden_size 96" in group
    assert pixels.startswith("data.min_pixels (16384) makes at least 64 tokens")


def test_parameters_are_counted_from_the_header(student: Path) -> None:
    save_file({"w": torch.zeros(2, 3), "v": torch.zeros(())}, student / "a.safetensors")
    save_file({"u": torch.zeros(5)}, student / "b.safetensors")
    found = findings.check_machine(toy_config(f"models.student.path={student}"), "test")
    assert found.student.parameters == 2 * 3 + 1 + 5


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (None, "holds no *.safetensors"),
        (b"\xff" * 32, "is no readable Hugging Face checkpoint"),
        (b"\x01", "is no readable Hugging Face checkpoint"),
        (b"\x04" + b"\x00" * 7 + b"{{{{", "is no readable Hugging Face checkpoint"),
    ],
)
def test_damaged_checkpoints_are_named(student: Path, weights: bytes | None, said: str) -> None:
    if weights is not None:
        (student / "model.safetensors").write_bytes(weights)
    (problem,) = found_problems(toy_config(f"models.student.path={student}"))
    assert problem.startswith("models.student.path") and said in problem


@pytest.mark.parametrize(
    ("overrides", "gpus", "said"),
    [
        (["launch.device=cuda"], 0, "no NVIDIA GPU"),
        (["launch.device=cuda"], 1, "2 processes, but 1 GPUs"),
        (["launch.device=auto", "launch.threads_per_process=999"], 0, "1998 threads"),
        (["distill.objective.relational.warmup_steps=150"], 0, "omega never reaches 3"),
        (["publish.destination={kind: hub, namespace: me}"], 0, "HF_TOKEN is not set"),
        (["data.max_pixels=200704"], 0, "its record goes to quarantine"),
        (["models.teacher.path=owner/teacher"], 0, "pin `revision`"),
        (["data.source={kind: sharegpt4v, root: /none, annotations: [a]}"], 0, "GRACE_DATA_ROOT"),
    ],
)
def test_what_is_not_here_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, overrides: list[str], gpus: int, said: str
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(findings, "_GPUS", tmp_path / "gpus")
    for number in range(gpus):
        (tmp_path / "gpus" / str(number)).mkdir(parents=True)
    assert not [w for w in findings.check_machine(toy_config(), "test").warnings if said in w]
    assert [w for w in findings.check_machine(toy_config(*overrides), "test").warnings if said in w]


def test_run_runs_every_stage_once_and_shows_the_results(
    cli: Cli, stages: Scored, to: tuple[str, str], tmp_path: Path
) -> None:
    code, out, err = cli("run", TOY, *to, "--set", FIT)
    assert (code, err) == (0, "")
    expected = ["benchmarks", "world", "data", "teacher", "bf16", "w8", "w4"]
    expected += [f"release-{label}" for label in ("bf16", "w8", "w4")]
    expected += [f"evaluate-{label}" for label in ("teacher", "baseline", "bf16", "w8", "w4")]
    assert stages.made == [*expected, "report", "publish"]
    assert "GRACE W4G128" in out and "+30.0" in out and "100.0 %" in out
    (publication,) = (tmp_path / "run" / "artifacts").glob("publish-*")
    assert f"Results: {publication / 'results.json'}" in out
    (report,) = (tmp_path / "run" / "artifacts").glob("report-*")
    assert f"Report: {report / 'index.html'}" in out
    assert out.count("done  ") == len(expected) + 2  # and report, and publish


def test_run_again_keeps_everything(cli: Cli, stages: Scored, to: tuple[str, str]) -> None:
    cli("run", TOY, *to)
    stages.made.clear()
    code, out, _ = cli("run", TOY, *to)
    assert (code, stages.made) == (0, [])
    assert "done  " not in out
    assert out.count("kept  ") == 16  # as many as are made above, but no teacher


@pytest.mark.parametrize(
    ("command", "made"),
    [
        (["data"], ["world", "data"]),
        (["teacher", "-s", FIT], ["world", "data", "teacher"]),
        (["teacher", "-s", RECORD], ["world", "data", "teacher-outputs"]),
        (["distill"], ["world", "data", "bf16"]),
        (
            ["distill", "-s", RECORD, "-s", FIT],
            ["world", "data", "teacher", "teacher-outputs", "bf16"],
        ),
        (
            ["quantize", "--variant", "w4", "-s", RECORD],
            ["world", "data", "teacher-outputs", "bf16", "w4"],
        ),
        (["quantize", "--variant", "w4"], ["world", "data", "bf16", "w4"]),
        (["quantize"], ["world", "data", "bf16", "w8", "w4"]),
        (
            ["release", "-s", "quantize.variants=[w8]"],
            ["world", "data", "bf16", "w8", "release-bf16", "release-w8"],
        ),
    ],
)
def test_a_stage_command_runs_what_it_needs_and_no_more(
    cli: Cli, stages: Scored, to: tuple[str, str], command: list[str], made: list[str]
) -> None:
    code, out, _ = cli(command[0], TOY, *to, *command[1:])
    assert code == 0
    assert stages.made == made
    assert made[-1] in out


def test_evaluate_and_publish_share_what_they_need(
    cli: Cli, stages: Scored, to: tuple[str, str]
) -> None:
    assert "Baseline" in cli("evaluate", TOY, *to)[1]
    stages.made.clear()
    assert "Released models" in cli("publish", TOY, *to)[1]
    assert stages.made == ["publish"]


def test_teacher_without_its_section_says_so(cli: Cli, stages: Scored, to: tuple[str, str]) -> None:
    code, _, err = cli("teacher", TOY, *to)
    assert (code, stages.made) == (1, [])
    assert "no section teacher_fit" in err and "Traceback" not in err
    assert "continue with" not in err, "the same command would be refused again"


def test_an_unknown_variant_is_a_problem_of_the_configuration(cli: Cli) -> None:
    code, _, err = cli("quantize", TOY, "--variant", "w5")
    assert code == 1
    assert "quantize.variants.0: 'w5' is not known; use one of w8, w4" in err


def test_a_users_mistake_within_a_stage_is_told_without_traceback(
    cli: Cli, stages: Scored, to: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise GraceError("the disk is [full]")

    monkeypatch.setattr("grace_core.stages.distill", fail)
    code, out, err = cli("distill", TOY, *to)
    assert code == 1
    assert err.startswith("error: the disk is [full]\nstage bf16 failed: error\n")
    assert "kept: finished stages: world, data" in err
    assert err.endswith(f"continue with:\n  grace distill {TOY} {' '.join(to)}\n")
    assert "done  data" in out
    report = json.loads((Path(to[1].removeprefix("run_dir=")) / "failure.json").read_text())
    assert (report["stage"], report["cause"]) == ("bf16", "the disk is [full]")


def test_a_bug_keeps_its_traceback(
    stages: Scored, to: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    before = signal.getsignal(signal.SIGTERM)
    stages.fail_at = "bf16"
    try:
        with pytest.raises(ValueError, match="bf16 went wrong") as caught:
            main(["distill", TOY, *to])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "continue with:\n  grace distill" in caught.value.__notes__[0]


def test_a_report_that_cannot_be_written_hides_nothing(
    cli: Cli, stages: Scored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "failure.json").mkdir()

    def fail(*_: object) -> None:
        raise GraceError("the reason")

    monkeypatch.setattr("grace_core.stages.distill", fail)
    code, _, err = cli("distill", TOY, "--set", f"run_dir={tmp_path / 'run'}")
    assert code == 1
    assert "error: the reason" in err and "continue with:" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_cleanly_and_the_same_command_continues(
    cli: Cli,
    stages: Scored,
    to: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    # Shells start background commands with SIGINT ignored, this test's process among them.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr("grace_core.stages.distill", lambda *_: os.kill(os.getpid(), number))
            code, _, err = cli("distill", TOY, *to)
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert code == 130
    assert "interrupted; the same command continues" in err and "Traceback" not in err
    assert "stage bf16 was cancelled" in err
    failure = Path(to[1].removeprefix("run_dir=")) / "failure.md"
    assert f"grace distill {TOY} {' '.join(to)}" in failure.read_text()
    code, out, _ = cli("distill", TOY, *to)
    assert code == 0
    assert not failure.exists() and not failure.with_suffix(".json").exists()
    assert "kept  data" in out and "done  bf16" in out
    assert stages.made == ["world", "data", "bf16"]


def test_progress_shows_step_loss_and_bar_in_a_terminal(stages: Scored, tmp_path: Path) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=160, color_system=None)
    config = toy_config(f"run_dir={tmp_path}")
    with LiveProgress(console, RunMeter(config, "distill")) as progress:
        progress.started("bf16")
        values = {"steps": 8.0, "cross_entropy": 1.23456, "beta": 0.5, "seconds": 1.0}
        began = time.time() + 1
        progress.on_event(Event(began, "bf16", 1, "train", values))
        progress.on_event(Event(began + 11, "bf16", 2, "train", values))
        progress._progress.refresh()
        progress.ended("bf16", stages.generate_world(config, StageContext()))
    shown = screen.getvalue()
    assert "step 2/8" in shown and "cross_entropy 1.235" in shown and "beta 0.500" in shown
    assert "bf16 (stage 3 of 3)" in shown
    assert "1:06 left" in shown  # six steps of eleven seconds
    assert "done  bf16" in shown


def test_progress_writes_a_line_now_and_then_where_the_output_is_a_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    screen = io.StringIO()
    now = [100.0]
    monkeypatch.setattr("grace_core.cli.live.time.monotonic", lambda: now[0])
    with LiveProgress(Console(file=screen, width=160), RunMeter()) as progress:
        progress.started("bf16")
        for step in range(1, 61):  # one second each
            now[0] += 1
            values = {"steps": 60.0, "cross_entropy": 1.0}
            progress.on_event(Event(0.0, "bf16", step, "train", values))
    lines = screen.getvalue().splitlines()
    assert [line.split()[2:4] for line in lines] == [
        ["step", f"{step}/60"] for step in (15, 30, 45, 60)
    ]


def test_toy_world_writes_records_and_benchmarks(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "world"
    code, out, _ = cli("toy", "world", str(folder), "--records", "3", "--seed", "4")
    assert code == 0
    records = json.loads((folder / "train.json").read_text())
    assert len(records) == 3
    assert all((folder / record["image"]).is_file() for record in records)
    for line in out.splitlines():
        assert Path(line).exists()
    assert (folder / "toy-choice" / "items.jsonl").is_file()


def test_toy_pretrain_passes_its_arguments_on(cli: Cli, tmp_path: Path) -> None:
    code, _, err = cli("toy", "pretrain", "student", str(tmp_path), "--seed", "1")
    assert code == 1
    assert f"{tmp_path} exists" in err
    assert cli("toy", "pretrain", "pupil", str(tmp_path))[0] == 2
