"""A training stage as a `TrainJob` of Kubeflow Trainer, to be handed to `kubectl apply`.

The runtime `torch-distributed` is used: it gives every pod what torchrun asks for (PET_NNODES,
PET_NODE_RANK, PET_MASTER_ADDR and so on), and the pods run torchrun, as on one machine. The runtime
`deepspeed-distributed` starts ranks with MPI over ssh instead, which the worker does not speak.

Rendered and validated, not run: `launch.backend` has no Kubernetes, and nothing here talks to one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grace_core.config.launch import Launch
from grace_core.errors import GraceError
from grace_core.launch.backend import Program, rank_settings

API_VERSION = "trainer.kubeflow.org/v1alpha1"
TORCH_RUNTIME = "torch-distributed"
TRAINER = "node"
"""Name of the runtime's replicated job and of its container; the trainer's in every runtime."""

_MANAGER = "grace-pipeline/kubernetes"  # a domain and a path, as the webhook demands
_GPU = "nvidia.com/gpu"
_NAME_LENGTH = 50  # of 63: the pods' names are made of it
_SECONDS_TO_END = 15  # of a pod, after its ranks have ended


@dataclass(frozen=True)
class Pods:
    """What of the cluster a configuration does not say."""

    image: str
    claim: str
    """Persistent volume claim of the shared storage that holds the run."""
    mount: Path
    """Where that storage is mounted here, and in the pods: paths stay the same."""
    nodes: int
    namespace: str | None = None
    """None: that of kubectl's context."""
    runtime: str = TORCH_RUNTIME
    memory: str | None = None
    """Of each node, as Kubernetes writes quantities, such as 256Gi; None sets no limit."""


def train_job(
    program: Program,
    launch: Launch,
    pods: Pods,
    *,
    name: str,
    needed: Iterable[Path],
) -> dict[str, Any]:
    """The manifest of a `TrainJob` that runs `program` in `pods.nodes` x `launch.processes` ranks.

    name: of the run and its stage, made fit for Kubernetes; needed: every path that the ranks read
    or write.

    Raises GraceError when a path is not on the shared storage, or the storage's place cannot be
    mounted over in a container.
    """
    if not pods.mount.is_absolute() or pods.mount == Path("/"):
        raise GraceError(
            f"--mount {pods.mount}: name the folder where the shared storage is mounted, the same "
            "here and in the pods, such as /shared"
        )
    outside = sorted({str(path) for path in needed if not _is_on(path, pods.mount)})
    if outside:
        raise GraceError(
            f"not on the shared storage {pods.mount}, which is all that the pods see: "
            f"{', '.join(outside)}; move run_dir, the models or HF_HOME there"
        )
    metadata: dict[str, Any] = {
        "name": job_name(name),
        "labels": {
            "app.kubernetes.io/name": "grace-pipeline",
            "app.kubernetes.io/component": program.stage,
        },
    }
    if pods.namespace is not None:
        metadata["namespace"] = pods.namespace
    spec: dict[str, Any] = {
        "runtimeRef": {
            "apiGroup": API_VERSION.partition("/")[0],
            "kind": "ClusterTrainingRuntime",
            "name": pods.runtime,
        },
        "trainer": _trainer(program, launch, pods),
        "runtimePatches": [_volumes(launch, pods)],
    }
    if launch.timeout_hours is not None:
        spec["activeDeadlineSeconds"] = math.ceil(3600 * launch.timeout_hours)
    return {"apiVersion": API_VERSION, "kind": "TrainJob", "metadata": metadata, "spec": spec}


def job_name(text: str) -> str:
    """A DNS label: lower case, letters first, no more than 50 characters; the end is kept."""
    label = re.sub(r"[^a-z0-9]+", "-", text.lower())[-_NAME_LENGTH:].strip("-")
    return label if label[:1].isalpha() else f"grace-{label}"


def _is_on(path: Path, mount: Path) -> bool:
    """Both as it is named and as its links lead: a link out of the storage leads nowhere there."""
    return path.is_relative_to(mount) and path.resolve().is_relative_to(mount.resolve())


def _trainer(program: Program, launch: Launch, pods: Pods) -> Mapping[str, Any]:
    ranks = program.logs / "ranks"
    settings = {
        **rank_settings(launch),
        "HF_HUB_OFFLINE": "1",  # everything is on the storage
        "HOME": "/tmp",  # the image's user may own none; libraries cache there
    }
    return {
        "image": pods.image,
        # Nodes, ranks and the meeting point come from the runtime's PET_ variables.
        "command": ["python", "-m", "torch.distributed.run"],
        "args": [
            *(f"--log-dir={ranks}", "--redirects=3", "--tee=3"),
            *("-m", program.module, *program.arguments),
        ],
        "numNodes": pods.nodes,
        "numProcPerNode": launch.processes,
        "env": [{"name": key, "value": value} for key, value in settings.items()],
        "resourcesPerNode": _resources(launch, pods),
    }


def _resources(launch: Launch, pods: Pods) -> Mapping[str, Any]:
    """GPUs are limits; Kubernetes asks for as many as it limits them to."""
    cores = launch.processes * launch.threads_per_process
    requests, limits = {"cpu": str(cores)}, {}
    if launch.device != "cpu":
        limits[_GPU] = str(launch.processes)
    if pods.memory is not None:
        requests["memory"] = limits["memory"] = pods.memory
    return {"requests": requests, "limits": limits} if limits else {"requests": requests}


def _volumes(launch: Launch, pods: Pods) -> Mapping[str, Any]:
    """Storage and shared memory, which the runtime's own pods have not."""
    pod = {
        "terminationGracePeriodSeconds": math.ceil(launch.grace_seconds) + _SECONDS_TO_END,
        "volumes": [
            {"name": "run", "persistentVolumeClaim": {"claimName": pods.claim}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
        "containers": [
            {
                "name": TRAINER,
                "volumeMounts": [
                    {"name": "run", "mountPath": str(pods.mount)},
                    {"name": "shm", "mountPath": "/dev/shm"},
                ],
            }
        ],
    }
    job = {"name": TRAINER, "template": {"spec": {"template": {"spec": pod}}}}
    runtime = {"template": {"spec": {"replicatedJobs": [job]}}}
    return {"manager": _MANAGER, "trainingRuntimeSpec": runtime}
