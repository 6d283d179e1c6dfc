"""The machine that trains: GPUs, cores, memory and the limits that stop a run half-way."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from grace_core.config.tree import GraceConfig
from grace_core.doctor.checkpoints import Checkpoint
from grace_core.doctor.findings import Finding, information, ok, problem, unchecked, warning
from grace_core.doctor.gpus import Gpu, visible_gpus
from grace_core.doctor.memory import Need, in_units, needs, training_stages
from grace_core.hardware import NotReported
from grace_core.training.memory import BACKWARD

AREA = "machine"

_SHARED_MEMORY = Path("/dev/shm")
_ROWS_AHEAD = 4  # prefetch_factor of the loop's loader
_BYTES_A_PIXEL = 12  # three channels of fp32
_BF16 = (8, 0)
_OPEN_FILES = 4096


def check_machine(
    config: GraceConfig, teacher: Checkpoint, student: Checkpoint
) -> Iterator[Finding]:
    """Whether this machine can train what the configuration asks of it."""
    try:
        gpus: list[Gpu] | None = visible_gpus()
    except NotReported as error:
        gpus = None
        yield unchecked(AREA, f"GPUs: {error}", "install NVIDIA's driver tools, or mend the driver")
    count = None if gpus is None else len(gpus)
    yield from processors(config, count)
    if gpus and config.launch.device != "cpu":
        yield from _gpus(config, gpus, teacher, student)
    elif gpus is not None:
        yield from _memory(config, teacher, student)
    yield from _limits(config, student)


def processors(config: GraceConfig, gpus: int | None) -> Iterator[Finding]:
    """Processes against GPUs, threads against cores. gpus: None where their number is not known."""
    launch = config.launch
    if launch.device == "cuda" and gpus == 0:
        yield problem(
            AREA,
            "launch.device: no NVIDIA GPU on this machine",
            "a run needs one; set it to cpu or auto to do without",
        )
    if launch.device != "cpu" and gpus and gpus < launch.processes:
        yield problem(
            AREA,
            f"launch.processes: {launch.processes} processes, but {gpus} GPUs on this machine",
            f"set launch.processes to {gpus}, or look at CUDA_VISIBLE_DEVICES",
        )
    cores = len(os.sched_getaffinity(0))
    threads = launch.processes * launch.threads_per_process
    on_cpu = launch.device == "cpu" or (launch.device == "auto" and not gpus)
    if threads > cores and on_cpu:
        yield warning(
            AREA,
            f"launch: {threads} threads in all, but {cores} CPU cores on this machine",
            "lower launch.processes or launch.threads_per_process",
        )


def _gpus(
    config: GraceConfig,
    gpus: Sequence[Gpu],
    teacher: Checkpoint,
    student: Checkpoint,
) -> Iterator[Finding]:
    used = gpus[: config.launch.processes]
    old = [gpu for gpu in used if gpu.compute_capability < _BF16]
    for gpu in old:
        yield warning(
            AREA,
            f"GPU {gpu.index} ({gpu.name}, compute capability "
            f"{'.'.join(map(str, gpu.compute_capability))}) has no bf16 arithmetic",
            "choose GPUs of compute capability 8.0 or above; here bf16 is emulated, many times "
            "slower",
        )
    for gpu in used:
        if gpu.processes:
            others = ", ".join(f"{name} ({number})" for number, name in gpu.processes.items())
            yield warning(
                AREA,
                f"GPU {gpu.index} is in use, {in_units(gpu.total - gpu.free)} of its memory: "
                f"{others}",
                "end these programs, or choose other GPUs with CUDA_VISIBLE_DEVICES",
            )
    found = needs(config, teacher, student)
    if found is None:
        yield _size_unknown("memory of the GPUs")
        return
    need = max(found, key=lambda one: one.total)
    said = _in_words(need)
    short = [gpu for gpu in used if gpu.free < need.total]
    for gpu in short:
        yield problem(
            AREA,
            f"GPU {gpu.index} ({gpu.name}) has {in_units(gpu.free)} free of "
            f"{in_units(gpu.total)}; {said}",
            _remedy(config, need),
        )
    if not short:
        least = min(gpu.free for gpu in used)
        yield ok(AREA, f"{len(used)} x {used[0].name}, {in_units(least)} free; {said}")


def _remedy(config: GraceConfig, need: Need) -> str:
    found = "use more processes or a higher zero_stage, a GPU with more memory, or free this one"
    if need.teacher and config.launch.world_size > 1 and config.models.teacher_weights == "whole":
        return f"divide the teacher over the GPUs (models.teacher_weights: sharded), or {found}"
    return found


def _in_words(need: Need) -> str:
    moments = need.memory.moments
    passes = f", {in_units(max(moments.values()))} for passes or the step" if moments else ""
    if BACKWARD not in moments:
        passes += "; activations come on top"
    return (
        f"stage {need.stage} needs at least {in_units(need.total)} on each "
        f"({in_units(need.state)} of weights, gradients and Adam's state, "
        f"{in_units(need.teacher)} of teacher{passes})"
    )


def least_memory(
    config: GraceConfig, teacher: Checkpoint, student: Checkpoint
) -> Iterator[Finding]:
    """What each GPU of machines elsewhere must have."""
    found = needs(config, teacher, student)
    if found is None:
        yield _size_unknown("memory of the GPUs")
    else:
        need = max(found, key=lambda one: one.total)
        yield information(AREA, f"{config.launch.world_size} processes: {_in_words(need)}")


def _memory(config: GraceConfig, teacher: Checkpoint, student: Checkpoint) -> Iterator[Finding]:
    """A training on CPUs: all its processes on this machine share one memory."""
    found = needs(config, teacher, student)
    if found is None:
        yield _size_unknown("memory")
        return
    need = max(found, key=lambda one: one.total)
    here = need.memory.state * config.launch.processes
    free = _available_memory()
    said = (
        f"stage {need.stage} needs at least {in_units(here)} for weights, gradients, Adam's state "
        f"and teacher in {config.launch.processes} processes; activations come on top"
    )
    if here > free:
        yield problem(
            AREA,
            f"{in_units(free)} of memory available; {said}",
            "end other programs, or use a machine with more memory",
        )
    else:
        yield ok(AREA, f"{in_units(free)} of memory available; {said}")


def _available_memory() -> int:
    """Bytes; a container's limit counts where it is the smaller one."""
    available = int(psutil.virtual_memory().available)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file():
        text = limit.read_text(encoding="utf-8").strip()
        if text != "max":
            available = min(available, int(text) - int(used.read_text(encoding="utf-8")))
    return available


def _limits(config: GraceConfig, student: Checkpoint) -> Iterator[Finding]:
    """What stops data workers: small shared memory, few open files."""
    sections = [section.training for section in training_stages(config).values()]
    workers = max(training.data_workers for training in sections)
    if not workers:
        return
    open_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if open_files != resource.RLIM_INFINITY and open_files < _OPEN_FILES:
        yield warning(
            AREA,
            f"a process may open {open_files} files; {workers} data workers pass every tensor "
            "through one",
            "raise the limit: ulimit -n 65536",
        )
    pixels = student.pixels_per_token
    if pixels is None:
        yield unchecked(
            AREA,
            "size of /dev/shm: the student's image processor is not here",
            "download the model first",
        )
        return
    row = max(training.row_tokens for training in sections) * pixels * _BYTES_A_PIXEL
    need = row * workers * _ROWS_AHEAD * config.launch.processes
    try:
        place = os.statvfs(_SHARED_MEMORY)
    except OSError as error:
        yield unchecked(AREA, f"{_SHARED_MEMORY}: {error.strerror}", "mount a tmpfs there")
        return
    free = place.f_bavail * place.f_frsize
    said = (
        f"{_SHARED_MEMORY} has {in_units(free)} free; rows full of pictures, decoded ahead by "
        f"{config.launch.processes * workers} data workers, take up to {in_units(need)}"
    )
    if free < need:
        yield warning(
            AREA,
            said,
            "enlarge it (in a container: --shm-size, or an emptyDir of medium Memory), or lower "
            "data_workers",
        )
    else:
        yield ok(AREA, said)


def _size_unknown(what: str) -> Finding:
    return unchecked(
        AREA,
        f"{what}: not known how many weights the models have, they are not on this machine",
        "download the models first, or watch the first steps",
    )
