"""The gate refuses what is not the trained model, in every packed form."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from grace_core.errors import GraceError
from grace_core.export import exactness
from grace_core.export.awq import AWQ
from grace_core.export.compressed import COMPRESSED
from grace_core.export.exactness import check_release
from grace_core.export.formats import PackedForm
from grace_core.export.release import export_packed
from tests.qat_models import trained

FORMS: dict[str, PackedForm] = {"compressed": COMPRESSED, "awq": AWQ}
STEM = "model.language_model.layers.1.mlp.down_proj"
"""128 outputs, 256 inputs."""

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("gate") / "trained", "qwen3_vl", 4)


@pytest.fixture(scope="module")
def releases(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("releases")
    for name, form in FORMS.items():
        export_packed(source, folder / name, form)
    return {name: folder / name for name in FORMS}


def check(source: Path, release: Path, form: str) -> None:
    check_release(source, release, form=FORMS[form])


# --- tensors ---


def _flip_code(tensors: Tensors) -> None:
    tensors[f"{STEM}.weight_packed"][5, 3] ^= 1 << 8  # the lowest bit of the third code in the word


def _flip_awq_code(tensors: Tensors) -> None:
    tensors[f"{STEM}.qweight"][26, 0] ^= 1 << 24  # nibble 6: output 5


def _next_scale(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name].view(torch.int16)[1, 1] += 1

    return change


def _drop(*parts: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for part in parts:
            del tensors[f"{STEM}.{part}"]

    return change


def _unpack(*parts: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        _drop(*parts)(tensors)
        tensors[f"{STEM}.weight"] = torch.zeros(128, 256, dtype=torch.bfloat16)

    return change


def _pack_another(*parts: str) -> Callable[[Tensors], None]:
    """A layer of the vision tower, which the training left alone."""

    def change(tensors: Tensors) -> None:
        other = "model.visual.blocks.0.attn.qkv"
        del tensors[f"{other}.weight"]
        for part in parts:
            tensors[f"{other}.{part}"] = tensors[f"{STEM}.{part}"].clone()

    return change


def _wrong_shape(tensors: Tensors) -> None:
    tensors[f"{STEM}.weight_shape"][1] -= 128


def _other_zero(tensors: Tensors) -> None:
    tensors[f"{STEM}.qzeros"][1, 2] ^= 1


def _transpose(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = tensors[name].t().contiguous()

    return change


def _widen_scale(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = tensors[name].float()

    return change


def _change_norm(tensors: Tensors) -> None:
    tensors["model.language_model.norm.weight"][0] += 1


def _add_stray(tensors: Tensors) -> None:
    tensors[f"{STEM}.weight_zero_point"] = torch.zeros(128, 2, dtype=torch.int32)


PACKED = ("weight_packed", "weight_scale", "weight_shape")
AWQ_PARTS = ("qweight", "qzeros", "scales")

DAMAGES: list[tuple[str, Callable[[Tensors], None], str]] = [
    ("compressed", _flip_code, r"down_proj\.weight codes: 1 of 32768 values .* at \[5, 26\]"),
    ("awq", _flip_awq_code, r"down_proj\.weight codes: 1 of 32768 values .* at \[5, 26\]"),
    (
        "compressed",
        _next_scale(f"{STEM}.weight_scale"),
        r"down_proj\.weight_scale: 1 of 256 values differ, first at \[1, 1\]",
    ),
    (
        "awq",
        _next_scale(f"{STEM}.scales"),
        r"down_proj\.scales: 1 of 256 values differ, first at \[1, 1\]",
    ),
    ("compressed", _drop(*PACKED), r"down_proj\.weight: not packed, .*weight_packed"),
    ("awq", _drop(*AWQ_PARTS), r"down_proj\.weight: not packed, .*qweight"),
    ("compressed", _drop("weight_shape"), r"not packed, \S*down_proj\.weight_shape missing"),
    ("awq", _drop("qzeros"), r"not packed, \S*down_proj\.qzeros missing"),
    ("compressed", _unpack(*PACKED), r"down_proj\.weight: not packed"),
    ("awq", _unpack(*AWQ_PARTS), r"down_proj\.weight: not packed"),
    ("compressed", _pack_another(*PACKED), r"attn\.qkv\.weight: missing"),
    ("awq", _pack_another(*AWQ_PARTS), r"attn\.qkv\.qweight: not in the trained model"),
    ("compressed", _wrong_shape, r"weight_shape: 1 of 2 values differ, first at \[1\]: 128,"),
    ("awq", _other_zero, r"down_proj\.qzeros: 1 of 32 values differ, first at \[1, 2\]"),
    ("compressed", _transpose(f"{STEM}.weight_packed"), r"\(32, 128\) cannot hold the codes"),
    ("awq", _transpose(f"{STEM}.qweight"), r"\(16, 256\) cannot hold the codes"),
    ("compressed", _widen_scale(f"{STEM}.weight_scale"), r"weight_scale: torch\.float32"),
    ("awq", _widen_scale(f"{STEM}.scales"), r"scales: torch\.float32"),
    ("compressed", _change_norm, r"norm\.weight: 1 of 128 values differ, first at \[0\]"),
    ("awq", _change_norm, r"norm\.weight: 1 of 128 values differ, first at \[0\]"),
    ("compressed", _add_stray, r"down_proj\.weight_zero_point: not in the trained model"),
]


@pytest.mark.parametrize(("form", "change", "message"), DAMAGES)
def test_damaged_tensors_are_refused(
    source: Path,
    releases: dict[str, Path],
    tmp_path: Path,
    form: str,
    change: Callable[[Tensors], None],
    message: str,
) -> None:
    release = shutil.copytree(releases[form], tmp_path / "release")
    tensors = load_file(release / "model.safetensors")
    change(tensors)
    save_file(tensors, release / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GraceError, match=message):
        check(source, release, form)


# --- config.json ---


def _without(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["quantization_config"].pop(key)


def _with(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["quantization_config"].__setitem__(key, value)


def _other_epsilon(config: dict[str, Any]) -> None:
    config["text_config"]["rms_norm_eps"] = 1e-2


def _other_width(config: dict[str, Any]) -> None:
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 8


IGNORED = ["re:.*visual.*", "re:.*lm_head$", r"re:.*layers\.1\.mlp.*"]
CONFIGURATIONS: list[tuple[str, Callable[[dict[str, Any]], None], str]] = [
    ("compressed", _without("quantization_status"), "quantization_status is missing"),
    ("compressed", _with("ignore", IGNORED), r"ignore is \[.*layers.*\], not \["),
    ("compressed", _without("ignore"), "ignore is missing"),
    ("compressed", _other_width, "num_bits is 8, not 4"),
    ("awq", _without("zero_point"), "zero_point is missing"),
    ("awq", _with("version", "gemv"), 'version is "gemv", not "gemm"'),
    ("awq", _with("modules_to_not_convert", ["lm_head"]), r"modules_to_not_convert is \["),
    ("awq", _with("desc_act", True), "desc_act is not the trained model's"),
    ("compressed", _other_epsilon, r"rms_norm_eps is 0\.01, not 1e-06"),
    ("awq", lambda config: config.pop("quantization_config"), "quantization_config is missing"),
]


@pytest.mark.parametrize(("form", "change", "message"), CONFIGURATIONS)
def test_a_wrong_configuration_is_refused(
    source: Path,
    releases: dict[str, Path],
    tmp_path: Path,
    form: str,
    change: Callable[[dict[str, Any]], None],
    message: str,
) -> None:
    release = shutil.copytree(releases[form], tmp_path / "release")
    config = json.loads((release / "config.json").read_text())
    change(config)
    (release / "config.json").write_text(json.dumps(config))
    with pytest.raises(GraceError, match=message):
        check(source, release, form)


def test_an_unreadable_configuration_is_refused(
    source: Path, releases: dict[str, Path], tmp_path: Path
) -> None:
    release = shutil.copytree(releases["awq"], tmp_path / "release")
    (release / "config.json").write_text("{")
    with pytest.raises(GraceError, match=r"config\.json: JSONDecodeError"):
        check(source, release, "awq")


# --- the other files ---


def _edit(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(release: Path) -> None:
        text = (release / name).read_text(encoding="utf-8")
        assert old in text
        (release / name).write_text(text.replace(old, new, 1), encoding="utf-8")

    return change


OTHERS: list[tuple[str, Callable[[Path], None], str]] = [
    ("compressed", _edit("tokenizer.json", "}", "} "), r"tokenizer\.json: not the trained model's"),
    ("awq", _edit("chat_template.jinja", "{", " {"), r"chat_template\.jinja: not the trained"),
    (
        "compressed",
        _edit("preprocessor_config.json", "0.5", "0.4"),
        r"preprocessor_config\.json: not the trained",
    ),
    ("awq", _edit("generation_config.json", "}", "} "), r"generation_config\.json: not the"),
    (
        "compressed",
        lambda release: (release / "generation_config.json").unlink(),
        r"generation_config\.json: missing",
    ),
    ("awq", lambda release: (release / "tokenizer.json").unlink(), r"tokenizer\.json: missing"),
    (
        "compressed",
        lambda release: (release / "added_tokens.json").write_text("{}"),
        r"added_tokens\.json: no file of a release",
    ),
    (
        "awq",
        lambda release: save_file({}, release / "old.safetensors"),
        r"old\.safetensors: no file",
    ),
]


@pytest.mark.parametrize(("form", "change", "message"), OTHERS)
def test_what_else_users_load_is_compared(
    source: Path,
    releases: dict[str, Path],
    tmp_path: Path,
    form: str,
    change: Callable[[Path], None],
    message: str,
) -> None:
    release = shutil.copytree(releases[form], tmp_path / "release")
    change(release)
    with pytest.raises(GraceError, match=message):
        check(source, release, form)


def test_inputs_that_the_release_makes_of_its_own_are_compared(
    source: Path, releases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a version of transformers that reads equal files differently."""
    release = shutil.copytree(releases["compressed"], tmp_path / "release")
    _edit("preprocessor_config.json", "0.5", "0.4")(release)
    monkeypatch.setattr(exactness, "_file_differences", lambda *_: iter(()))
    with pytest.raises(GraceError, match=r"batch 1: its own .* make another pixel_values"):
        check(source, release, "compressed")


# --- loading and computing, where the files alone show nothing ---


def test_what_transformers_does_not_load_is_refused(
    source: Path, releases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a version of transformers that reads the configuration differently."""
    release = shutil.copytree(releases["compressed"], tmp_path / "release")
    config = json.loads((release / "config.json").read_text())
    del config["quantization_config"]["quantization_status"]
    (release / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(exactness, "_config_differences", lambda *_: iter(()))
    with pytest.raises(GraceError, match=r"down_proj\.weight: missing on loading"):
        check(source, release, "compressed")


@pytest.mark.parametrize("form", FORMS)
def test_other_logits_are_refused(
    source: Path, releases: dict[str, Path], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal files, other arithmetic."""
    load = exactness._load_release

    def changed(*arguments: Any) -> Any:
        model = load(*arguments)
        model.model.language_model.norm.variance_epsilon = 1e-2
        return model

    monkeypatch.setattr(exactness, "_load_release", changed)
    with pytest.raises(GraceError, match=r"batch 0: \d+ of \d+ logits differ, by up to"):
        check(source, releases[form], form)
