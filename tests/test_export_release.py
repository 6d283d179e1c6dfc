"""Releases of each family: what is on disk, how they load, and that they are what was trained."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText, AwqConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from grace_core.errors import GraceError
from grace_core.export.awq import AWQ
from grace_core.export.checkpoint import model_names, new_directory, skeleton, weight_files
from grace_core.export.compressed import COMPRESSED, ignore_patterns
from grace_core.export.exactness import check_release
from grace_core.export.release import export_bf16, export_packed
from grace_core.quantization.checkpoint import load_scales
from grace_core.quantization.convert import convert
from tests.qat_models import forward_batches, trained
from tests.tiny_models import DECODER, FAMILIES, save_tiny, save_weights

VARIANTS = [("qwen3_vl", 4), ("qwen3_vl", 8), ("qwen2_vl", 4), ("llava", 4)]


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], tuple[Path, Path]]:
    """(trained, release) of every variant, made once."""
    pairs = {}
    for family, bits in VARIANTS:
        folder = tmp_path_factory.mktemp(f"{family}-w{bits}")
        source = trained(folder / "trained", family, bits)
        export_packed(source, folder / "release", COMPRESSED)
        pairs[family, bits] = (source, folder / "release")
    return pairs


Released = dict[tuple[str, int], tuple[Path, Path]]


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
        ),
    ],
)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_release_is_exactly_the_trained_model(
    released: Released, variant: tuple[str, int], device: str
) -> None:
    source, release = released[variant]
    report = check_release(source, release, device=device)
    assert report.layers == 14 and report.batches == 3 and report.image_batches == 2
    names = weight_files(source).names
    assert report.tensors == len(names) - 14
    packed = [
        name for name in names if re.search(r"\.[qkvo]_proj\.weight|(gate|up|down)_proj", name)
    ]
    packed = [name for name in packed if "vision" not in name]
    assert report.codes == sum(weight_files(source).read(name).numel() for name in packed)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_files_of_a_release(released: Released, variant: tuple[str, int]) -> None:
    source, release = released[variant]
    names = {file.name for file in release.iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= names
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
    assert not names & {"manifest.json", "optimizer.pt", "quantization.json", "scales.safetensors"}
    assert not [file for file in release.parent.iterdir() if file.name.endswith(".partial")]

    config = json.loads((release / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == json.loads((source / "config.json").read_text())
    assert quantization["quantization_status"] == "compressed"
    parsed = QuantizationConfig.model_validate(quantization)
    weights = parsed.config_groups["group_0"].weights
    assert weights is not None
    assert (weights.num_bits, weights.group_size, weights.symmetric) == (variant[1], 128, True)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_plain_from_pretrained_gives_code_times_scale(
    released: Released, variant: tuple[str, int]
) -> None:
    """Oracle: compressed-tensors' own unpacking, multiplied out in float64."""
    family, bits = variant
    _, release = released[variant]
    tensors = load_file(release / "model.safetensors")
    model, info = AutoModelForImageTextToText.from_pretrained(release, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        model(**forward_batches(family)[0])
    in_model = model_names(skeleton(release), tensors)
    checked = 0
    for name in tensors:
        if not name.endswith("_packed"):
            continue
        stem = name.removesuffix("_packed")
        shape = torch.Size(tensors[f"{stem}_shape"].tolist())
        codes = unpack_from_int32(tensors[name], bits, shape).double()
        scale = tensors[f"{stem}_scale"]
        assert scale.dtype == torch.bfloat16 and scale.shape == (shape[0], shape[1] // 128)
        expected = (codes * scale.double().repeat_interleave(128, dim=1)).bfloat16()
        weight = model.get_parameter(in_model[name].removesuffix("_packed"))
        assert torch.equal(weight, expected)
        checked += 1
    assert checked == 14


@pytest.mark.parametrize("family", FAMILIES)
def test_awq_release(tmp_path: Path, family: str) -> None:
    """Oracle: each nibble looked up where AutoAWQ's kernels look, in float64."""
    source = trained(tmp_path / "trained", family, 4, layers=1)
    release = tmp_path / "release"
    export_packed(source, release, AWQ)
    report = check_release(source, release, form=AWQ)
    assert report.layers == 7 and report.image_batches == 2

    config = json.loads((release / "config.json").read_text())
    skipped = config["quantization_config"].pop("modules_to_not_convert")
    assert config["quantization_config"] == {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
    }
    parsed = AwqConfig(**config["quantization_config"], modules_to_not_convert=skipped)
    assert (parsed.bits, parsed.group_size, parsed.zero_point) == (4, 128, True)
    packed = load_file(release / "model.safetensors")
    in_model = model_names(skeleton(source), weight_files(source).names)
    quantized = {
        in_model[name.removesuffix("qweight") + "weight"].removesuffix(".weight")
        for name in packed
        if name.endswith(".qweight")
    }
    for name, module in skeleton(source).named_modules():
        if isinstance(module, nn.Linear):
            as_transformers = not should_convert_module(name, skipped)
            as_vllm = any(part in name for part in skipped)
            assert as_transformers == as_vllm == (name not in quantized), name

    latent = load_file(source / "model.safetensors")
    scales = load_scales(source).scales
    nibble_of_output = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    for name in latent:
        stem = name.removesuffix("weight")
        if f"{stem}qweight" not in packed:
            assert torch.equal(latent[name], packed[name])
            continue
        outputs = latent[name].shape[0]
        words = packed[f"{stem}qweight"].long().repeat_interleave(8, dim=1)
        shifts = 4 * nibble_of_output.repeat(outputs // 8)
        codes = (words >> shifts & 15).double()
        zeros = packed[f"{stem}qzeros"].long().repeat_interleave(8, dim=1) >> shifts & 15
        theta = scales[in_model[name].removesuffix(".weight")]
        scale = theta.double().exp().bfloat16().double().repeat_interleave(128, dim=1)
        expected = (latent[name].double() / scale).round().clamp(-8, 7) * scale
        released = (codes - zeros.double().repeat_interleave(128, dim=0)) * packed[
            f"{stem}scales"
        ].double().repeat_interleave(128, dim=0)
        assert torch.equal(released.t(), expected)


def test_awq_refuses_a_scale_that_fp16_cannot_hold(tmp_path: Path) -> None:
    source = trained(tmp_path / "trained", "qwen3_vl", 4, layers=1)
    scales = load_file(source / "scales.safetensors")
    name = "model.language_model.layers.0.mlp.up_proj"
    scales[name][3, 0] = -18.420681  # log 1e-8, where all weights of a group are zero
    save_file(scales, source / "scales.safetensors")
    with pytest.raises(GraceError, match=rf"{name}: 1 of 256 scales .* 1\.00117\d*e-08, .* 0;"):
        export_packed(source, tmp_path / "release", AWQ)
    assert not (tmp_path / "release").exists()
    export_packed(source, tmp_path / "release", COMPRESSED)


def test_awq_holds_4_bits_only(tmp_path: Path) -> None:
    source = trained(tmp_path / "trained", "qwen3_vl", 8, layers=1)
    with pytest.raises(GraceError, match="8-bit codes; AWQ GEMM holds 4 bits"):
        export_packed(source, tmp_path / "release", AWQ)


def test_size_on_disk_shrinks_as_the_format_says(released: Released) -> None:
    for (_, bits), (source, release) in released.items():
        dense, packed = (
            load_file(source / "model.safetensors"),
            load_file(release / "model.safetensors"),
        )
        quantized = sum(dense[name].nbytes for name in set(dense) - set(packed))
        stored = sum(packed[name].nbytes for name in set(packed) - set(dense))
        # Per group of 128 bf16 weights: 128 codes and one bf16 scale; per layer two int64.
        groups = quantized // 256
        assert stored == groups * (128 * bits // 8 + 2) + 14 * 16


@pytest.mark.parametrize("family", FAMILIES)
def test_ignore_patterns_match_exactly_the_other_linears(family: str) -> None:
    model = FAMILIES[family](layers=1)
    quantized = set(convert(model, decoder_prefix=DECODER, bits=4, group_size=128))
    patterns = ignore_patterns(model, quantized)
    expected = {
        "qwen3_vl": {"visual", "lm_head"},
        "qwen2_vl": {"visual", "lm_head"},
        "llava": {"vision_tower", "multi_modal_projector", "lm_head"},
    }[family]
    assert set(patterns) == {rf"re:(.*\.)?{name}(\..*)?$" for name in expected}
    # The names vLLM gives the same modules are covered as well.
    vllm_names = ["visual.blocks.0.attn.qkv", "language_model.lm_head", "lm_head"]
    if family == "llava":
        vllm_names[0] = "vision_tower.vision_model.encoder.layers.0.self_attn.qkv_proj"
    for name in vllm_names:
        assert any(re.match(pattern.removeprefix("re:"), name) for pattern in patterns)
    assert not any(
        re.match(pattern.removeprefix("re:"), "language_model.model.layers.0.mlp.gate_up_proj")
        for pattern in patterns
    )


def test_ignore_patterns_inside_a_quantized_layer() -> None:
    """A linear layer amid quantized ones is ignored by as much of its path as it takes."""

    def block() -> nn.ModuleDict:
        return nn.ModuleDict({"proj": nn.Linear(2, 2), "gate": nn.Linear(2, 2)})

    model = nn.ModuleDict({"a": nn.ModuleList([block(), block()]), "b": block()})
    patterns = ignore_patterns(model, {"a.0.proj", "a.1.proj", "b.gate"})
    matched = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and any(re.match(pattern.removeprefix("re:"), name) for pattern in patterns)
    }
    assert matched == {"a.0.gate", "a.1.gate", "b.proj"}


def test_a_sharded_checkpoint_stays_sharded(tmp_path: Path) -> None:
    source = trained(tmp_path / "trained", "qwen3_vl", 4)
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {
        "model-00001-of-00003.safetensors": names[:10],
        "model-00002-of-00003.safetensors": names[10:40],
        "model-00003-of-00003.safetensors": names[40:],
    }
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, source / file, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {name: file for file, part in parts.items() for name in part},
    }
    (source / "model.safetensors.index.json").write_text(json.dumps(index))

    export_packed(source, tmp_path / "release", COMPRESSED)
    report = check_release(source, tmp_path / "release")
    assert report.layers == 14
    index = json.loads((tmp_path / "release" / "model.safetensors.index.json").read_text())
    on_disk = {file: load_file(tmp_path / "release" / file) for file in parts}
    assert index["weight_map"] == {name: file for file, part in on_disk.items() for name in part}
    total = sum(tensor.nbytes for part in on_disk.values() for tensor in part.values())
    assert index["metadata"]["total_size"] == total

    (source / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(GraceError, match=r"model-00002-of-00003\.safetensors is missing"):
        export_packed(source, tmp_path / "second", COMPRESSED)
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_release(tmp_path: Path, family: str) -> None:
    source = save_tiny(FAMILIES[family](layers=2), tmp_path / "trained")
    (source / "manifest.json").write_text("{}")
    release = tmp_path / "release"
    export_bf16(source, release)
    report = check_release(source, release)
    assert report.layers == 0 and report.tensors == len(weight_files(source).names)
    assert not (release / "manifest.json").exists()
    assert (release / "tokenizer.json").is_file()
    assert (release / "model.safetensors").read_bytes() == (
        source / "model.safetensors"
    ).read_bytes()

    tensors = load_file(release / "model.safetensors")
    first = next(iter(tensors))
    tensors[first].view(torch.int16).flatten()[0] += 1
    save_file(tensors, release / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GraceError, match=re.escape(f"{first}: 1 of")):
        check_release(source, release)


def test_what_cannot_be_released_is_refused_before_writing(tmp_path: Path) -> None:
    qat = trained(tmp_path / "qat", "qwen3_vl", 4, layers=1)
    plain = save_weights(FAMILIES["qwen3_vl"](layers=1), tmp_path / "plain")
    destination = tmp_path / "release"
    with pytest.raises(GraceError, match="export it packed"):
        export_bf16(qat, destination)
    with pytest.raises(GraceError, match=r"no quantization\.json"):
        export_packed(plain, destination, COMPRESSED)

    fp32 = tmp_path / "fp32"
    FAMILIES["qwen3_vl"](layers=1).save_pretrained(fp32)
    with pytest.raises(GraceError, match="float32"):
        export_bf16(fp32, destination)

    # Scales for a layer that these weights do not have.
    shutil.copy(qat / "model.safetensors", tmp_path / "keep")
    tensors = load_file(qat / "model.safetensors")
    dropped = next(name for name in tensors if name.endswith("mlp.up_proj.weight"))
    del tensors[dropped]
    save_file(tensors, qat / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GraceError, match=r"scales without weights for 1 layers, first .*up_proj"):
        export_packed(qat, destination, COMPRESSED)
    shutil.copy(tmp_path / "keep", qat / "model.safetensors")
    assert not destination.exists()

    destination.mkdir()
    (destination / "precious").write_text("kept")
    with pytest.raises(GraceError, match="exists already"):
        export_packed(qat, destination, COMPRESSED)
    assert [file.name for file in destination.iterdir()] == ["precious"]


def test_an_interrupted_export_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_directory(tmp_path / "release") as folder:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_an_index_cannot_point_outside_of_the_directory(tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    save_file({"w": torch.zeros(1)}, outside)
    (tmp_path / "model").mkdir()
    index = {"metadata": {}, "weight_map": {"w": "../outside.safetensors"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(GraceError, match="not a file of this directory"):
        weight_files(tmp_path / "model")
