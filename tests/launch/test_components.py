import inspect
import json
import os
import random
import re
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torchx
import yaml
from torchx.components import dist as stock
from torchx.runner import get_runner
from torchx.schedulers import ids
from torchx.schedulers.kubernetes_scheduler import KubernetesJob, sanitize_for_serialization
from torchx.schedulers.slurm_scheduler import SlurmBatchRequest, SlurmScheduler
from torchx.specs.finder import ComponentValidationException, get_components

from launch import components, dist
from recsys import lifetime

SNAPSHOTS = Path(__file__).parent / "snapshots"
SCHEDULERS = {"local_cwd": {}, "slurm": {"partition": "train"}, "kubernetes": {"queue": "train"}}
LINES = {
    "dist.ddp": [
        "-j",
        "1x4",
        "recsys/train.py",
        "--config",
        "configs/x.yaml",
        "stages.joint.learning_rate=1e-4",
    ],
    "hilorec.train": [
        *(
            "--config",
            "configs/production.yaml",
            "-j",
            "2x8",
            "--cpu",
            "64",
            "--gpu",
            "8",
            "--memMB",
            "262144",
        ),
        *("--env", "NCCL_DEBUG=WARN,NCCL_IB_HCA=mlx5_0,mlx5_1", "--max_retries", "3"),
        *("--mounts", "type=bind,src=/data,dst=/data,readonly"),
        *("--image", "registry.example/hilorec:1", "stages.joint.learning_rate=1e-4", "note=two words"),
    ],
}


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("TORCH", "PET_")) or name == "LOGLEVEL"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setattr(dist, "_free_port", lambda: 20500)
    monkeypatch.setattr(SlurmScheduler, "_partition_memmb", lambda *_: None)  # of a cluster that may be at hand


@pytest.mark.filterwarnings("ignore:\\s*Role train configured with restarts")
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("component", LINES)
def test_request_is_the_kept_one(component, scheduler, monkeypatch):
    monkeypatch.setattr(ids, "random_id", lambda: "id")
    with get_runner("snapshot") as runner:
        info = runner.dryrun_component(component, LINES[component], scheduler, cfg=SCHEDULERS[scheduler])
        request = _text(info.request)
    kept = SNAPSHOTS / f"{component}-{scheduler}.txt"
    if os.environ.get("UPDATE_SNAPSHOTS"):
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(request)
    assert request == kept.read_text()


def _text(request) -> str:
    """The request without what differs from machine to machine; no line's break depends on that."""
    if isinstance(request, SlurmBatchRequest):
        text = str(request)
    else:
        tree = request.resource if isinstance(request, KubernetesJob) else asdict(request)
        text = yaml.safe_dump(sanitize_for_serialization(tree), width=sys.maxsize)
    text = re.sub(r"/[^'\" ]*/torchx_\w+", "<logs>", text)
    text = re.sub(r"(HILOREC_LAUNCHER_PID(?:=|: '|\s+value: '))\d+", r"\1<launcher>", text)
    text = text.replace(str(Path.cwd()), "<cwd>")
    text = text.replace(torchx.IMAGE, "<image>")
    return text.replace(torchx.__version__, "<version>").strip() + "\n"


def ours_by_default(**more: str) -> dict[str, str]:
    """What our components put into the environment of two processes with two CPUs."""
    started = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300", "HILOREC_LAUNCHER_PID": str(os.getpid())}
    return {"OMP_NUM_THREADS": "1", **started, **more}


def as_stock(app) -> dict:
    """An application without what our roles know beside TorchX's."""
    tree = asdict(app)
    for role in tree["roles"]:
        del role["on_this_machine"]
    return tree


def test_positional_script_is_the_stock_script():
    ours = dist.ddp("recsys/train.py", "--config", "x.yaml", "a=b", j="2x4", max_retries=1, debug=True)
    theirs = stock.ddp(
        *("--config", "x.yaml", "a=b"),
        script="recsys/train.py",
        j="2x4",
        env=ours_by_default(PET_MAX_RESTARTS="1"),
        max_retries=1,
        rdzv_port=20500,
        debug=True,
    )
    assert as_stock(ours) == asdict(theirs)


def test_named_script_and_module_leave_positionals_alone():
    for target in ({"script": "x.py"}, {"m": "x.y"}):
        assert as_stock(dist.ddp("a", **target)) == asdict(stock.ddp("a", **target, env=ours_by_default()))


def test_spmd_takes_processes_from_the_host():
    app = dist.spmd("recsys/train.py", "a=b", j="2", h="gpu.xlarge")
    assert app.roles[0].num_replicas == 2
    assert "--nproc_per_node 8" in app.roles[0].args[1]
    assert app.roles[0].args[1].endswith("recsys/train.py a=b")


@pytest.mark.parametrize("name", ["ddp", "spmd"])
def test_signature_is_the_stock_one(name):
    theirs = inspect.signature(getattr(stock, name)).parameters.values()
    expected = [parameter.replace(default=0) if parameter.name == "rdzv_port" else parameter for parameter in theirs]
    assert list(inspect.signature(getattr(dist, name)).parameters.values()) == expected


@pytest.mark.parametrize("arguments", [{}, {"script": "x.py", "m": "x"}])
def test_ambiguous_target_is_refused(arguments):
    with pytest.raises(ComponentValidationException, match="SCRIPT"):
        dist.ddp(**arguments)


def test_option_is_not_taken_for_a_script():
    with pytest.raises(ComponentValidationException, match="SCRIPT"):
        dist.ddp("--config", "x.yaml")


def environment(scheduler: str, *line: str, component: str = "dist.ddp") -> dict[str, str]:
    """The variables that a request sets for its first node."""
    with get_runner("snapshot") as runner:
        request = runner.dryrun_component(component, [*line, "x.py"], scheduler, cfg=SCHEDULERS[scheduler]).request
    if scheduler == "local_cwd":
        return request.role_params["x"][0].env
    if scheduler == "slurm":
        return request.replicas["x-0"].env
    return {
        variable.name: variable.value
        for variable in request.resource["spec"]["tasks"][0]["template"].spec.containers[0].env
    }


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_threads_share_the_cpus_of_a_node(scheduler, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))

    def threads(*line):
        return environment(scheduler, *line)["OMP_NUM_THREADS"]

    assert threads("-j", "1x4") == ("3" if scheduler == "local_cwd" else "1")
    assert threads("-j", "1x64") == "1"
    assert threads("-j", "2x4", "--cpu", "32") == "8"
    assert threads("-j", "1x2", "-h", "gpu.medium") == "8"
    assert threads("-j", "1x4", "--env", "OMP_NUM_THREADS=7") == "7"
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    assert threads("-j", "2x4", "--cpu", "32") == ("64" if scheduler == "local_cwd" else "8")
    assert threads("-j", "1x4", "--env", "OMP_NUM_THREADS=7") == "7"


def test_nodes_meet_at_a_free_port_of_the_job(monkeypatch):
    monkeypatch.undo()
    for _ in range(20):
        port = dist.ddp("x.py", j="2x1").roles[0].port_map["c10d"]
        with socket.socket() as server:
            server.bind(("", port))
            monkeypatch.setattr(random, "sample", lambda *_, port=port: [port, port])
            with pytest.raises(ComponentValidationException, match="--rdzv_port"):
                dist.ddp("x.py", j="2x1")
        monkeypatch.undo()
        assert 20000 <= port < 30000
    role = dist.ddp("x.py", j="2x1", rdzv_port=29500).roles[0]
    assert ":29500 " in role.args[1] and role.port_map == {"c10d": 29500}


def test_two_jobs_hardly_meet_at_one_port(monkeypatch):
    monkeypatch.undo()
    assert len({dist.ddp("x.py", j="2x1").roles[0].port_map["c10d"] for _ in range(50)}) > 45


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (["-j", "two"], "Invalid format for -j"),
        (["-h", "no.such"], "no.such"),
        (["--mounts", "src=/data"], "type must be specified"),
        (["--mounts", "type=bind,from=/data"], "unknown mount option from"),
    ],
)
def test_what_torchx_refuses_is_a_message(line, told):
    with get_runner("snapshot") as runner, pytest.raises(ComponentValidationException, match=told):
        runner.dryrun_component("dist.ddp", [*line, "x.py"], "local_cwd")


HOSTILE = [
    "a=b c",
    "a='x'",
    'a="x"',
    "a=b=c",
    "a=[1, 2]",
    "a=$HOME",
    "a=$$",
    "a=$$$x",
    "a=`id`",
    "a=$(id)",
    "a=\\",
    "a=b\nc",
    "a=;#&|*?",
    "",
    "a=é",
]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_arguments_and_environment_arrive_as_they_are(scheduler, tmp_path):
    """Requests run as their schedulers would run them, but that torchrun tells what it was given."""
    witness = tmp_path / "torchrun"
    witness.write_text(f"#!{sys.executable}\n{WITNESS}")
    witness.chmod(0o755)
    variables = {
        "COMMAS": "a,b,c",
        "QUOTES": 'it\'s "so"',
        "SPACES": "a b",
        "DOLLARS": "$$ $HOME $(id)",
        "LINES": "a\nb",
    }
    with get_runner("snapshot") as runner:
        app = dist.ddp(*HOSTILE, m="x", env=variables)
        request = runner.dryrun(app, scheduler, cfg=SCHEDULERS[scheduler]).request
    env = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "77", "FILE": str(tmp_path / "told")}
    if scheduler == "local_cwd":
        (replica,) = request.role_params["x"]
        subprocess.run(replica.args, env={**replica.env, **env}, check=True)
    elif scheduler == "slurm":
        srun = tmp_path / "srun"
        srun.write_text(f"#!{sys.executable}\n{SRUN}")
        srun.chmod(0o755)
        subprocess.run(["bash", "-c", request.materialize()], env=env, check=True, capture_output=True)
    else:
        (task,) = sanitize_for_serialization(request.resource)["spec"]["tasks"]
        (container,) = task["template"]["spec"]["containers"]
        told = {variable["name"]: variable["value"] for variable in container["env"]}
        given = {name: kubernetes_expands(value, told) for name, value in told.items()}
        command = [kubernetes_expands(word, given) for word in container["command"]]
        subprocess.run(command, env={**given, **env}, check=True)
    arguments, environment = json.loads((tmp_path / "told").read_text())
    assert arguments[arguments.index("-m") + 2 :] == HOSTILE
    assert {name: environment.get(name) for name in variables} == variables


WITNESS = """
import json, os, sys
json.dump([sys.argv[1:], dict(os.environ)], open(os.environ["FILE"], "w"))
"""

# As srun reads its command line: variables end at commas.
SRUN = """
import os, sys
words = sys.argv[1:]
while words[0].startswith("--"):
    option, _, value = words.pop(0).partition("=")
    if option == "--export":
        os.environ.update(part.split("=", 1) for part in value.split(",") if "=" in part)
os.execvp(words[0], words)
"""


def kubernetes_expands(text: str, variables: dict[str, str]) -> str:
    """What Kubernetes makes of `$(NAME)` and `$$` in a container's command and environment."""
    return re.sub(
        r"\$(?:\$|\(([^)]*)\))",
        lambda found: "$" if found[1] is None else variables.get(found[1], found[0]),
        text,
    )


@pytest.mark.parametrize("name", ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "PET_MAX_RESTARTS"])
def test_the_callers_word_on_shutdown_and_restarts_counts(name, monkeypatch):
    def value(**arguments):
        return dist.ddp("x.py", max_retries=3, **arguments).roles[0].env[name]

    assert value() == {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300", "PET_MAX_RESTARTS": "3"}[name]
    monkeypatch.setenv(name, "7")
    assert value() == "7"
    assert value(env={name: "8"}) == "8"


def test_nothing_is_restarted_unless_asked_for():
    role = components.train().roles[0]
    assert "PET_MAX_RESTARTS" not in role.env and role.max_retries == 0


def test_launcher_and_rank_name_the_same_variable():
    assert lifetime.LAUNCHER_PID in dist.ddp("x.py").roles[0].env


def test_environment_of_the_caller_is_not_changed():
    env = {"A": "b"}
    dist.ddp("x.py", env=env)
    assert env == {"A": "b"}


def test_train_names_the_job_by_its_config():
    app = components.train("a=b", config="configs/movielens_1m.yaml")
    assert app.name == "movielens_1m"
    assert app.roles[0].name == "train"
    assert app.roles[0].args[1].endswith("-m recsys.train --config configs/movielens_1m.yaml a=b")
    assert components.train(name="trial/7").name == "7"


def test_images_are_those_that_the_docs_build():
    def image(**arguments):
        return components.train(**arguments).roles[0].image

    assert image() == "hilorec:cpu"
    assert image(gpu=2) == image(h="aws_p3.2xlarge") == "hilorec:cuda"
    assert image(gpu=2, image="mine:1") == "mine:1"


def test_stock_components_stay():
    ours = {"dist.ddp", "dist.spmd", "hilorec.train"}
    builtin = {"metrics.tensorboard", "serve.torchserve", *(f"utils.{n}" for n in ("echo", "python", "sh"))}
    assert ours | builtin <= set(get_components())


def test_every_argument_is_described():
    for component in ("dist.ddp", "dist.spmd", "hilorec.train"):
        function = get_components()[component].fn
        for name in inspect.signature(function).parameters:
            assert re.search(rf"^\s+{name}: \S", function.__doc__, re.MULTILINE), (component, name)


def test_launching_imports_no_torch():
    code = (
        "import sys, launch.components, launch.dist\n"
        "from torchx.runner import get_runner\n"
        "get_runner().dryrun_component('dist.ddp', ['x.py'], 'local_cwd')\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
