"""Room for everything that a run leaves, and the file system that it goes to."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from grace_core.config.data import ToyData
from grace_core.config.publish import DirectoryDestination
from grace_core.config.training import BITS, TeacherOutputs
from grace_core.config.tree import GraceConfig
from grace_core.doctor.benchmarks import Size
from grace_core.doctor.checkpoints import Checkpoint
from grace_core.doctor.dataset import estimated_size, estimated_text
from grace_core.doctor.findings import Finding, ok, problem, unchecked, warning
from grace_core.doctor.memory import (
    in_units,
    trained_checkpoint,
    training_stages,
)
from grace_core.training.memory import ADAM, BF16

AREA = "disk"

_TOY_RECORD = 10_000  # bytes of picture, annotation and tokens; measured: 7000
_BENCHMARK_FILES = 700
_OTHER_FILES = 500  # manifests, logs, metrics and scores of all stages, amply
_OTHER_BYTES = 50_000_000
_MARGIN = 1.2
_SCALE_BYTES = 2  # a released scale is bf16
_THETA_BYTES = 4  # a trained one is fp32
_ID_BYTES, _LOGIT_BYTES, _GRAM_BYTES = 4, 2, 2
_TOKEN_BYTES = 10  # the target's logit, the tail and the gate
_BYTES_A_TOKEN = 4  # of English text
_TOY_TOKENS = 7  # supervised, of a record; measured: 6.4
_PIXELS_A_TOKEN = 28**2  # of models that do not say
_LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "tmpfs", "ramfs", "overlay", "f2fs"}


@dataclass(frozen=True)
class Part:
    """Something that a run leaves."""

    name: str
    size: float
    """Bytes."""
    places: str | None
    """Where it lies below run_dir, as a pattern of folders; None: elsewhere on the same disk."""
    files: int = 10


def parts(config: GraceConfig, teacher: Checkpoint, student: Checkpoint) -> list[Part] | None:
    """What a whole run leaves; None where a model's size is not known.

    Checkpoints are those of the greatest training: each stage deletes its own at its end. One
    more than `keep_checkpoints` exists while the next is written.
    """
    found, checkpoints = [], 0.0
    for stage, section in training_stages(config).items():
        model = trained_checkpoint(stage, teacher, student)
        if model.parameters is None:
            return None
        quantized = model.quantized_weights() if stage in BITS else 0
        scales = quantized / config.quantize.group_size
        training = section.training
        # Without ZeRO every process writes the whole optimizer.
        copies = config.launch.world_size if training.zero_stage == 0 else 1
        one = model.parameters * (BF16 + copies * ADAM) + scales * 12
        checkpoints = max(checkpoints, (training.keep_checkpoints + 1) * one)
        size = model.parameters * BF16 + scales * _THETA_BYTES
        # Ends of folders' names are hexadecimal, so `teacher-outputs` is another stage's.
        found.append(Part(f"trained {stage}", size, f"artifacts/{stage}-[0-9a-f]*", 20))
    releases = _releases(config, student)
    found.insert(0, Part("checkpoints", checkpoints, "work/*/checkpoints", 100))
    found += releases
    destination = config.publish.destination
    if config.publish.enabled and isinstance(destination, DirectoryDestination):
        if not Path(destination.path).is_absolute():
            size = sum(part.size for part in releases)
            found.append(Part("published", size, destination.path, 50))
    found.append(_data(config))
    if config.teacher_outputs is not None and config.records_teacher:
        found.append(_recorded(config, config.teacher_outputs, student))
    found.append(Part("logs and scores", _OTHER_BYTES, "work/*/logs", _OTHER_FILES))
    return found


def _releases(config: GraceConfig, student: Checkpoint) -> list[Part]:
    assert student.parameters is not None
    quantized, group = student.quantized_weights(), config.quantize.group_size
    whole = student.parameters * BF16
    found = []
    if "bf16" in config.students:
        found.append(Part("release bf16", whole, "artifacts/release-bf16-*", 20))
    for name in config.quantize.variants:
        a_weight = BITS[name] / 8 + _SCALE_BYTES / group
        size = whole - quantized * BF16 + quantized * a_weight
        size *= 2 if name == "w4" and config.quantize.awq else 1  # in two forms
        found.append(Part(f"release {name}", size, f"artifacts/release-{name}-*", 20))
    return found


def _data(config: GraceConfig) -> Part:
    source = config.data.source
    if isinstance(source, ToyData):
        size, files = source.records * _TOY_RECORD, source.records + _BENCHMARK_FILES
        return Part("data", float(size), "artifacts/[wd][oa][rt][la]*", files)
    return Part("data", estimated_size(source), "artifacts/data-*", _BENCHMARK_FILES)


def _recorded(config: GraceConfig, outputs: TeacherOutputs, student: Checkpoint) -> Part:
    """The teacher's outputs, if all text is supervised and every picture as large as may be."""
    source = config.data.source
    if isinstance(source, ToyData):
        records, tokens = float(source.records), float(source.records * _TOY_TOKENS)
    else:
        records, text = estimated_text(source)
        tokens = text / _BYTES_A_TOKEN
    visual = config.data.max_pixels / (student.pixels_per_token or _PIXELS_A_TOKEN)
    a_token = outputs.top_k * (_ID_BYTES + _LOGIT_BYTES) + _TOKEN_BYTES
    size = tokens * a_token + records * visual * (visual + 1) / 2 * _GRAM_BYTES
    files = 2 + int(records / outputs.shard_samples)
    return Part("teacher outputs", size, "artifacts/teacher-outputs-*", files)


def check_disk(
    config: GraceConfig,
    teacher: Checkpoint,
    student: Checkpoint,
    benchmarks: Sequence[Size] = (),
) -> Iterator[Finding]:
    """Free room of run_dir's file system against the sum of the parts; who may write there.

    What an earlier attempt left of a part counts as written, up to the part's size.

    benchmarks: those that are still to be read.
    """
    from huggingface_hub import constants

    place = _existing(config.run_dir)
    yield from _writable(config, place)
    if config.launch.backend.kind != "local":
        yield from _shared(config, place)
    found = parts(config, teacher, student)
    if found is None:
        yield unchecked(
            AREA,
            "what the run will need: not known how many weights the models have, they are not here",
            "download the models first, or keep an eye on the disk",
        )
        return
    if benchmarks:
        packed = sum(each.packed or 0 for each in benchmarks)
        missing = sum(each.missing or 0 for each in benchmarks)
        found.append(Part("benchmarks", packed, "artifacts/benchmarks-*", 2 * len(benchmarks)))
        cache = _existing(Path(constants.HF_HUB_CACHE))
        if cache.stat().st_dev == place.stat().st_dev:
            found.append(Part("downloaded benchmarks", missing, None))
        elif missing:
            yield from _elsewhere(cache, missing)
        yield from _unknown(benchmarks)
    try:
        room = os.statvfs(place)
    except OSError as error:
        yield unchecked(AREA, f"free room of {place}: {error.strerror}", "check the file system")
        return
    yield from _bytes(config, room, found)
    yield from _inodes(config, room, found)


def _unknown(benchmarks: Sequence[Size]) -> Iterator[Finding]:
    names = [each.name for each in benchmarks if each.packed is None or each.missing is None]
    if names:
        yield unchecked(
            AREA,
            f"how large the benchmarks {', '.join(names)} are; they are not counted",
            "keep an eye on the disk",
        )


def _elsewhere(cache: Path, missing: float) -> Iterator[Finding]:
    """Room for the benchmarks' downloads, on another disk than run_dir."""
    room = os.statvfs(cache)
    free = room.f_bavail * room.f_frsize
    said = f"{cache}: {in_units(free)} free, the benchmarks download {in_units(missing)}"
    if free < missing:
        yield problem(AREA, said, "free some room, or set HF_HOME to a folder of another disk")
    else:
        yield ok(AREA, said)


def _bytes(config: GraceConfig, room: os.statvfs_result, found: list[Part]) -> Iterator[Finding]:
    free = room.f_bavail * room.f_frsize
    there = {part.name: min(part.size, _written(config.run_dir, part)) for part in found}
    needed = sum(part.size for part in found) - sum(there.values())
    listed = ", ".join(f"{part.name} {in_units(part.size)}" for part in found)
    said = (
        f"{config.run_dir}: {in_units(free)} free, the run still writes up to {in_units(needed)} "
        f"({listed}; {in_units(sum(there.values()))} of it is there)"
    )
    remedy = (
        "free some room, set run_dir to another disk, lower keep_checkpoints or leave out variants"
    )
    if free < needed:
        yield problem(AREA, said, remedy)
    elif free < _MARGIN * needed:
        yield warning(AREA, said, remedy)
    else:
        yield ok(AREA, said)


def _inodes(config: GraceConfig, room: os.statvfs_result, found: list[Part]) -> Iterator[Finding]:
    """File systems without a fixed number of files report none at all."""
    needed = sum(part.files for part in found)
    if room.f_files and room.f_favail < needed:
        yield problem(
            AREA,
            f"{config.run_dir}: room for {room.f_favail:,} more files, the run writes {needed:,}",
            "delete files there, or set run_dir to another disk",
        )


def _written(run_dir: Path, part: Part) -> int:
    """Bytes of the part that lie on disk below run_dir."""
    if part.places is None:
        return 0
    return sum(
        file.stat().st_size
        for folder in run_dir.glob(part.places)
        for file in folder.rglob("*")
        if file.is_file()
    )


def _existing(path: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _writable(config: GraceConfig, place: Path) -> Iterator[Finding]:
    if not place.is_dir():
        yield problem(AREA, f"run_dir: {place} is no folder", "choose another run_dir")
        return
    try:
        with tempfile.TemporaryFile(dir=place) as stream:
            stream.write(b"grace")
    except OSError as error:
        yield problem(
            AREA,
            f"run_dir: nothing can be written to {place} ({error.strerror})",
            "set run_dir to a folder of yours, or mend its rights",
        )


def _shared(config: GraceConfig, place: Path) -> Iterator[Finding]:
    kind = _file_system(place)
    if kind is None:
        yield unchecked(
            AREA,
            f"run_dir: the file system of {place} is not known",
            "make sure that all nodes see it under the same path",
        )
    elif kind in _LOCAL:
        yield warning(
            AREA,
            f"run_dir: {place} is on a {kind} file system, which other nodes do not see unless it "
            "is exported to them",
            "set run_dir to a folder that all nodes share",
        )
    else:
        yield ok(AREA, f"run_dir is on a {kind} file system")


def _file_system(place: Path) -> str | None:
    """Type of the file system that holds `place`, as Linux lists its mounts."""
    try:
        lines = Path("/proc/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    best, kind = -math.inf, None
    for line in lines:
        _, point, found, *_ = line.split(" ")
        folder = Path(point.replace("\\040", " "))
        if place.resolve().is_relative_to(folder) and len(folder.parts) >= best:
            best, kind = len(folder.parts), found
    return kind
