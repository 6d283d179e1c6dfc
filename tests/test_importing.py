"""Published checkpoints come in with equal codes, go out packed, and nothing in them is run."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from grace_core.artifacts import Artifact, Manifest, digest_folder
from grace_core.cli.app import app
from grace_core.cli.chain import Chain
from grace_core.config.tree import GraceConfig
from grace_core.errors import GraceError
from grace_core.events import Event
from grace_core.export.awq import AWQ
from grace_core.export.compressed import COMPRESSED
from grace_core.export.exactness import check_release
from grace_core.export.release import export_packed
from grace_core.importing.checkpoint import import_checkpoint
from grace_core.importing.sidecar import SIDECAR, read_sidecar
from grace_core.quantization.checkpoint import load_scales
from grace_core.quantization.convert import convert_with_scales
from grace_core.stages.training_plan import plan_quantized
from tests.official_format import (
    Published,
    publish_in_original_layout,
    publish_packed,
    publish_with_sidecar,
    rounded_to_bf16,
)
from tests.qat_models import forward_batches, trained
from tests.tiny_models import save_tiny, tiny_llava

VARIANTS = [("qwen3_vl", 4), ("qwen3_vl", 8), ("qwen2_vl", 4), ("llava", 4)]


def _check_imported(published: Published, made: Path, bits: int) -> None:
    """Oracle: codes and scales that the published files were made from, in float64."""
    latent = load_file(made / "model.safetensors")
    imported = load_scales(made)
    assert (imported.bits, imported.group_size) == (bits, 128)
    assert len(imported.scales) == len(published.codes)
    by_shape = dict(zip(sorted(published.codes), sorted(imported.scales), strict=True))
    for name, codes in published.codes.items():
        scale = rounded_to_bf16(published.scales[name])
        theta = imported.scales[by_shape[name]].double().numpy()
        assert np.array_equal(rounded_to_bf16(np.exp(theta)), scale)
        ratio = latent[name].double().numpy() / np.repeat(scale, 128, axis=1)
        assert np.array_equal(np.rint(ratio), codes)


@pytest.mark.parametrize(("family", "bits"), VARIANTS)
def test_weights_with_a_sidecar(tmp_path: Path, family: str, bits: int) -> None:
    published = publish_with_sidecar(tmp_path / "published", family, bits)
    made = tmp_path / "made"
    manifest = import_checkpoint(published.folder, made)
    _check_imported(published, made, bits)

    before = load_file(published.folder / "model.safetensors")
    after = load_file(made / "model.safetensors")
    assert before.keys() == after.keys()
    kept = before.keys() - published.codes.keys()
    assert all(torch.equal(before[name], after[name]) for name in kept)

    assert json.loads((made / "import.json").read_text()) == manifest
    assert manifest["layers"] == 7 and manifest["bits"] == bits
    assert manifest["equal_codes"] == sum(codes.size for codes in published.codes.values())
    assert manifest["source"]["weights_equal_to_the_sidecar"] == 7
    assert not (made / SIDECAR).exists()
    scales = np.concatenate([scale.flatten() for scale in published.scales.values()])
    rounded = rounded_to_bf16(scales)
    assert manifest["scales"]["total"] == scales.size
    assert manifest["scales"]["rounded"] == np.count_nonzero(rounded != scales)
    worst = np.abs(rounded / scales - 1).max()
    assert manifest["scales"]["largest_relative_change"] == pytest.approx(worst, rel=1e-3)


def test_the_difference_of_logits_is_stated(tmp_path: Path) -> None:
    """Oracle: both directories in plain transformers, on inputs made here."""
    published = publish_with_sidecar(tmp_path / "published", "qwen3_vl", 4)
    logits = import_checkpoint(published.folder, tmp_path / "made")["logits"]
    assert logits["batches"] == 3 and logits["largest_difference"] > 0
    assert 0 < logits["mean_difference"] < logits["largest_difference"] < 1
    old, new = (
        AutoModelForImageTextToText.from_pretrained(folder)
        for folder in (published.folder, tmp_path / "made")
    )
    with torch.no_grad():
        for batch in forward_batches("qwen3_vl"):
            gap = (old(**batch).logits - new(**batch).logits).abs().float()
            # Other inputs, the same order of magnitude.
            assert logits["mean_difference"] / 4 < gap.mean() < logits["mean_difference"] * 4


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_vl", "llava"])
def test_the_packed_form(tmp_path: Path, family: str) -> None:
    with_sidecar = publish_with_sidecar(tmp_path / "published", family, 4)
    published = publish_packed(with_sidecar, tmp_path / "packed")
    manifest = import_checkpoint(published.folder, tmp_path / "made")
    _check_imported(published, tmp_path / "made", 4)
    assert manifest["source"]["kind"] == "awq_quantized_modules.json"
    assert manifest["tensors_rounded_to_bf16"] == 0  # fp16 biases came from bf16
    assert "awq_packing" not in json.loads((tmp_path / "made" / "config.json").read_text())


@pytest.mark.parametrize("form", [COMPRESSED, AWQ], ids=["compressed", "awq"])
def test_an_imported_checkpoint_is_packed_again(tmp_path: Path, form: Any) -> None:
    published = publish_with_sidecar(tmp_path / "published", "qwen2_vl", 4)
    import_checkpoint(published.folder, tmp_path / "made")
    export_packed(tmp_path / "made", tmp_path / "release", form)
    report = check_release(tmp_path / "made", tmp_path / "release", form=form)
    assert report.layers == 7


@pytest.mark.parametrize("form", [COMPRESSED, AWQ], ids=["compressed", "awq"])
def test_our_own_releases_come_back_unchanged(tmp_path: Path, form: Any) -> None:
    source = trained(tmp_path / "trained", "qwen3_vl", 4)
    export_packed(source, tmp_path / "release", form)
    manifest = import_checkpoint(tmp_path / "release", tmp_path / "made")
    assert manifest["scales"]["rounded"] == 0
    assert manifest["logits"]["largest_difference"] == 0
    assert manifest["logits"]["same_best_token_percent"] == 100
    # Latent weights are not in a release; what it computes comes back to the bit.
    models = []
    for folder in (source, tmp_path / "made"):
        scales = load_scales(folder)
        models.append(AutoModelForImageTextToText.from_pretrained(folder))
        convert_with_scales(models[-1], scales.scales, bits=4, group_size=128)
    for batch in forward_batches("qwen3_vl"):
        with torch.no_grad():
            assert torch.equal(models[0](**batch).logits, models[1](**batch).logits)


def test_a_sharded_source_stays_sharded(tmp_path: Path) -> None:
    published = publish_with_sidecar(tmp_path / "published", "qwen3_vl", 4)
    tensors = load_file(published.folder / "model.safetensors")
    (published.folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-1-of-2.safetensors": names[:25], "model-2-of-2.safetensors": names[25:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, published.folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (published.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    import_checkpoint(published.folder, tmp_path / "made")
    made = json.loads((tmp_path / "made" / "model.safetensors.index.json").read_text())
    assert made["weight_map"] == index["weight_map"]


# --- what is refused ---

Sidecar = dict[str, Any]
MODULE = "model.language_model.layers.0.mlp.up_proj"


class _Program:
    """Unpickled, it would make a file."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("official") / "published"
    return publish_with_sidecar(folder, "qwen3_vl", 4).folder


def _refused(published: Path, tmp_path: Path, sidecar: object, message: str) -> None:
    source = shutil.copytree(published, tmp_path / "source")
    if isinstance(sidecar, bytes):
        (source / SIDECAR).write_bytes(sidecar)
    else:
        torch.save(sidecar, source / SIDECAR)
    with pytest.raises(GraceError, match=message):
        import_checkpoint(source, tmp_path / "made")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["source"]


def test_a_program_in_the_sidecar_is_not_run(published: Path, tmp_path: Path) -> None:
    trap = published.parent / "trap"
    sidecar = torch.load(published / SIDECAR) | {"a.bias": _Program(f"touch {trap}")}
    _refused(published, tmp_path, sidecar, r"refused, because .* asks for posix\.system")
    assert not trap.exists()


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_bare_pickle_is_not_read(published: Path, tmp_path: Path, protocol: int) -> None:
    trap = published.parent / "trap"
    content = pickle.dumps(_Program(f"touch {trap}"), protocol)
    _refused(published, tmp_path, content, "not a file that torch.save writes")
    assert not trap.exists()


def _drop_scale(sidecar: Sidecar) -> None:
    del sidecar[f"{MODULE}.log_scale"]


def _too_few_scales(sidecar: Sidecar) -> None:
    sidecar[f"{MODULE}.log_scale"] = sidecar[f"{MODULE}.log_scale"][:-1].clone()


def _poses_as_large(sidecar: Sidecar) -> None:
    sidecar[f"{MODULE}.weight"] = torch.zeros(1).expand(1 << 40, 128)


def _not_finite(sidecar: Sidecar) -> None:
    sidecar[f"{MODULE}.log_scale"][3] = float("nan")


def _whole_numbers(sidecar: Sidecar) -> None:
    sidecar[f"{MODULE}.weight"] = sidecar[f"{MODULE}.weight"].int()


def _no_tensor(sidecar: Sidecar) -> None:
    sidecar[f"{MODULE}.bias"] = [1.0]


def _other_part(sidecar: Sidecar) -> None:
    sidecar[f"{MODULE}.running_mean"] = torch.zeros(2)


def _other_module(sidecar: Sidecar) -> None:
    for part in ("weight", "log_scale"):
        sidecar[f"model.language_model.layers.7.mlp.up_proj.{part}"] = sidecar[f"{MODULE}.{part}"]


def _other_scales(sidecar: Sidecar) -> None:
    sidecar[f"{MODULE}.log_scale"] += 0.3


def _other_group(sidecar: Sidecar) -> None:
    halved = sidecar[f"{MODULE}.log_scale"].view(-1, 1).expand(-1, 2)
    sidecar[f"{MODULE}.log_scale"] = halved.flatten()


def _wider(sidecar: Sidecar) -> None:
    weight, scale = sidecar[f"{MODULE}.weight"], sidecar[f"{MODULE}.log_scale"].view(-1, 1)
    sidecar[f"{MODULE}.weight"] = torch.cat([weight, weight], dim=1)
    sidecar[f"{MODULE}.log_scale"] = scale.expand(-1, 2).flatten()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop_scale, r"up_proj: without log_scale"),
        (_too_few_scales, r"up_proj\.log_scale: \(255,\) values do not divide"),
        (_poses_as_large, r"up_proj\.weight: its values do not lie one after the other"),
        (_not_finite, r"up_proj\.log_scale: not finite"),
        (_whole_numbers, r"up_proj\.weight: torch\.int32"),
        (_no_tensor, r"up_proj\.bias: list, not a tensor"),
        (_other_part, r"running_mean: no weight, log_scale, bias of a module"),
        (_other_module, r"1 modules that the weights beside it lack, first .*layers\.7"),
        (_other_scales, r"weights are no multiples of their scales"),
        (_other_group, r"groups of 64, 128; all layers must share one"),
        (_wider, r"up_proj\.weight has shape .* different models"),
        (lambda sidecar: sidecar.clear(), "no quantized module"),
    ],
)
def test_a_sidecar_of_another_form_is_refused(
    published: Path, tmp_path: Path, change: Callable[[Sidecar], None], message: str
) -> None:
    sidecar = torch.load(published / SIDECAR)
    change(sidecar)
    _refused(published, tmp_path, sidecar, message)


def _rewritten(published: Path, compression: int, cut: int | None = None) -> bytes:
    """The sidecar's zip file made anew, its largest entry cut."""
    made = io.BytesIO()
    with (
        zipfile.ZipFile(published / SIDECAR) as old,
        zipfile.ZipFile(made, "w", compression) as new,
    ):
        largest = max(old.infolist(), key=lambda entry: entry.file_size).filename
        for name in old.namelist():
            new.writestr(name, old.read(name)[: cut if name == largest else None])
    return made.getvalue()


def test_a_damaged_sidecar_is_refused(published: Path, tmp_path: Path) -> None:
    whole = (published / SIDECAR).read_bytes()
    half, compressed = whole[: len(whole) // 2], _rewritten(published, zipfile.ZIP_DEFLATED)
    cases = [
        (b"", "not a file that torch.save writes"),
        (half, "not a file that torch.save writes"),
        (compressed, "compressed, which torch.save never does"),
        (_rewritten(published, zipfile.ZIP_STORED, cut=64), "damaged"),
    ]
    for number, (content, message) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        _refused(published, folder, content, message)


def test_a_list_of_tensors_is_no_sidecar(tmp_path: Path) -> None:
    torch.save([torch.zeros(2)], tmp_path / SIDECAR)
    with pytest.raises(GraceError, match="no dictionary of tensors"):
        read_sidecar(tmp_path / SIDECAR)


def test_a_packed_form_that_disagrees_with_its_list_is_refused(tmp_path: Path) -> None:
    with_sidecar = publish_with_sidecar(tmp_path / "published", "qwen3_vl", 4)
    folder = publish_packed(with_sidecar, tmp_path / "packed").folder
    tensors = load_file(folder / "model.safetensors")
    whole = {name: tensor.clone() for name, tensor in tensors.items()}

    def refused(changed: dict[str, Tensor], message: str) -> None:
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(GraceError, match=message):
            import_checkpoint(folder, tmp_path / "made")

    refused({n: t for n, t in whole.items() if n != f"{MODULE}.qzeros"}, "qzeros is missing")
    refused(whole | {f"{MODULE}.qzeros": whole[f"{MODULE}.qzeros"] ^ 1}, "zero points other than 8")
    refused(
        whole | {f"{MODULE}.scales": whole[f"{MODULE}.scales"].t().contiguous()},
        "no 4-bit AWQ layer of group size 128",
    )
    refused(whole | {f"{MODULE}.scales": -whole[f"{MODULE}.scales"]}, "not all positive")
    fewer = {name: tensor for name, tensor in whole.items() if not name.startswith(MODULE)}
    refused(fewer, "disagree about .*up_proj")
    (folder / "awq_quantized_modules.json").write_text("{}")
    refused(whole, "holds no bits, group_size and modules")


def test_other_checkpoints_are_refused(published: Path, tmp_path: Path) -> None:
    plain = shutil.copytree(published, tmp_path / "plain")
    (plain / SIDECAR).unlink()
    with pytest.raises(GraceError, match="ordinary BF16 checkpoint needs no import"):
        import_checkpoint(plain, tmp_path / "made")
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config | {"model_type": "internvl"}))
    with pytest.raises(GraceError, match="'internvl' is not supported"):
        import_checkpoint(plain, tmp_path / "made")


@pytest.mark.parametrize("tower", [True, False])
def test_the_original_layout_of_llava(tmp_path: Path, tower: bool) -> None:
    """As if transformers had saved it: every tensor, and what it lacks from the base."""
    published = publish_with_sidecar(tmp_path / "published", "llava", 4)
    base = tiny_llava(seed=9, layers=1)
    tower_weights = load_file(published.folder / "model.safetensors")
    with torch.no_grad():
        for name, parameter in base.model.vision_tower.named_parameters():
            parameter.copy_(tower_weights[f"vision_tower.{name}"])
    save_tiny(base, tmp_path / "base")
    rows = 500
    original = publish_in_original_layout(published, tmp_path / "original", rows=rows, tower=tower)

    import_checkpoint(published.folder, tmp_path / "expected")
    done = import_checkpoint(original, tmp_path / "made", base=tmp_path / "base")

    assert done["layers"] == 7 and done["logits"]["positions"] > 0
    expected = load_file(tmp_path / "expected" / "model.safetensors")
    made = load_file(tmp_path / "made" / "model.safetensors")
    of_base = load_file(tmp_path / "base" / "model.safetensors")
    assert made.keys() == expected.keys()
    for name, tensor in made.items():
        if "embed_tokens" in name or "lm_head" in name:
            assert torch.equal(tensor[:rows], expected[name][:rows])
            assert torch.equal(tensor[rows:], of_base[name][rows:])
        else:
            assert torch.equal(tensor, expected[name]), name
    theirs, ours = load_scales(tmp_path / "expected"), load_scales(tmp_path / "made")
    assert all(torch.equal(ours.scales[name], theta) for name, theta in theirs.scales.items())
    assert (tmp_path / "made" / "chat_template.jinja").is_file()


def test_the_original_layout_says_what_it_needs(tmp_path: Path) -> None:
    published = publish_with_sidecar(tmp_path / "published", "llava", 4)
    original = publish_in_original_layout(published, tmp_path / "original", rows=500)
    made, base = tmp_path / "made", save_tiny(tiny_llava(layers=1), tmp_path / "base")
    with pytest.raises(GraceError, match="--base, such as llava-hf"):
        import_checkpoint(original, made)
    with pytest.raises(GraceError, match="leave --base out"):
        import_checkpoint(published.folder, made, base=base)
    other = save_tiny(tiny_llava(hidden=256, layers=1), tmp_path / "other")
    with pytest.raises(GraceError, match="the two are different models"):
        import_checkpoint(original, made, base=other)
    longer = save_tiny(tiny_llava(layers=2), tmp_path / "longer")
    with pytest.raises(GraceError, match=r"tensors are missing, first .*layers\.1"):
        import_checkpoint(original, made, base=longer)
    config = json.loads((original / "config.json").read_text())
    (original / "config.json").write_text(json.dumps(config | {"mm_vision_select_layer": -1}))
    with pytest.raises(GraceError, match="mm_vision_select_layer is -1"):
        import_checkpoint(original, made, base=base)
    assert not made.exists()


def test_import_and_pack_on_the_command_line(published: Path, tmp_path: Path) -> None:
    made, packed = tmp_path / "made", tmp_path / "packed"
    runner = CliRunner()
    done = runner.invoke(app, ["import", str(published), "--out", str(made), "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert str(made / "import.json") in done.output.replace("\n", "")
    arguments = ["pack", str(made), "--out", str(packed), "--form", "awq", "--device", "cpu"]
    done = runner.invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "7 layers" in done.output and "all equal" in done.output
    assert (packed / "model.safetensors").is_file()


def test_what_cannot_be_packed_is_refused_before_anything_is_written(
    published: Path, tmp_path: Path
) -> None:
    """Another machine is not asked, and no library's error is shown."""
    made = tmp_path / "made"
    import_checkpoint(published, made)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (made / name).unlink()
    for folder, told in (
        (tmp_path / "nowhere", "is no checkpoint|no config.json|does not exist"),
        (published, "no quantization.json"),
        (made, "no tokenizer here"),
    ):
        arguments = ["pack", str(folder), "--out", str(tmp_path / "out"), "--device", "cpu"]
        done = CliRunner().invoke(app, arguments)
        assert isinstance(done.exception, GraceError)
        assert re.search(told, str(done.exception))
        assert not (tmp_path / "out").exists()


# --- going on from it ---


def _config(root: Path, start: Path, **quantize: Any) -> GraceConfig:
    training = {"steps": 1, "row_tokens": 512, "rows_per_step": 1, "scale_learning_rate": 1e-7}
    objective = {"distillation": {"kind": "none"}, "relational": {"enabled": False}}
    return GraceConfig.model_validate(
        {
            "name": "continued",
            "run_dir": root / "run",
            "models": {"teacher": {"path": str(start)}, "student": {"path": str(start)}},
            "data": {"source": {"kind": "toy", "records": 8}, "max_tokens": 512},
            "distill": {"training": training},
            "quantize": {
                "variants": ["w4"],
                "start": {"path": str(start)},
                "training": {**training, "learning_rate": 1e-9},
                "objective": objective,
                **quantize,
            },
            "launch": {"processes": 1, "device": "cpu"},
            "publish": {"name": "x", "base_model": "a/b", "teacher_model": "a/c", "dataset": "d"},
        }
    )


@pytest.mark.slow
def test_a_training_goes_on_with_the_imported_scales(tmp_path: Path) -> None:
    published = publish_with_sidecar(tmp_path / "published", "qwen3_vl", 4)
    import_checkpoint(published.folder, tmp_path / "made")
    config = _config(tmp_path, tmp_path / "made")
    assert config.students == ("w4",)
    chain = Chain(config, _Silent())
    (label,) = chain.students()
    trained_on = chain.students()[label].path / "model"
    before, after = load_scales(tmp_path / "made"), load_scales(trained_on)
    assert before.scales.keys() == after.scales.keys()
    for name, theta in before.scales.items():
        # One step of 1e-7: a fresh start would be per cents away.
        assert torch.allclose(theta, after.scales[name], rtol=0, atol=1e-5)
    assert chain.releases()["w4"].manifest.facts["exactness"]["layers"] == 7


class _Silent:
    def started(self, stage: str) -> None: ...

    def ended(self, stage: str, artifact: Artifact) -> None: ...

    def on_event(self, event: Event) -> None: ...


def test_the_start_is_recorded_in_a_role_of_its_own(published: Path, tmp_path: Path) -> None:
    import_checkpoint(published, tmp_path / "made")
    data = Artifact(tmp_path, Manifest.model_construct(stage="data", digest="d" * 64))
    plan = plan_quantized(_config(tmp_path, tmp_path / "made"), "w4", data, None, None)
    assert plan.parents.keys() == {"quantized start", "data"}
    assert plan.parents["quantized start"].digest == digest_folder(tmp_path / "made")


def test_another_width_is_refused_before_training(published: Path, tmp_path: Path) -> None:
    import_checkpoint(published, tmp_path / "made")
    data = Artifact(tmp_path, Manifest.model_construct())
    config = _config(tmp_path, tmp_path / "made", variants=["w8"])
    with pytest.raises(GraceError, match="4-bit codes in groups of 128, the run trains w8"):
        plan_quantized(config, "w8", data, None, None)
    with pytest.raises(ValueError, match="a checkpoint has one width"):
        _config(tmp_path, tmp_path / "made", variants=["w8", "w4"])
