"""Commands that continue a run: read back by the programs that they are for."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from prefect.cli._utilities import load_json_key_values
from typer.testing import CliRunner

from grace_core.cli.app import app
from tasks.commands import commands_to_continue, grace_command, prefect_command

PARAMETERS = {
    "config": "configs/my run.yaml",
    "overrides": ["run_dir=runs/it's mine", "quantize.variants=[w4]", "data.source.limit=3"],
    "publish": False,
    "variants": ["w4"],
    "note": "3",
    "quoted": 'a "word", {or} two',
    "word": "true",
    "empty": "",
}


def test_prefect_reads_back_the_same_parameters() -> None:
    words = shlex.split(prefect_command("grace/full-pipeline", PARAMETERS))
    assert words[:4] == ["prefect", "deployment", "run", "grace/full-pipeline"]
    assert words[4::2] == ["--param"] * len(PARAMETERS)
    assert load_json_key_values(words[5::2], "parameter") == PARAMETERS


def test_grace_reads_back_the_same_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = shlex.split(grace_command("quantize", PARAMETERS))
    assert words == [
        *("grace", "quantize", "configs/my run.yaml", "--set", "run_dir=runs/it's mine"),
        *("--set", "quantize.variants=[w4]", "--set", "data.source.limit=3"),
        *("--set", "publish.enabled=false", "--variant", "w4"),
    ]
    asked: list[object] = []
    monkeypatch.setattr("grace_core.cli.app.load_config", lambda *call: asked.append(call))
    CliRunner().invoke(app, words[1:])
    (config, settings) = asked[0]
    assert str(config) == PARAMETERS["config"]
    assert settings == [*PARAMETERS["overrides"], "publish.enabled=false", "quantize.variants=[w4]"]


def test_without_a_flow_run_there_is_nothing_to_continue() -> None:
    assert commands_to_continue() == []
