"""What is submitted to Kubernetes, AWS Batch and docker, held against their own schemas: those of their Python clients.

What Volcano's job definition and its admission webhook ask for is written down here, from volcano-sh/volcano:
config/crd/volcano/bases/batch.volcano.sh_jobs.yaml and pkg/webhooks/admission/jobs/validate.
"""

import re
from typing import Any

import botocore.session
import botocore.validate
import docker.models.containers
import kubernetes.client
import pytest
from torchx.runner import get_runner
from torchx.schedulers import ids
from torchx.schedulers.kubernetes_scheduler import sanitize_for_serialization

from launch import components, dist

LONG = "x" * 32
APPS = {
    "train": lambda: components.train(
        config="configs/My config_1 (copy).yaml",
        j="2x8",
        gpu=8,
        max_retries=3,
        interface="eth0",
        mounts=[
            *("type=bind", "src=/data", "dst=/data", "readonly", "type=volume", "src=outputs", "dst=/app/outputs"),
            *("type=device", "src=/dev/infiniband/uverbs0"),
        ],
    ),
    "elastic": lambda: components.train(j="2:12x1", name=f"{LONG}/{LONG}"),
    "evaluate": lambda: components.evaluate(checkpoint="x", j="11x1", name=LONG),
    "predict": lambda: components.predict(input=["a"], output="b", artifact="c", name="A1"),
    "export": lambda: components.export(checkpoint="x", output="y", max_retries=1),
    "tensorboard": lambda: components.tensorboard(host="0.0.0.0", name=LONG),
    "ddp": lambda: dist.ddp("recsys/train.py", j="2x4", max_retries=1),
}

QUANTITY = re.compile(r"(\d+|\d+\.\d+)(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?")
LABEL = re.compile(r"([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?")
DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
SERVICE = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")  # Volcano makes one of a job's name


def faults(value: Any, kind: str, path: str) -> list[str]:
    """What of a part of a request is no such kind, as the client's models name kinds: fields, types, what must be."""
    if item := re.fullmatch(r"list\[(.*)]", kind):
        if not isinstance(value, list):
            return [f"{path}: no list"]
        return [fault for number, part in enumerate(value) for fault in faults(part, item[1], f"{path}[{number}]")]
    if entry := re.fullmatch(r"dict[(\[]str, (.*)[)\]]", kind):
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            return [f"{path}: no mapping of strings"]
        return [fault for key, part in value.items() for fault in faults(part, entry[1], f"{path}.{key}")]
    plain = {"str": str, "int": int, "bool": bool}
    if kind in plain:
        return [] if type(value) is plain[kind] else [f"{path}: {value!r} is no {kind}"]
    model = getattr(kubernetes.client, kind)
    fields = {name: attribute for attribute, name in model.attribute_map.items()}
    if not isinstance(value, dict):
        return [f"{path}: no {kind}"]
    found = [f"{path}.{key}: unknown to {kind}" for key in value.keys() - fields.keys()]
    try:
        model(**{fields[key]: part for key, part in value.items() if key in fields})
    except ValueError as error:
        found.append(f"{path}: {error}")
    for key in value.keys() & fields.keys():
        found += faults(value[key], model.openapi_types[fields[key]], f"{path}.{key}")
    return found


JOB = {
    "schedulerName": "str",
    "queue": "str",
    "maxRetry": "int",
    "priorityClassName": "str",
    "plugins": "dict(str, list[str])",
}
TASK = {"name": "str", "replicas": "int", "minAvailable": "int", "maxRetry": "int", "template": "V1PodTemplateSpec"}
PLUGINS = {"env", "ssh", "svc", "tensorflow", "mpi", "pytorch", "ray", "hcclrank"}
EVENTS = {"*", "PodPending", "PodFailed", "PodEvicted", "Unknown", "TaskCompleted", "TaskFailed", "JobUpdated"}
ACTIONS = {
    *("AbortJob", "RestartJob", "RestartTask", "RestartPod", "RestartPartition", "TerminateJob", "CompleteJob"),
    "ResumeJob",
}


def volcano_faults(job: dict[str, Any]) -> list[str]:
    """What Volcano would refuse of a job, its pods as Kubernetes would."""
    assert job.keys() == {"apiVersion", "kind", "metadata", "spec"}
    assert (job["apiVersion"], job["kind"]) == ("batch.volcano.sh/v1alpha1", "Job")
    name, spec = job["metadata"]["name"], job["spec"]
    found = [] if SERVICE.fullmatch(name) else [f"name {name}"]
    found += [f"job.{key}: unknown" for key in spec.keys() - JOB.keys() - {"tasks"}]
    for key in spec.keys() & JOB.keys():
        found += faults(spec[key], JOB[key], f"job.{key}")
    found += [f"plugin {plugin}" for plugin in spec["plugins"].keys() - PLUGINS]
    tasks = spec["tasks"]
    if not tasks or len({task["name"] for task in tasks}) < len(tasks):
        found.append("names of tasks")
    for number, task in enumerate(tasks):
        path = f"tasks[{number}]"
        found += [f"{path}.{key}: unknown" for key in task.keys() - TASK.keys() - {"policies"}]
        for key in task.keys() & TASK.keys():
            found += faults(task[key], TASK[key], f"{path}.{key}")
        if not 0 <= task.get("minAvailable", 0) <= task["replicas"]:
            found.append(f"{path}.minAvailable")
        pod = f"{name}-{task['name']}-0"
        found += [f"{path}: name {text}" for text in (task["name"], pod) if not DNS_LABEL.fullmatch(text)]
        found += policy_faults(task.get("policies", []), path)
        found += pod_faults(task["template"], path)
    return found


def policy_faults(policies: list[dict[str, Any]], path: str) -> list[str]:
    found = [
        f"{path}: policy {policy}"
        for policy in policies
        if policy.keys() not in ({"event", "action"}, {"exitCode", "action"})
        or policy.get("event", "*") not in EVENTS
        or policy["action"] not in ACTIONS
        or policy.get("exitCode", 1) == 0
    ]
    seen = [policy.get("event", policy.get("exitCode")) for policy in policies]
    return found if len(seen) == len(set(seen)) else [*found, f"{path}: the same policy twice"]


def pod_faults(template: dict[str, Any], path: str) -> list[str]:
    """What types do not tell: texts of labels, names and quantities, and that volumes are those that are mounted."""
    labels, spec = template["metadata"]["labels"], template["spec"]
    found = [f"{path}: label {key}={value}" for key, value in labels.items() if not LABEL.fullmatch(value)]
    volumes = [volume["name"] for volume in spec["volumes"]]
    for container in spec["containers"]:
        mounts = container["volumeMounts"]
        if sorted(mount["name"] for mount in mounts) != sorted(volumes):
            found.append(f"{path}: volumes")
        if len({mount["mountPath"] for mount in mounts}) < len(mounts):
            found.append(f"{path}: two volumes at one place")
        limits, requests = container["resources"]["limits"], container["resources"]["requests"]
        found += [f"{path}: {text}" for text in [*limits.values(), *requests.values()] if not QUANTITY.fullmatch(text)]
        found += [f"{path}: port {port}" for port in container["ports"] if not 0 < port["containerPort"] < 65536]
        found += [f"{path}: name of a container"] if not DNS_LABEL.fullmatch(container.get("name", "")) else []
    return found


@pytest.fixture(autouse=True)
def _ids_are_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ids, "random_id", lambda: "x" * 14)


def submitted(app: Any, scheduler: str, **cfg: str) -> Any:
    with get_runner("snapshot") as runner:
        return runner.dryrun(app, scheduler, cfg={"queue": "train", **cfg}).request


@pytest.mark.filterwarnings("ignore:\\s*Role \\w+ configured with restarts")
@pytest.mark.parametrize("app", APPS)
def test_volcano_and_kubernetes_take_what_is_submitted(app: str) -> None:
    request = submitted(APPS[app](), "kubernetes", priority_class="high", service_account="trainer")
    assert volcano_faults(sanitize_for_serialization(request.resource)) == []


def test_what_they_would_not_take_is_found() -> None:
    """The checks above can fail: each of these is one fault, or more, of a job that has none."""

    def broken(change: str) -> list[str]:
        tree = sanitize_for_serialization(submitted(APPS["train"](), "kubernetes").resource)
        task = tree["spec"]["tasks"][0]
        exec(change, {"tree": tree, "task": task, "pod": task["template"]["spec"]})
        return volcano_faults(tree)

    assert broken("") == []
    for change, told in {
        "tree['metadata']['name'] = '1x'": "name 1x",
        "tree['spec']['retries'] = 1": "job.retries: unknown",
        "tree['spec']['maxRetry'] = '1'": "job.maxRetry: '1' is no int",
        "task['minAvailable'] = 2": "minAvailable",
        "task['policies'].append({'event': 'PodFailed', 'exitCode': 3, 'action': 'RestartJob'})": "policy",
        "task['policies'].append({'exitCode': 2, 'action': 'RestartJob'})": "twice",
        "task['template']['metadata']['labels']['a'] = 'no spaces'": "label a=no spaces",
        "pod['containers'][0]['env'][0]['value'] = 1": "env[0].value: 1 is no str",
        "pod['containers'][0]['gpus'] = 1": "gpus: unknown to V1Container",
        "del pod['containers'][0]['volumeMounts'][1]": "volumes",
        "del pod['containers'][0]['name']": "Invalid value for `name`",
        "pod['containers'][0]['resources']['limits']['memory'] = '8 GB'": "8 GB",
        "pod['volumes'][0]['emptyDir'] = []": "no V1EmptyDirVolumeSource",
    }.items():
        assert any(told in fault for fault in broken(change)), change


@pytest.mark.filterwarnings("ignore:\\s*Role \\w+ configured with restarts")
def test_a_job_has_what_training_needs_of_a_pod() -> None:
    tree = sanitize_for_serialization(submitted(APPS["train"](), "kubernetes").resource)
    for number, task in enumerate(tree["spec"]["tasks"]):
        pod = task["template"]["spec"]
        (container,) = pod["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"
        assert {"name": "dshm", "mountPath": "/dev/shm"} in container["volumeMounts"]
        assert {"name": "dshm", "emptyDir": {"medium": "Memory"}} in pod["volumes"]
        claim = {"name": "mount-1", "persistentVolumeClaim": {"claimName": "outputs"}}
        assert claim in pod["volumes"]
        # The first node holds the store, the others find it by a variable that Volcano's plugin sets.
        first = "TORCHX_RANK0_HOST" if number == 0 else "VC_TRAIN_0_HOSTS"
        port = container["ports"][0]["containerPort"]
        assert f"--rdzv_endpoint ${{{first}:=localhost}}:{port} " in container["command"][2]
        assert pod["terminationGracePeriodSeconds"] == 330
        assert pod["restartPolicy"] == "Never"
        assert task["minAvailable"] == 1
        assert task["policies"][0] == {"exitCode": 2, "action": "TerminateJob"}
        assert task["maxRetry"] == 4
    assert tree["spec"]["maxRetry"] == 4  # the first run and three retries
    assert tree["spec"]["plugins"].keys() == {"env", "svc"}


@pytest.mark.parametrize("app", APPS)
def test_aws_batch_takes_what_is_submitted(app: str) -> None:
    request = submitted(APPS[app](), "aws_batch", user="someone", share_id="a", job_role_arn="arn:aws:iam::1:role/x")
    shape = (
        botocore.session.get_session().get_service_model("batch").operation_model("RegisterJobDefinition").input_shape
    )
    report = botocore.validate.ParamValidator().validate(request.job_def, shape)
    assert not report.has_errors(), report.generate_report()
    assert re.fullmatch(r"[A-Za-z0-9][\w-]{0,127}", request.name, re.ASCII)
    assert 1 <= request.job_def["retryStrategy"]["attempts"] <= 10
    broken = botocore.validate.ParamValidator().validate({**request.job_def, "retryStrategy": {"tries": 1}}, shape)
    assert broken.has_errors()


@pytest.mark.parametrize("app", APPS)
def test_docker_takes_what_is_submitted(app: str) -> None:
    request = submitted(APPS[app](), "local_docker")
    for container in request.containers:
        # As its client makes a request of it, and refuses what it does not know.
        given = {**container.kwargs, "image": container.image, "command": container.command, "version": "1.44"}
        body = docker.models.containers._create_container_args(given)
        assert body["hostname"] == body["name"]
        assert re.fullmatch(r"[A-Za-z0-9][\w.-]+", body["name"], re.ASCII) and len(body["name"]) < 64
        assert body["host_config"]["ShmSize"] == body["host_config"]["Memory"] > 0
        with pytest.raises(TypeError):
            docker.models.containers._create_container_args({**given, "gpus": 1})
