import inspect
import os
import re
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
from torchx.schedulers.slurm_scheduler import SlurmBatchRequest
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
        *("--env", "NCCL_DEBUG=WARN", "--max_retries", "3", "--rdzv_port", "29501"),
        *("--mounts", "type=bind,src=/data,dst=/data,readonly"),
        *("--image", "registry.example/hilorec:1", "stages.joint.learning_rate=1e-4", "note=two words"),
    ],
}


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("TORCH", "PET_")) or name == "LOGLEVEL"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")


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
    """What our components put into the environment, with `OMP_NUM_THREADS` as the fixture sets it."""
    started = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300", "HILOREC_LAUNCHER_PID": str(os.getpid())}
    return {"OMP_NUM_THREADS": "5", **started, **more}


def test_positional_script_is_the_stock_script():
    ours = dist.ddp("recsys/train.py", "--config", "x.yaml", "a=b", j="2x4", max_retries=1, debug=True)
    theirs = stock.ddp(
        *("--config", "x.yaml", "a=b"),
        script="recsys/train.py",
        j="2x4",
        env=ours_by_default(PET_MAX_RESTARTS="1"),
        max_retries=1,
        debug=True,
    )
    assert ours == theirs


def test_named_script_and_module_leave_positionals_alone():
    assert dist.ddp("a", script="x.py") == stock.ddp("a", script="x.py", env=ours_by_default())
    assert dist.ddp("a", m="x.y") == stock.ddp("a", m="x.y", env=ours_by_default())


def test_spmd_takes_processes_from_the_host():
    app = dist.spmd("recsys/train.py", "a=b", j="2", h="gpu.xlarge")
    assert app.roles[0].num_replicas == 2
    assert "--nproc_per_node 8" in app.roles[0].args[1]
    assert app.roles[0].args[1].endswith("recsys/train.py a=b")


@pytest.mark.parametrize("name", ["ddp", "spmd"])
def test_signature_is_the_stock_one(name):
    assert inspect.signature(getattr(dist, name)) == inspect.signature(getattr(stock, name))


@pytest.mark.parametrize("arguments", [{}, {"script": "x.py", "m": "x"}])
def test_ambiguous_target_is_refused(arguments):
    with pytest.raises(ComponentValidationException, match="SCRIPT"):
        dist.ddp(**arguments)


def test_option_is_not_taken_for_a_script():
    with pytest.raises(ComponentValidationException, match="SCRIPT"):
        dist.ddp("--config", "x.yaml")


def test_threads_share_the_cpus_of_a_node(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))

    def threads(**arguments):
        return dist.ddp("x.py", **arguments).roles[0].env["OMP_NUM_THREADS"]

    assert threads(j="1x4") == "3"
    assert threads(j="1x64") == "1"
    assert threads(j="2x4", cpu=32) == "8"
    assert threads(j="1x2", h="gpu.medium") == "8"
    assert threads(j="1x4", env={"OMP_NUM_THREADS": "7"}) == "7"


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
