"""`grace kubernetes`: one training stage as a manifest for a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from grace_core.cli.app import ConfigFile, Settings, app
from grace_core.config import GraceConfig, load_config
from grace_core.errors import GraceError

if TYPE_CHECKING:
    from grace_core.stages.training_plan import TrainingPlan

TrainingStageName = Literal["teacher", "bf16", "w8", "w4"]


@app.command(
    rich_help_panel="Clusters",
    epilog="Example: grace kubernetes run.yaml bf16 --image registry/grace:1 --claim shared "
    "--mount /shared | kubectl apply -f -",
)
def kubernetes(
    config: ConfigFile,
    stage: Annotated[TrainingStageName, typer.Argument(help="The training to run.")],
    image: Annotated[str, typer.Option(help="Container image with this package installed.")],
    claim: Annotated[
        str, typer.Option(help="Persistent volume claim of the storage that holds run_dir.")
    ],
    settings: Settings = None,
    mount: Annotated[
        Path | None,
        typer.Option(
            help="Where that storage is mounted, here and in the pods. Without: the mount point "
            "above run_dir.",
            show_default=False,
        ),
    ] = None,
    nodes: Annotated[
        int | None,
        typer.Option(min=1, help="Machines. Without: launch.nodes.", show_default=False),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory of each node, such as 256Gi.", show_default=False)
    ] = None,
    namespace: Annotated[
        str | None,
        typer.Option(help="Without: that of kubectl's context.", show_default=False),
    ] = None,
    runtime: Annotated[
        str, typer.Option(help="ClusterTrainingRuntime that starts torchrun.")
    ] = "torch-distributed",
) -> None:
    """Write a training's job file into run_dir, and print a Kubeflow TrainJob that runs it.

    The stages before it must be done. When the job has completed, `grace run` with the same
    configuration finds its result on the storage and goes on. The manifest is validated against the
    published schema; it has not been run on a cluster. See docs/kubernetes.md.
    """
    import yaml

    from grace_core.launch.backend import Program
    from grace_core.launch.kubernetes import Pods, train_job
    from grace_core.stages.training_plan import write_job

    resolved = load_config(config, settings or [])
    resolved = resolved.model_copy(update={"run_dir": resolved.run_dir.absolute()})
    many = nodes or resolved.launch.nodes
    _require_rows(resolved, stage, many)
    plan = _planned(resolved, stage)
    job = plan.job
    if plan.artifact.is_dir() or job.result.is_dir():
        raise GraceError(f"stage {stage} is trained already; continue with `grace run {config}`")
    teacher = [path for path in (job.teacher, job.teacher_outputs) if path is not None]
    needed = [path.absolute() for path in (job.work, job.data, job.student, *teacher)]
    pods = Pods(
        image,
        claim,
        mount or _mount_point(resolved.run_dir),
        many,
        namespace=namespace,
        runtime=runtime,
        memory=memory,
    )
    file = job.work / "job.json"
    manifest = train_job(
        Program(stage, "grace_core.training.worker", [str(file)], job.work),
        resolved.launch,
        pods,
        name=f"{resolved.name}-{plan.artifact.name}",
        needed=needed,
    )
    absolute = {
        "data": job.data.absolute(),
        "student": job.student.absolute(),
        "teacher": None if job.teacher is None else job.teacher.absolute(),
        "teacher_outputs": None if job.teacher_outputs is None else job.teacher_outputs.absolute(),
    }
    written = write_job(job.model_copy(update=absolute))
    assert written == file, "the manifest names the file that is written"
    typer.echo(yaml.safe_dump(manifest, sort_keys=False, width=100), nl=False)


def _planned(config: GraceConfig, stage: TrainingStageName) -> TrainingPlan:
    """The stage's plan; raises GraceError where a stage before it is not done."""
    from grace_core import stages
    from grace_core.stages import StageContext
    from grace_core.stages.training_plan import plan_bf16, plan_quantized, plan_teacher

    done = StageContext(finished_only=True)
    data = stages.prepare_data(config, done)
    if stage == "teacher":
        if config.teacher_fit is None:
            raise GraceError("the configuration has no section teacher_fit, and fits no teacher")
        return plan_teacher(config, data)
    teacher = stages.fit_teacher(config, data, done) if config.teacher_fit else None
    if config.records_teacher:
        teacher = stages.record_teacher(config, data, teacher, done)
    if stage == "bf16":
        return plan_bf16(config, data, teacher)
    trained = "bf16" in config.students
    bf16 = stages.distill(config, data, teacher, done) if trained else None
    return plan_quantized(config, stage, data, teacher, bf16)


def _require_rows(config: GraceConfig, stage: TrainingStageName, nodes: int) -> None:
    """The rule of the configuration, for the number of nodes given here."""
    from grace_core.doctor.memory import training_stages

    section = training_stages(config).get(stage)
    ranks = nodes * config.launch.processes
    if section is not None and section.training.rows_per_step % ranks:
        raise GraceError(
            f"rows_per_step ({section.training.rows_per_step}) is not a multiple of the "
            f"{ranks} ranks ({nodes} nodes x {config.launch.processes} processes); give other "
            "--nodes, or set it to a multiple"
        )


def _mount_point(folder: Path) -> Path:
    """Where the file system that holds `folder` is mounted."""
    path = folder.resolve()
    while not path.is_mount():
        path = path.parent
    return path
