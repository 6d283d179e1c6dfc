"""Section `launch`: how a training's processes are started."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from grace_core.config.section import Float, Int, PositiveInt, Section

SlurmValue = Annotated[str, Field(pattern=r"^\S+$")]

SlurmOption = Annotated[str, Field(pattern=r"^-[^\r\n]+$")]


class LocalLaunch(Section):
    """On this machine, below the process that runs the stage."""

    kind: Literal["local"] = "local"


class SlurmLaunch(Section):
    """As a batch job of SLURM, submitted and watched from a machine that needs no GPU."""

    kind: Literal["slurm"] = "slurm"
    partition: SlurmValue | None = Field(None, description="null: the cluster's default")
    account: SlurmValue | None = None
    qos: SlurmValue | None = None
    constraint: SlurmValue | None = Field(None, description="features that the nodes must have")
    gpus_per_node: Int | None = Field(
        None, ge=0, description="GPUs; null: launch.processes, or none where launch.device is cpu"
    )
    memory_gb: PositiveInt | None = Field(
        None, description="GiB of memory on each node; null: the partition's default"
    )
    time_limit_minutes: PositiveInt | None = Field(
        None, description="minutes of one start of the job; null: the partition's limit"
    )
    warning_seconds: Int = Field(
        180,
        ge=1,
        le=65535,
        description="seconds before the time limit at which the training saves and is requeued",
    )
    max_restarts: Int = Field(
        50, ge=0, description="how often a job may have been requeued to be requeued once more"
    )
    poll_seconds: Float = Field(
        15.0, ge=1, le=600, description="seconds between questions to slurmctld"
    )
    setup: tuple[str, ...] = Field((), description="shell lines run first on each node")
    options: tuple[SlurmOption, ...] = Field(
        (), description="more options of sbatch, such as --reservation=course"
    )


class Launch(Section):
    """How a training stage's processes are started."""

    nodes: PositiveInt = Field(1, description="machines that train together")
    processes: PositiveInt = Field(1, description="processes (one a GPU) on each node")
    threads_per_process: PositiveInt = Field(1, description="CPU threads of each process")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout_hours: Float | None = Field(
        None, gt=0, le=2000, description="hours (not seconds) a training stage may take; null: any"
    )
    grace_seconds: Float = Field(
        20.0,
        gt=0,
        lt=30,
        description="seconds from SIGTERM to SIGKILL, below the 30 after which Prefect kills",
    )
    backend: Annotated[LocalLaunch | SlurmLaunch, Field(discriminator="kind")] = LocalLaunch()

    @property
    def world_size(self) -> int:
        """Processes of a training, over all nodes."""
        return self.nodes * self.processes

    @property
    def seconds_to_save(self) -> float:
        """Seconds that a training told to stop has for writing a checkpoint."""
        if isinstance(self.backend, SlurmLaunch):
            return float(self.backend.warning_seconds)
        return self.grace_seconds
