"""Kubernetes, rendered: manifests and the work pool against the published schemas.

No cluster: the pods are played by processes that get what the runtime gives a pod.
"""

from __future__ import annotations

import asyncio
import copy
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import prefect
import pytest
import yaml
from kubeflow_trainer_api.models.io_k8s_api_batch_v1_job import IoK8sApiBatchV1Job
from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob
from prefect.client.orchestration import PrefectClient
from prefect.server.schemas.actions import WorkPoolCreate
from prefect.workers.base import BaseJobConfiguration
from pydantic import ValidationError
from typer.testing import CliRunner

from grace_core import stages
from grace_core.artifacts import find_artifact
from grace_core.cli.app import app
from grace_core.config import load_config
from grace_core.errors import GraceError
from grace_core.events import Event
from grace_core.launch.backend import Program
from grace_core.launch.kubernetes import Pods, job_name, train_job
from grace_core.stages import StageContext
from grace_core.training.job import TrainingJob

ROOT = Path(__file__).resolve().parent.parent
POOL = ROOT / "configs/work-pools/kubernetes.json"
SECRET = "hf_NeverToBeSeenAnywhere"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_TOKEN", SECRET)


def same_in_the_schema(manifest: dict[str, Any], model: Any = TrainerV1alpha1TrainJob) -> bool:
    """Whether the published model takes the manifest and gives back every key of it.

    Raises ValidationError for a value of another type; a key it does not know, it drops.
    """
    return bool(model.from_dict(copy.deepcopy(manifest)).to_dict() == manifest)


def rendered(*overrides: str, pods: Pods | None = None, name: str = "run-bf16-1") -> dict[str, Any]:
    launch = load_config("configs/qwen3vl-8b-to-2b.yaml", overrides).launch
    work = Path("/shared/run/work/bf16-1")
    program = Program("bf16", "grace_core.training.worker", [str(work / "job.json")], work)
    pods = pods or Pods("registry/grace:1", "storage", Path("/shared"), nodes=4, namespace="ml")
    return train_job(program, launch, pods, name=name, needed=[work])


def inner(manifest: dict[str, Any], *keys: str | int) -> Any:
    value: Any = manifest
    for key in keys:
        value = value[key]
    return value


POD = (
    *("spec", "runtimePatches", 0, "trainingRuntimeSpec", "template", "spec", "replicatedJobs", 0),
    *("template", "spec", "template", "spec"),
)


@pytest.mark.parametrize(
    "overrides", [[], ["launch.timeout_hours=1.5"], ["launch.device=cpu"], ["launch.device=auto"]]
)
def test_a_manifest_is_what_the_published_schema_knows(overrides: list[str]) -> None:
    assert same_in_the_schema(rendered(*overrides))
    small = Pods("image", "storage", Path("/shared"), nodes=1, memory="256Gi")
    assert same_in_the_schema(rendered(*overrides, pods=small))


@pytest.mark.parametrize(
    "place",
    [(), ("metadata",), ("spec",), ("spec", "runtimeRef"), ("spec", "trainer"), POD],
    ids=lambda place: "/".join(map(str, place[-2:])),
)
def test_a_misspelt_key_is_noticed(place: tuple[str | int, ...]) -> None:
    """What the check above is worth: each level, with one key more."""
    manifest = rendered()
    inner(manifest, *place)["numNode"] = 2
    assert not same_in_the_schema(manifest)


def test_a_value_of_another_type_is_noticed() -> None:
    manifest = rendered()
    manifest["spec"]["trainer"]["numNodes"] = "4"
    with pytest.raises(ValidationError):
        same_in_the_schema(manifest)


def test_the_pods_get_gpus_storage_and_shared_memory() -> None:
    manifest = rendered("launch.timeout_hours=1.5")
    trainer = manifest["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (4, 8)
    assert trainer["resourcesPerNode"]["limits"] == {"nvidia.com/gpu": "8"}
    assert manifest["spec"]["activeDeadlineSeconds"] == 5400
    pod = inner(manifest, *POD)
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "storage"}
    assert pod["volumes"][1]["emptyDir"] == {"medium": "Memory"}
    mounts = {m["name"]: m["mountPath"] for m in pod["containers"][0]["volumeMounts"]}
    assert mounts == {"run": "/shared", "shm": "/dev/shm"}
    assert pod["terminationGracePeriodSeconds"] > 20, "a training has that long to save"
    on_cpu = rendered("launch.device=cpu")["spec"]["trainer"]["resourcesPerNode"]
    assert on_cpu == {"requests": {"cpu": "64"}}


def test_no_secret_and_no_reserved_variable_is_in_a_manifest() -> None:
    """Kubeflow's webhook refuses what its runtime sets itself."""
    manifest = rendered()
    names = {variable["name"] for variable in manifest["spec"]["trainer"]["env"]}
    assert not {name for name in names if name.startswith("PET_")}
    assert "OMP_NUM_THREADS" in names
    assert SECRET not in json.dumps(manifest)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("demo-bf16-0123456789ab", "demo-bf16-0123456789ab"),
        ("Qwen3.VL_8b-w4-0123", "qwen3-vl-8b-w4-0123"),
        ("8b-bf16-01", "grace-8b-bf16-01"),
        ("x" * 60 + "-bf16-0123456789ab", "x" * 32 + "-bf16-0123456789ab"),
    ],
)
def test_names_are_dns_labels(given: str, name: str) -> None:
    assert job_name(given) == name
    assert len(name) <= 63


@pytest.mark.parametrize("mount", ["/", "shared"])
def test_storage_must_have_a_place_of_its_own(mount: str) -> None:
    with pytest.raises(GraceError, match="name the folder where the shared storage is mounted"):
        rendered(pods=Pods("image", "storage", Path(mount), nodes=1))


def test_what_the_pods_could_not_see_is_named(tmp_path: Path) -> None:
    with pytest.raises(GraceError, match=r"not on the shared storage /other.*: /shared/run"):
        rendered(pods=Pods("image", "storage", Path("/other"), nodes=1))
    # A link that leads out of the storage leads nowhere in a pod.
    (tmp_path / "models").symlink_to("/usr")
    program = Program("bf16", "module", [], tmp_path)
    launch = load_config("configs/toy.yaml").launch
    with pytest.raises(GraceError, match="models"):
        train_job(
            program,
            launch,
            Pods("image", "storage", tmp_path, nodes=1),
            name="run",
            needed=[tmp_path / "models"],
        )


# The command, and a training by the pods' own commands


def printed(*arguments: str) -> str:
    """What `grace kubernetes configs/toy.yaml` prints; raises what it raises."""
    command = ["kubernetes", "configs/toy.yaml", *arguments]
    return CliRunner().invoke(app, command, catch_exceptions=False).stdout


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def prepared(storage: Path) -> list[str]:
    """Settings of a tiny run on a storage of its own, models included; its data are prepared."""
    for role in ("teacher", "student"):
        (storage / role).mkdir()
        for file in (ROOT / "assets/toy" / role).iterdir():
            (storage / role / file.name).write_bytes(file.read_bytes())
    settings = [
        f"run_dir={storage}/run",
        f"models.teacher.path={storage}/teacher",
        f"models.student.path={storage}/student",
        "data.source.records=40",
        "distill.training.steps=2",
        "launch.processes=1",
    ]
    stages.prepare_data(load_config(ROOT / "configs/toy.yaml", settings), StageContext())
    return settings


def options(settings: list[str], mount: Path, *more: str) -> list[str]:
    pairs = [word for setting in settings for word in ("--set", setting)]
    return [*pairs, "--image", "image", "--claim", "storage", "--mount", str(mount), *more]


@pytest.mark.slow
def test_the_stages_before_must_be_done(storage: Path, prepared: list[str]) -> None:
    with pytest.raises(GraceError, match="stage bf16 is not done"):
        printed("w4", *options(prepared, storage))
    with pytest.raises(GraceError, match="no section teacher_fit"):
        printed("teacher", *options(prepared, storage))
    with pytest.raises(GraceError, match=r"rows_per_step \(4\) is not a multiple of the 3 ranks"):
        printed("bf16", *options(prepared, storage, "--nodes", "3"))


def pods(manifest: dict[str, Any]) -> Iterator[subprocess.Popen[bytes]]:
    """One process a node, with what the runtime `torch-distributed` gives its pod."""
    trainer = manifest["spec"]["trainer"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **{name: value for name, value in os.environ.items() if name != "HF_TOKEN"},
        **{variable["name"]: variable["value"] for variable in trainer["env"]},
        "PET_NNODES": str(trainer["numNodes"]),
        "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
        "PET_MASTER_ADDR": "127.0.0.1",
        "PET_MASTER_PORT": str(port),
    }
    command = [*trainer["command"], *trainer["args"]]
    assert command[0] == "python"
    for node in range(trainer["numNodes"]):
        yield subprocess.Popen(
            [sys.executable, *command[1:]],
            env={**environment, "PET_NODE_RANK": str(node)},
            cwd="/",  # a container knows nothing of where the manifest was made
        )


@pytest.mark.slow
def test_a_run_goes_on_with_what_the_pods_left(storage: Path, prepared: list[str]) -> None:
    text = printed("bf16", *options(prepared, storage, "--nodes", "2"))
    manifest = yaml.safe_load(text)
    assert same_in_the_schema(manifest)
    assert SECRET not in text
    file = Path(manifest["spec"]["trainer"]["args"][-1])
    job = TrainingJob.model_validate_json(file.read_text())
    assert job.training.steps == 2 and job.student == storage / "student"

    assert [pod.wait(timeout=300) for pod in list(pods(manifest))] == [0, 0]
    assert (job.result / "model.safetensors").is_file()
    with pytest.raises(GraceError, match="stage bf16 is trained already"):
        printed("bf16", *options(prepared, storage))

    config = load_config("configs/toy.yaml", prepared)
    trained = (job.result / "model.safetensors").read_bytes()
    events: list[Event] = []
    data = stages.prepare_data(config, StageContext())
    made = stages.distill(config, data, None, StageContext(events.append))
    assert (made.path / "model" / "model.safetensors").read_bytes() == trained
    assert [event.step for event in events if event.kind == "train"] == [1, 2]
    assert find_artifact(made.path) is not None


# The work pool


class KubernetesConfiguration(BaseJobConfiguration):
    """The fields that Prefect's Kubernetes worker has besides the common ones."""

    namespace: str
    job_manifest: dict[str, Any]
    cluster_config: Any = None
    job_watch_timeout_seconds: int | None = None
    pod_watch_timeout_seconds: int
    stream_output: bool


@pytest.fixture
def template() -> dict[str, Any]:
    return dict(json.loads(POOL.read_text()))


@pytest.fixture
def published() -> dict[str, Any]:
    """The template of Prefect's own registry, for the version that is installed."""
    registry = "server/api/collections_data/views/aggregate-worker-metadata.json"
    file = Path(prefect.__file__).parent / registry
    worker = json.loads(file.read_text())["prefect-kubernetes"]["kubernetes"]
    return dict(worker["default_base_job_configuration"])


def configured(template: dict[str, Any], values: dict[str, Any]) -> KubernetesConfiguration:
    """As a worker makes it: defaults, then what a deployment or a run gives."""
    jsonschema.validate(values, template["variables"])
    make = KubernetesConfiguration.from_template_and_values
    nobody = PrefectClient("http://127.0.0.1:9/api")  # a template without blocks asks no server
    return asyncio.run(make(template, values, client=nobody))


def leaves(value: Any, place: tuple[str | int, ...] = ()) -> Iterator[tuple[Any, Any]]:
    items: Any = []
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        yield place, value
    for key, item in items:
        yield from leaves(item, (*place, key))


def test_the_pool_is_the_published_template_and_ours(
    template: dict[str, Any], published: dict[str, Any]
) -> None:
    ours = dict(leaves(template["job_configuration"]))
    missing = {
        place for place, value in leaves(published["job_configuration"]) if ours.get(place) != value
    }
    assert not missing
    names = template["variables"]["properties"].keys() - published["variables"]["properties"].keys()
    assert names == {
        *("gpus", "claim", "mount", "shm_size", "node_selector", "tolerations"),
        "termination_grace_seconds",
    }
    assert published["variables"]["properties"].keys() <= template["variables"]["properties"].keys()


def test_the_server_takes_the_template(template: dict[str, Any]) -> None:
    pool = {"name": "grace-kubernetes", "type": "kubernetes", "base_job_template": template}
    assert WorkPoolCreate.model_validate(pool).base_job_template == template
    del template["variables"]["properties"]["claim"]
    with pytest.raises(ValidationError, match="claim"):
        WorkPoolCreate.model_validate(pool)
    jsonschema.Draft202012Validator.check_schema(template["variables"])


def as_job(configuration: KubernetesConfiguration) -> dict[str, Any]:
    """The manifest as the worker submits it: environment as a list.

    Without two keys that the published template has in a pod, where Kubernetes knows none; the
    server drops them.
    """
    manifest = copy.deepcopy(configuration.job_manifest)
    pod = manifest["spec"]["template"]["spec"]
    assert (pod.pop("parallelism"), pod.pop("completions")) == (1, 1)
    environment = configuration.env.items()
    pod["containers"][0]["env"] = [{"name": key, "value": value} for key, value in environment]
    pod["containers"][0]["args"] = ["prefect", "flow-run", "execute"]
    return manifest


def test_defaults_and_overrides_make_a_job(template: dict[str, Any]) -> None:
    given = {"image": "registry/grace:1", "claim": "storage", "env": {"HF_HOME": "/shared/hf"}}
    configuration = configured(template, given)
    assert configuration.env == {
        "HF_HOME": "/shared/hf",
        "PREFECT_CLIENT_MAX_RETRIES": "7",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR": "reschedule",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "grace_core,tasks,operations",
    }
    job = as_job(configuration)
    assert same_in_the_schema(job, IoK8sApiBatchV1Job)
    assert job["spec"]["backoffLimit"] == 0, "a rescheduled run must not be started twice"
    pod = job["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"

    more: dict[str, Any] = {
        **given,
        "gpus": "8",
        "mount": "/data",
        "shm_size": "64Gi",
        "memory_limit": "512Gi",
        "node_selector": {"gpu": "h100"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        "termination_grace_seconds": 90,
    }
    job = as_job(configured(template, more))
    assert same_in_the_schema(job, IoK8sApiBatchV1Job)
    pod = job["spec"]["template"]["spec"]
    limits = {"nvidia.com/gpu": "8", "memory": "512Gi"}
    assert pod["containers"][0]["resources"]["limits"] == limits
    assert pod["volumes"][1]["emptyDir"] == {"medium": "Memory", "sizeLimit": "64Gi"}
    assert pod["containers"][0]["volumeMounts"][0] == {"name": "run", "mountPath": "/data"}
    assert (pod["nodeSelector"], pod["terminationGracePeriodSeconds"]) == ({"gpu": "h100"}, 90)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.pop("claim"),
        lambda values: values.update(gpus="two"),
        lambda values: values.update(mount="shared"),
        lambda values: values.update(termination_grace_seconds=10),
    ],
)
def test_wrong_variables_are_refused(
    template: dict[str, Any], change: Callable[[dict[str, Any]], object]
) -> None:
    values: dict[str, Any] = {"image": "image", "claim": "storage"}
    jsonschema.validate(values, template["variables"])
    change(values)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values, template["variables"])
