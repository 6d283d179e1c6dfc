"""The checks before a run: packages, models, data, and the commands that ask all of them."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from grace_core.config import GraceConfig
from grace_core.config.data import ShareGPT4VData
from grace_core.doctor import dataset
from grace_core.doctor.dataset import check_data, estimated_size, estimated_text
from grace_core.doctor.examination import examine
from grace_core.doctor.findings import (
    Finding,
    NotReady,
    Severity,
    as_rows,
    ok,
    problem,
    require_no_problem,
    warning,
)
from grace_core.doctor.models import check_models
from grace_core.doctor.versions import check_versions
from tests.findings import ROOT, models, one, severities, toy


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


# Findings and how they are shown


def test_problems_are_raised_together_with_their_remedies() -> None:
    require_no_problem([ok("disk", "room"), warning("data", "odd", "look")])
    with pytest.raises(NotReady) as raised:
        require_no_problem([problem("disk", "full", "free some"), problem("hub", "away", "wait")])
    assert str(raised.value).splitlines() == [
        "2 problems found before the start; nothing was run",
        "  - disk: full; free some",
        "  - hub: away; wait",
    ]


def test_a_finding_that_asks_for_action_says_which() -> None:
    with pytest.raises(AssertionError, match="no remedy: full"):
        problem("disk", "full", "")


# Installed packages


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a distribution, of metadata alone, in front of what is installed."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))

    def add(name: str, version: str, *requires: str) -> None:
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir()
        lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {r}" for r in requires)]
        (info / "METADATA").write_text("Metadata-Version: 2.1\n" + "\n".join(lines) + "\n")

    return add


def test_the_installed_packages_are_sound() -> None:
    assert Severity.PROBLEM not in severities(check_versions())


def test_a_version_that_breaks_prefect_is_a_problem(install: Callable[..., None]) -> None:
    install("fastapi", "0.165.0")
    finding = one(check_versions(), Severity.PROBLEM, "fastapi 0.165.0 is outside <0.151,>=0.139")
    assert "Prefect server does not start" in finding.text
    assert "pip install 'fastapi<0.151,>=0.139'" in finding.remedy


def test_other_versions_than_the_locked_ones_are_a_warning(tmp_path: Path) -> None:
    lock = tmp_path / "requirements.lock"
    lock.write_text("# comment\nrich==1.0\nno-such-package==2.0\n")
    finding = one(check_versions(lock), Severity.WARNING, "2 of 2 packages differ")
    assert "(locked 1.0)" in finding.text and "no-such-package absent" in finding.text
    # The CPU build carries a local version, which is no difference.
    lock.write_text(f"torch=={torch.__version__.partition('+')[0]}\n")
    assert severities(check_versions(lock)) == {Severity.OK}


def test_the_lock_that_fits_best_counts(tmp_path: Path) -> None:
    """A machine with GPUs has another lock than one without."""
    fits, other = tmp_path / "requirements-gpu.lock", tmp_path / "requirements.lock"
    fits.write_text(f"torch=={torch.__version__.partition('+')[0]}\n")
    other.write_text("torch==1.0\n")
    assert severities(check_versions(other, fits)) == {Severity.OK}


@pytest.mark.parametrize(
    ("version", "requires", "said"),
    [
        ("0.1.0", ["torch==1.2.3"], "was built for torch==1.2.3"),
        ("0.28.0+other", [], "come from different builds"),
    ],
)
def test_a_torchvision_of_another_torch_is_a_problem(
    install: Callable[..., None], version: str, requires: list[str], said: str
) -> None:
    install("torchvision", version, *requires)
    one(check_versions(), Severity.PROBLEM, said)


# Models


@pytest.fixture
def student(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ROOT / "assets/toy/student", tmp_path / "student"))


def about_models(student: Path, *overrides: str) -> list[Finding]:
    config = toy(f"models.student.path={student}", *overrides)
    return list(check_models(config, *models(config)))


def test_the_toy_models_fit() -> None:
    config = toy()
    found = list(check_models(config, *models(config)))
    one(found, Severity.OK, "all 28 layers")
    one(found, Severity.OK, "the same tokenizer")


def test_every_layer_that_the_group_size_does_not_divide_is_named(student: Path) -> None:
    layers = {
        f"model.language_model.layers.{number}.{name}.weight": torch.zeros(8, width)
        for number in range(3)
        for name, width in (("self_attn.q_proj", 128), ("mlp.down_proj", 192))
        if (number, name) != (1, "mlp.down_proj")
    }
    vision = {"model.visual.layers.0.self_attn.q_proj.weight": torch.zeros(8, 50)}
    save_file(layers | vision, student / "model.safetensors")
    finding = one(about_models(student), Severity.PROBLEM, "does not divide")
    assert "2 of 5 layers" in finding.text
    assert "model.language_model.layers.0,2.mlp.down_proj (192)" in finding.text
    assert "q_proj" not in finding.text


def test_weights_without_a_layer_to_quantize_are_a_problem(student: Path) -> None:
    save_file({"w": torch.zeros(2)}, student / "model.safetensors")
    one(about_models(student), Severity.PROBLEM, "holds no layer that could be quantized")


def test_vocabularies_of_one_size_that_differ_in_content_are_a_problem(student: Path) -> None:
    file = student / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = sorted(vocabulary, key=lambda entry: vocabulary[entry])[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(tokenizer))
    finding = one(about_models(student), Severity.PROBLEM, "vocabulary differ")
    assert finding.text.startswith("2 entries") and repr(first) in finding.text
    # Another file with the same entries is the same vocabulary.
    file.write_text((ROOT / "assets/toy/student/tokenizer.json").read_text() + "\n")
    one(about_models(student), Severity.OK, "share all 470 entries")


def test_a_damaged_tokenizer_is_a_problem(student: Path) -> None:
    (student / "tokenizer.json").write_text("{}")
    one(about_models(student), Severity.PROBLEM, "cannot be read")
    (student / "tokenizer.json").unlink()
    one(about_models(student), Severity.UNCHECKED, "no tokenizer.json of the student")


def test_an_unknown_family_and_another_image_token_are_problems(student: Path) -> None:
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(
        json.dumps({**config, "model_type": "gpt2", "image_token_id": 7})
    )
    found = about_models(student)
    assert "llava" in one(found, Severity.PROBLEM, "'gpt2', which is not supported").remedy
    one(found, Severity.PROBLEM, "the teacher's image token is 5, the student's 7")


# Data


def annotations(folder: Path, records: list[object], name: str = "a.json") -> GraceConfig:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(records))
    source = f"{{kind: sharegpt4v, root: {folder}, annotations: [{name}]}}"
    return toy(f"data.source={source}")


def record(picture: str) -> dict[str, object]:
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A cat."}]
    return {"id": picture, "image": picture, "conversations": turns}


def about_data(config: GraceConfig) -> list[Finding]:
    return list(check_data(config, models(config)[1]))


def test_the_first_records_and_their_pictures_are_looked_at(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    config = annotations(folder, [record("1.png"), record("2.png")])
    one(about_data(config), Severity.PROBLEM, "none of the first 2 records can be used")
    (folder / "1.png").write_bytes(b"x" * 1000)
    finding = one(about_data(config), Severity.WARNING, "1 of the first 2 records")
    assert "'2.png' does not exist" in finding.text
    (folder / "2.png").write_bytes(b"x" * 3000)
    one(about_data(config), Severity.OK, "the first 2 records and their pictures are sound")


def test_pictures_are_looked_for_all_over_the_file(tmp_path: Path) -> None:
    """The first records are sound; `coco`, from the middle of the file on, is not mounted."""
    folder = tmp_path / "data"
    names = [f"sam/{number}.jpg" for number in range(3000)]
    names[2000:2000] = [f"coco/train2017/{number}.jpg" for number in range(1000)]
    config = annotations(folder, [record(name) for name in names])
    (folder / "sam").mkdir()
    for name in names[:2000] + names[3000:]:
        (folder / name).touch()
    finding = one(about_data(config), Severity.PROBLEM, "named all over it cannot be used")
    assert "'coco/train2017/0.jpg' does not exist" in finding.text
    below = finding.text.split(f"below {folder}: ")[1]
    found = re.fullmatch(
        r"coco (\d+) of (\d+) \(there is no such folder\); data.max_quarantined_share is 0.05",
        below,
    )
    assert found is not None and found[1] == found[2] and int(found[1]) > 100

    source = config.data.source.model_dump()
    allowed = toy(f"data.source={json.dumps(source)}", "data.max_quarantined_share=0.999")
    one(about_data(allowed), Severity.WARNING, "named all over it cannot be used")


def test_a_small_folder_is_missed_in_a_large_file_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its records are 1 % of all, and a tenth of the file is read, at 100 places."""
    monkeypatch.setattr(dataset, "_PLACES", 100)
    monkeypatch.setattr(dataset, "_PLACE_BYTES", 1500)
    folder = tmp_path / "data"
    names = [
        f"wikiart/{number}.jpg" if number % 100 == 99 else f"sam/{number}.jpg"
        for number in range(11_000)
    ]
    config = annotations(folder, [record(name) for name in names])
    (folder / "sam").mkdir()
    for name in names:
        if name.startswith("sam"):
            (folder / name).touch()
    finding = one(about_data(config), Severity.PROBLEM, "named all over it cannot be used")
    assert "wikiart" in finding.text.split(f"below {folder}: ")[1]


def test_a_few_missing_pictures_are_a_warning(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    names = [f"sam/{number}.jpg" for number in range(1000)]
    config = annotations(folder, [record(name) for name in names])
    (folder / "sam").mkdir()
    for number, name in enumerate(names):
        if number % 25 != 24:  # 4 % are not there
            (folder / name).touch()
    found = about_data(config)
    one(found, Severity.WARNING, "named all over it cannot be used")
    assert Severity.PROBLEM not in severities(found)


def test_names_within_a_text_are_no_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    told = record("1.png")
    told["conversations"] = [
        {"from": "human", "value": '<image> {"image": "none.jpg"}'},
        {"from": "gpt", "value": json.dumps({"image": json.dumps({"image": "gone.jpg"})})},
    ]
    config = annotations(folder, [told])
    (folder / "1.png").touch()
    one(about_data(config), Severity.OK, "1 pictures named all over it are in place")


def test_a_storage_that_fails_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = annotations(tmp_path / "data", [record("1.png")])
    is_file = Path.is_file

    def fail(path: Path) -> bool:
        if path.suffix == ".png":
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", fail)
    one(about_data(config), Severity.PROBLEM, "Stale file handle")


def test_the_size_of_the_data_is_taken_from_the_first_records(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    config = annotations(folder, [record(f"{number % 2}.png") for number in range(100)])
    (folder / "0.png").write_bytes(b"x" * 10_000)
    (folder / "1.png").write_bytes(b"x" * 30_000)
    text = sum(len(json.dumps(record("0.png"))) for _ in range(100))
    assert isinstance(config.data.source, ShareGPT4VData)
    size = estimated_size(config.data.source)
    assert size == pytest.approx(100 * 20_000 + 2 * text, rel=0.02)
    limited = config.data.source.model_copy(update={"limit": 10})
    assert estimated_size(limited) == pytest.approx(size / 10, rel=0.02)
    assert estimated_text(config.data.source) == pytest.approx((100, text), rel=0.02)
    assert estimated_text(limited) == pytest.approx((10, text / 10), rel=0.02)


def test_a_damaged_file_is_a_problem_and_a_missing_root_too(tmp_path: Path) -> None:
    config = annotations(tmp_path / "data", [])
    one(about_data(config), Severity.PROBLEM, "holds no record")
    (tmp_path / "data" / "a.json").write_text('[{"id": 1}, {"id"')
    assert Severity.PROBLEM in severities(about_data(config))
    shutil.rmtree(tmp_path / "data")
    assert "GRACE_DATA_ROOT" in one(about_data(config), Severity.PROBLEM, "not on this").remedy


# All together


def test_the_toy_configuration_is_ready(tmp_path: Path) -> None:
    findings = examine(toy(f"run_dir={tmp_path}/run"))
    require_no_problem(findings)
    assert {f.area for f in findings} == {"environment", "models", "data", "machine", "disk"}
    assert not (tmp_path / "run").exists()


def test_only_what_publishes_needs_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    config = toy("publish.destination={kind: hub, namespace: me}")
    one(examine(config), Severity.PROBLEM, "HF_TOKEN is not set")
    require_no_problem(examine(config, "evaluate"))


def grace(*arguments: str) -> subprocess.CompletedProcess[str]:
    unset = ("PREFECT_API_URL", "MLFLOW_TRACKING_URI")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    return subprocess.run(
        [sys.executable, "-m", "operations", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_shows_findings_and_ends_with_their_worst(tmp_path: Path) -> None:
    place = f"run_dir={tmp_path}/run"
    done = grace("doctor", "configs/toy.yaml", "--set", place)
    assert done.returncode == 0, done.stderr
    assert "not configured: PREFECT_API_URL" in " ".join(done.stdout.split())
    (tmp_path / "run").write_text("a file")
    done = grace("doctor", "configs/toy.yaml", "--set", place, "--json")
    assert done.returncode == 1
    rows = json.loads(done.stdout)
    (wrong,) = [row for row in rows if row["result"] == "problem"]
    assert wrong["area"] == "disk" and wrong["remedy"] == "choose another run_dir"
    assert rows[0].keys() == {"area", "result", "finding", "remedy"}
    assert as_rows([ok("disk", "room")])[0].keys() == rows[0].keys()


def test_a_stage_does_not_start_where_there_is_a_problem(student: Path, tmp_path: Path) -> None:
    (student / "tokenizer.json").write_text("{}")
    where = (f"run_dir={tmp_path}/run", f"models.student.path={student}")
    done = grace("data", "configs/toy.yaml", *(word for key in where for word in ("--set", key)))
    assert done.returncode == 1
    assert "1 problem found before the start; nothing was run" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
