"""`grace reproduce`: what it runs, what it compares, and what it says."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from grace_core.artifacts import Artifact, Parent, new_artifact, read_artifact
from grace_core.config import load_config
from grace_core.errors import ConfigError, GraceError
from grace_core.lineage.collect import artifacts_below, lineage_of
from grace_core.lineage.find import Found, find_model
from grace_core.lineage.published import published_form
from grace_core.models.loading import read_checkpoint
from grace_core.reproduction.inputs import differences
from grace_core.reproduction.plan import Plan, plan_reproduction
from grace_core.reproduction.verdict import judge
from grace_core.stages import StageContext, distill, prepare_data, quantize, release
from grace_core.stages.once import checkpoint_parent
from operations.cli import main
from tests.stand_in_stages import StandIns
from tests.test_lineage import FIT, RECORD, run

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ["world", "data", "bf16", "w4", "release-w4"]

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Cli]:
    """Runs `grace` in this process, in the project root: exit code, standard output and error."""
    monkeypatch.chdir(ROOT)
    before = signal.getsignal(signal.SIGTERM)

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int | None)
        return ended.value.code or 0, out, err

    yield call
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> StandIns:
    stand_ins = StandIns()
    stand_ins.install(monkeypatch)
    return stand_ins


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(file.relative_to(folder)): (file.read_bytes(), file.stat().st_mtime_ns)
        for file in folder.rglob("*")
        if file.is_file()
    }


def test_only_what_the_model_needs_runs_anew_and_is_the_same(
    cli: Cli, stages: StandIns, tmp_path: Path
) -> None:
    made = run(tmp_path / "run")
    before = snapshot(tmp_path / "run")
    call = ("reproduce", "w4", "--root", tmp_path / "run", "--run-dir", tmp_path / "again")
    code, out, _ = cli(*call)
    assert (code, stages.made) == (0, NEEDED)
    assert f"identical: release-w4 {made['release-w4'].digest}" in out
    assert snapshot(tmp_path / "run") == before, "the original is left alone"
    again = {item.manifest.stage: item for item in artifacts_below(tmp_path / "again")}
    assert again.keys() == set(NEEDED)
    for item in again.values():
        for parent in item.manifest.parents.values():
            assert not parent.path.startswith(str(tmp_path / "run")), "nothing of it is used"
    marker = json.loads((tmp_path / "again" / "reproduction.json").read_text())
    assert marker["verdict"]["identical"] is True
    stages.made.clear()
    assert cli(*call)[0] == 0
    assert stages.made == [], "a finished reproduction is not repeated"


def test_a_model_that_comes_out_otherwise_is_told_with_the_first_other_stage(
    cli: Cli, stages: StandIns, tmp_path: Path
) -> None:
    run(tmp_path / "run")
    call = ("reproduce", "w4", "--root", tmp_path / "run", "--run-dir", tmp_path / "again")
    code, out, _ = cli(*call, "--set", "quantize.training.steps=9")
    assert code == 3
    assert "first different stage: w4 (" in out
    assert "files: content" in out
    code, out, _ = cli(*call, "--set", "data.max_tokens=400")
    assert code == 3
    assert "first different stage: data (" in out


def test_a_stopped_reproduction_goes_on_where_it_stopped(
    cli: Cli, stages: StandIns, tmp_path: Path
) -> None:
    run(tmp_path / "run")
    call = ("reproduce", "w4", "--root", tmp_path / "run", "--run-dir", tmp_path / "again")
    stages.fail_at = "w4"
    with pytest.raises(ValueError, match="w4 went wrong"):
        main([str(argument) for argument in call])
    stages.fail_at = None
    stages.made.clear()
    assert cli(*call)[0] == 0
    assert stages.made == ["w4", "release-w4"]


def test_another_run_is_never_taken_for_the_reproduction(
    cli: Cli, stages: StandIns, tmp_path: Path
) -> None:
    run(tmp_path / "run")
    call = ("reproduce", "w4", "--root", tmp_path / "run", "--run-dir")
    code, _, err = cli(*call, tmp_path / "run")
    assert code == 1 and "holds a run that is no reproduction" in " ".join(err.split())
    assert cli("reproduce", "bf16", *call[2:], tmp_path / "again")[0] == 0
    code, _, err = cli(*call, tmp_path / "again")
    assert code == 1 and "reproduction of another model" in " ".join(err.split())
    assert stages.made == ["world", "data", "bf16", "release-bf16"]


def test_differences_beforehand_are_told(
    cli: Cli, stages: StandIns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = run(tmp_path / "run")
    here = made["w4"].manifest.environment
    monkeypatch.setattr(
        "grace_core.reproduction.inputs.environment", lambda: here | {"torch": "0.0.1"}
    )
    monkeypatch.setattr(
        "grace_core.reproduction.inputs.code_version",
        lambda: {"version": made["w4"].manifest.code["version"], "commit": "0123abc"},
    )
    call = ("reproduce", "w4", "--root", tmp_path / "run", "--run-dir", tmp_path / "again")
    code, out, _ = cli(*call)
    assert code == 0, "a difference is told, not an error"
    told = [line for line in out.splitlines() if line.startswith("differs: ")]
    assert f"differs: torch: recorded {here['torch']}, here 0.0.1" in told
    assert any(line.endswith("here 0123abc") for line in told)
    assert any("teacher assets/toy/teacher: recorded" in line for line in told), "a stand-in's"
    assert not any("transformers" in line for line in told)


def test_an_input_that_is_not_there_stops_it_with_a_remedy(
    cli: Cli, stages: StandIns, tmp_path: Path
) -> None:
    run(tmp_path / "run", f"models.teacher.path={tmp_path}/teacher")
    code, _, err = cli(
        "reproduce", "w4", "--root", tmp_path / "run", "--run-dir", tmp_path / "again"
    )
    assert code == 1 and "no checkpoint directory" in err and "give a directory" in err
    assert stages.made == [] and not (tmp_path / "again").exists()


def publish_for_others(tmp_path: Path, *overrides: str) -> Path:
    """A published directory, and nothing else that is left of its run."""
    made = run(tmp_path / "run", *overrides)
    lineage = published_form(lineage_of([made["release-w4"]], made.values()), {})
    folder = tmp_path / "Toy-GRACE-W4G128"
    folder.mkdir()
    content = {"repository": folder.name, "lineage": lineage.model_dump(mode="json")}
    (folder / "grace_manifest.json").write_text(json.dumps(content))
    shutil.rmtree(tmp_path / "run")
    return folder


def test_from_a_published_directory_alone(cli: Cli, stages: StandIns, tmp_path: Path) -> None:
    folder = publish_for_others(tmp_path, FIT)
    call = ("reproduce", folder, "--run-dir", tmp_path / "again")
    assert cli(*call)[0] == 0
    assert stages.made == ["world", "data", "teacher", *NEEDED[2:]]
    code, out, _ = cli(*call, "--set", "seed=3", "--set", "distill.training.steps=7")
    assert code == 3
    assert "first different stage: bf16" in out, "the stand-ins' data know no seed"
    assert "only digests were compared" in out


def test_recorded_outputs_are_made_again_too(cli: Cli, stages: StandIns, tmp_path: Path) -> None:
    folder = publish_for_others(tmp_path, FIT, RECORD)
    assert cli("reproduce", folder, "--run-dir", tmp_path / "again")[0] == 0
    assert stages.made == ["world", "data", "teacher", "teacher-outputs", *NEEDED[2:]]


def test_a_place_that_was_not_published_has_to_be_given(tmp_path: Path) -> None:
    teacher = tmp_path / "private" / "teacher"
    folder = publish_for_others(tmp_path, f"models.teacher.path={teacher}")
    found = find_model(str(folder), tmp_path)
    with pytest.raises(ConfigError, match=r"GRACE_MODELS_TEACHER_PATH is not set; export it, or"):
        plan_reproduction(found, tmp_path / "again")
    plan = plan_reproduction(found, tmp_path / "again", [f"models.teacher.path={teacher}"])
    assert plan.config.models.teacher.path == str(teacher)
    assert not plan.config.publish.enabled


def test_every_stage_has_the_configuration_that_it_was_made_with(tmp_path: Path) -> None:
    """What no fingerprint sees may differ between stages of one model."""
    run(tmp_path / "run", "launch.processes=1", "quantize.variants=[w8]")
    run(tmp_path / "run", "launch.processes=4", "quantize.variants=[w4]")
    plan = plan_reproduction(find_model("w4", tmp_path), None)
    assert [node.stage for node in plan.stages] == NEEDED
    assert plan.configs["bf16"].launch.processes == 1
    assert plan.configs["w4"].launch.processes == 4
    assert plan.run_dir == Path("runs") / f"reproduced-Toy-GRACE-W4G128-{plan.target.digest[:8]}"


def test_what_is_no_model_or_has_no_configuration_is_refused(tmp_path: Path) -> None:
    made = run(tmp_path / "run")
    with pytest.raises(GraceError, match="is no model and no data; name a release"):
        plan_reproduction(find_model("evaluate-w4", tmp_path), None)
    manifest = made["release-w4"].manifest.model_copy(update={"run_config": {}})
    old = Artifact(made["release-w4"].path, manifest)
    with pytest.raises(GraceError, match="before whole configurations were recorded"):
        plan_reproduction(Found(lineage_of([old], [old]), old), None)


def trained_on(folder: Path, start: Parent, role: str) -> Found:
    """A W4 model that was trained on from a quantized checkpoint, in that role."""
    settings = [
        *("quantize.variants=[w4]", f"quantize.start.path={start.path}"),
        f"run_dir={folder}",
    ]
    whole = load_config(ROOT / "configs" / "toy.yaml", settings).model_dump(mode="json")
    made = folder / "artifacts" / "w4-0123456789ab"
    teacher = checkpoint_parent(read_checkpoint(ROOT / "assets/toy/teacher"))
    with new_artifact(made, "w4", {}, {role: start, "teacher": teacher}, whole) as writer:
        (writer.path / "content").write_text("w4")
    return find_model("w4", folder)


ROLES_OF_A_START = ["quantized start", "student"]
"""As it is recorded, and as it once was."""


@pytest.mark.parametrize("role", ROLES_OF_A_START)
def test_a_quantized_start_is_pinned_and_is_not_the_student(tmp_path: Path, role: str) -> None:
    commit = "c" * 40
    start = Parent(kind="checkpoint", path="lab/start", digest="d" * 64, revision=commit)
    plan = plan_reproduction(trained_on(tmp_path / "run", start, role), tmp_path / "again")
    assert plan.config.quantize.start is not None
    assert plan.config.quantize.start.revision == commit
    assert plan.config.models.student.revision is None


@pytest.mark.parametrize("role", ROLES_OF_A_START)
def test_a_quantized_start_is_compared_with_the_recorded_one(
    tmp_path: Path, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    folder = shutil.copytree(ROOT / "assets/toy/student", tmp_path / "start")
    (folder / "quantization.json").write_text("{}")
    start = checkpoint_parent(read_checkpoint(folder))
    plan = plan_reproduction(trained_on(tmp_path / "run", start, role), tmp_path / "again")
    assert not [told for told in differences(plan) if str(start.digest[:12]) in told]
    (folder / "quantization.json").write_text('{"bits": 4}')
    (told,) = [told for told in differences(plan) if str(start.digest[:12]) in told]
    assert told.startswith(f"quantized start {folder}: recorded {start.digest[:12]}, here ")


def weights(folder: Path, values: torch.Tensor, codes: torch.Tensor, note: str) -> Artifact:
    parents = {"data": Parent(kind="data", path="gone", digest="d" * 64)}
    config: dict[str, object] = {"training": {}}
    whole = load_config(ROOT / "configs" / "toy.yaml", [f"run_dir={folder}"]).model_dump(
        mode="json"
    )
    with new_artifact(folder / "artifacts" / "w4-1", "w4", config, parents, whole) as writer:
        (writer.path / "model").mkdir()
        save_file({"a": values, "codes": codes}, writer.path / "model" / "model.safetensors")
        (writer.path / "model" / "note.txt").write_text(note)
    return read_artifact(folder / "artifacts" / "w4-1")


def test_the_verdict_measures_how_far_the_weights_are_off(tmp_path: Path) -> None:
    values, codes = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([[7, -8]], dtype=torch.int8)
    original = weights(tmp_path / "one", values, codes, "same")
    moved = values.clone()
    moved[1] += 0.25
    other = weights(tmp_path / "two", moved, codes, "same")
    config = load_config(ROOT / "configs" / "toy.yaml", [f"run_dir={tmp_path}/two"])
    lineage = lineage_of([original], [original])
    node = lineage.node(lineage.models[0])
    plan = Plan(lineage, node, [node], {"w4": config}, tmp_path / "two")
    verdict = judge(plan, {"w4": other})
    found = verdict.divergence
    assert found is not None and not verdict.identical
    assert found.files == ["model/model.safetensors"]
    assert found.weights == {"max_abs": 0.25, "tensors": 2.0, "different": 1.0}
    assert found.changed_inputs == []
    assert judge(plan, {"w4": original}).identical


@pytest.mark.slow
def test_a_real_model_is_made_again_bit_for_bit(cli: Cli, tmp_path: Path) -> None:
    short = [
        *("data.source.records=64", "quantize.variants=[w4]", "launch.processes=1"),
        *("distill.training.steps=3", "distill.training.row_tokens=512"),
        *("quantize.training.steps=2", "quantize.training.row_tokens=512"),
    ]
    config = load_config(ROOT / "configs" / "toy.yaml", [f"run_dir={tmp_path}/run", *short])
    context = StageContext()
    data = prepare_data(config, context)
    bf16 = distill(config, data, None, context)
    original = release(config, quantize(config, "w4", data, None, bf16, context), context)
    trained = read_artifact(Path(original.manifest.parents["model"].path)).manifest
    assert trained.environment["world_size"] == "1" and trained.environment["cpu"]

    call = ("reproduce", "w4", "--root", tmp_path / "run", "--run-dir", tmp_path / "again")
    code, out, err = cli(*call)
    assert code == 0, out + err
    assert f"identical: release-w4 {original.digest}" in out
    code, out, err = cli(*call, "--set", "quantize.training.learning_rate=1.0e-3")
    assert code == 3, out + err
    assert "first different stage: w4 (" in out
    assert "model/model.safetensors" in out and "tensors differ, by at most" in out
