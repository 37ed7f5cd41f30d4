import configparser
import importlib
import inspect
import io
import json
import os
import random
import re
import socket
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torchx
import yaml
from torchx.components import dist as stock
from torchx.runner import get_runner
from torchx.runner.config import load
from torchx.schedulers import ids
from torchx.schedulers.docker_scheduler import DockerJob
from torchx.schedulers.kubernetes_scheduler import KubernetesJob, sanitize_for_serialization
from torchx.schedulers.slurm_scheduler import SlurmBatchRequest, SlurmScheduler
from torchx.specs.file_linter import get_fn_docstring
from torchx.specs.finder import ComponentValidationException, get_components

from launch import components, dist, schedulers
from recsys import lifetime, runtime
from recsys.cli import ArgumentParser
from recsys.errors import UserError

SNAPSHOTS = Path(__file__).parent / "snapshots"
SCHEDULERS = {
    "local_cwd": {},
    "local_docker": {},
    "slurm": {"partition": "train"},
    "kubernetes": {"queue": "train"},
    "aws_batch": {"queue": "train", "user": "someone"},
}
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
        *("--interface", "ib0,ib1", "--output_dir", "/out/it's here"),
        *("--image", "registry.example/hilorec:1", "stages.joint.learning_rate=1e-4", "note=two words"),
    ],
    "hilorec.evaluate": [
        *("-j", "1x4", "--checkpoint", "outputs/small/checkpoints/step-471", "--split", "valid"),
        *("--by", "user_id,query", "--json", "True", "--predictions", "s3://bucket/a b", "data.valid=a b/*.parquet"),
    ],
    "hilorec.predict": [
        *("-j", "2:4x2", "--artifact", "/artifact", "--input", "a/*.parquet,b/*.parquet", "--output", "predictions"),
        *("--keep", "user_id", "--logit", "True"),
    ],
    "hilorec.export": [
        *("--checkpoint", "outputs/small/checkpoints/step-471", "--output", "art fact", "--tables", "int8"),
        *("--format", "torch-export,aoti", "--max_rows", "1000", "--bound", "0.01", "--max_retries", "2"),
        *("--env", "A=b,c,D=e=f"),
    ],
    "hilorec.tensorboard": ["--host", "0.0.0.0", "--mounts", "type=volume,src=outputs,dst=/app/outputs,readonly"],
}


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("TORCH", "PET_")) or name == "LOGLEVEL"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setattr(dist, "_free_port", lambda: 20500)
    monkeypatch.setattr(SlurmScheduler, "_partition_memmb", lambda *_: None)  # of a cluster that may be at hand


@pytest.mark.filterwarnings("ignore:\\s*Role \\w+ configured with restarts")
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
        if isinstance(request, KubernetesJob):
            tree = request.resource
        elif isinstance(request, DockerJob):
            tree = [vars(container) for container in request.containers]
        else:
            tree = asdict(request)
        text = yaml.safe_dump(sanitize_for_serialization(tree), width=sys.maxsize)
    text = re.sub(r"/[^'\" ]*/torchx_\w+", "<logs>", text)
    text = re.sub(r"(HILOREC_LAUNCHER_PID: ')\d+", r"\1<launcher>", text)
    text = text.replace(str(Path.cwd()), "<cwd>")
    text = text.replace(torchx.IMAGE, "<image>")
    return text.replace(torchx.__version__, "<version>").strip() + "\n"


def ours_by_default(**more: str) -> dict[str, str]:
    """What our components put into the environment of two processes with two CPUs."""
    started = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300"}
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


def first_node(scheduler: str, app) -> tuple[list[str], dict[str, str]]:
    """Command and variables of a request's first node, as whoever starts it would read them."""
    with get_runner("snapshot") as runner:
        request = runner.dryrun(app, scheduler, cfg=SCHEDULERS[scheduler]).request
    if scheduler == "local_cwd":
        replica = next(iter(request.role_params.values()))[0]
        return replica.args, replica.env
    if scheduler == "local_docker":
        return request.containers[0].command, request.containers[0].kwargs["environment"]
    if scheduler == "slurm":
        return ["bash", "-c", request.materialize()], {}
    if scheduler == "aws_batch":
        container = request.job_def["nodeProperties"]["nodeRangeProperties"][0]["container"]
        return container["command"], {pair["name"]: pair["value"] for pair in container["environment"]}
    task = sanitize_for_serialization(request.resource)["spec"]["tasks"][0]
    (container,) = task["template"]["spec"]["containers"]
    env: dict[str, str] = {}
    for variable in container["env"]:
        env[variable["name"]] = kubernetes_expands(variable["value"], env)
    return [kubernetes_expands(word, env) for word in container["command"]], env


def kubernetes_expands(text: str, variables: dict[str, str]) -> str:
    """What Kubernetes makes of `$(NAME)` and `$$` in a container's command and environment."""
    return re.sub(
        r"\$(?:\$|\(([^)]*)\))",
        lambda found: "$" if found[1] is None else variables.get(found[1], found[0]),
        text,
    )


WITNESS = """
import json, os, string, sys
words = sys.argv[1:]
if sys.argv[0].endswith("torchrun") or words[1] == "recsys.agent":
    words = [string.Template(word).safe_substitute(local_rank="0") for word in words]  # as torchrun does for a rank
json.dump([words, dict(os.environ)], open(os.environ["FILE"], "w"))
"""

# As srun reads its command line: variables end at commas.
SRUN = """
import os, sys
words = sys.argv[1:]
while words[0].startswith("--"):
    option, _, value = words.pop(0).partition("=")
    if option == "--export":
        os.environ.update(part.split("=", 1) for part in value.split(",") if "=" in part)
os.execvp(words[0], words[: words.index(":")] if ":" in words else words)
"""


def started(scheduler: str, app, folder: Path) -> tuple[list[str], dict[str, str]]:
    """Arguments and environment of the first node's torchrun or python, started as the scheduler would start it."""
    for name, code in {"torchrun": WITNESS, "python": WITNESS, "srun": SRUN}.items():
        (folder / name).write_text(f"#!{sys.executable}\n{code}")
        (folder / name).chmod(0o755)
    command, env = first_node(scheduler, app)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    here = {"PATH": path, "SLURM_JOB_ID": "77", "FILE": str(folder / "told")}
    subprocess.run(command, env={**env, **here}, check=True, capture_output=True)
    arguments, environment = json.loads((folder / "told").read_text())
    return arguments, environment


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_threads_share_the_cpus_of_a_node(scheduler, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    local = scheduler == "local_cwd"

    def threads(**arguments):
        return started(scheduler, dist.ddp("x.py", **arguments), tmp_path)[1]["OMP_NUM_THREADS"]

    assert threads(j="1x4") == ("3" if local else "1")
    assert threads(j="2x4", cpu=32) == "8"
    assert threads(j="1x2", h="gpu.medium") == "8"
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    assert threads(j="2x4", cpu=32) == ("64" if local else "8")
    assert threads(j="1x4", env={"OMP_NUM_THREADS": "7"}) == "7"


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
        (["-j", "0x2"], "-j 0x2: a job has a node and a process at least"),
        (["-j", "2x0"], "-j 2x0: a job has a node and a process at least"),
        (["-j", "4:2x1"], "-j 4:2x1: .* no more nodes at least than at most"),
        (["--gpu", "-1"], "--gpu -1: give at least 0"),
        (["--rdzv_port", "99999", "-j", "2x1"], "--rdzv_port 99999: give at most 65535"),
        (["-h", "no.such"], "no.such"),
        (["--mounts", "src=/data"], "type must be specified"),
        (["--mounts", "type=bind,from=/data"], "unknown mount option from"),
        (["--mounts", "type=bind,src=/data"], "--mounts: a mount has no dst"),
    ],
)
def test_what_torchx_refuses_is_a_message(line, told):
    with get_runner("snapshot") as runner, pytest.raises(ComponentValidationException, match=told):
        runner.dryrun_component("dist.ddp", [*line, "x.py"], "local_cwd")


HOSTILE = [
    *("a=b c", "a='x'", 'a="x"', "a=b=c", "a=[1, 2]", "a=$HOME", "a=$$", "a=$$$x", "a=$(HOME)", "a=$$(A)", "a=${x"),
    *("a=`id`", "a=$(id)", "a=\\", "a=b\nc", "a=;#&|*?", "a=", "a=é", "a=:"),
]
VARIABLES = {
    "COMMAS": "a,b,c",
    "QUOTES": 'it\'s "so"',
    "SPACES": " a b",
    "DOLLARS": "$$ $HOME $(COMMAS) $$$(COMMAS)",
    "LINES": "a\nb",
    "EQUAL": "a=b==",
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_arguments_and_environment_arrive_as_they_are(scheduler, tmp_path):
    arguments, environment = started(scheduler, dist.ddp(*HOSTILE, "", m="x", env=VARIABLES), tmp_path)
    assert arguments[arguments.index("-m") + 2 :] == [*HOSTILE, ""]
    assert {name: environment.get(name) for name in VARIABLES} == VARIABLES


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_arguments_of_components_arrive_as_they_are(scheduler, tmp_path):
    env = ",".join(f"{name}={value}" for name, value in VARIABLES.items())
    odd = "it's; $HOME/a b"
    arguments, environment = started(scheduler, components.train(*HOSTILE, output_dir=odd, env=env), tmp_path)
    assert arguments[:2] == ["-m", "recsys.agent"]
    assert arguments[arguments.index("recsys.train") - 1 :] == [
        *("-m", "recsys.train", "--config", "configs/default.yaml"),
        *(f"output_dir={odd}", *HOSTILE),
    ]
    assert {name: environment.get(name) for name in VARIABLES} == VARIABLES
    arguments, environment = started(scheduler, components.export(checkpoint=odd, output="$$", env=env), tmp_path)
    assert arguments == ["-m", "recsys.export", "--checkpoint", odd, "--output", "$$"]
    assert {name: environment.get(name) for name in VARIABLES} == VARIABLES


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_macros_of_torchx_stay(scheduler, tmp_path):
    arguments, _ = started(scheduler, components.train("output_dir=out/${app_id}/${local_rank}"), tmp_path)
    assert re.fullmatch("output_dir=out/(77|default-[a-z0-9]+)/0", arguments[-1])


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


def test_launcher_and_rank_name_the_same_variables():
    assert lifetime.LAUNCHER_PID in dist.ddp("x.py").roles[0].on_this_machine
    assert runtime.ASKED_GPUS in dist.ddp("x.py", gpu=1).roles[0].env
    assert runtime.ASKED_GPUS not in dist.ddp("x.py").roles[0].env
    assert UserError.exit_code == schedulers.USER_ERROR


def test_environment_of_the_caller_is_not_changed():
    env = {"A": "b"}
    dist.ddp("x.py", env=env)
    assert env == {"A": "b"}


def test_train_names_the_job_by_its_config():
    app = components.train("a=b", config="configs/movielens_1m.yaml")
    assert app.name == "movielens_1m"
    assert app.roles[0].name == "train"
    assert app.roles[0].args[1].endswith("-m recsys.train --config configs/movielens_1m.yaml a=b")
    assert components.train(name="trial/run-7").name == "run-7"


def test_images_are_those_that_the_docs_build():
    def image(**arguments):
        return components.train(**arguments).roles[0].image

    assert image() == "hilorec:cpu"
    assert image(gpu=2) == image(h="aws_p3.2xlarge") == "hilorec:cuda"
    assert image(gpu=2, image="mine:1") == "mine:1"


OURS = [f"hilorec.{name}" for name in ("evaluate", "export", "predict", "tensorboard", "train")]


def test_stock_components_stay():
    ours = {"dist.ddp", "dist.spmd", *OURS}
    builtin = {"metrics.tensorboard", "serve.torchserve", *(f"utils.{n}" for n in ("echo", "python", "sh"))}
    assert ours | builtin <= set(get_components())
    assert {name for name in get_components() if name.startswith(("dist.", "hilorec."))} == ours


@pytest.mark.parametrize("component", ["dist.ddp", "dist.spmd", *OURS])
def test_every_argument_is_described(component):
    function = get_components()[component].fn
    _, described = get_fn_docstring(function)
    assert all(described[name].strip() for name in inspect.signature(function).parameters)


@pytest.mark.parametrize("name", ["evaluate", "predict", "export"])
def test_components_have_the_options_of_their_commands(name, monkeypatch):
    seen = []
    monkeypatch.setattr(ArgumentParser, "parse_args", lambda self: seen.append(self) or sys.exit())
    with pytest.raises(SystemExit):
        importlib.import_module(f"recsys.{name}").main()
    theirs = {action.dest for action in seen[0]._actions if action.dest != "help"}
    where = {field.name for field in fields(components.Hosts)}
    assert set(inspect.signature(getattr(components, name)).parameters) - where == theirs


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (["train", "a=b", "--gpu", "8"], "'--gpu' among the overrides"),
        (["train", "a=b", "c"], "'c' among the overrides"),
        (["train", "--name", "a/b/c"], "--name a/b/c: give"),
        (["train", "--name", "no spaces"], "--name no spaces: give"),
        (["train", "--name", "1st"], "--name 1st: give"),
        (["train", "--env", "FOO"], "--env FOO: give variables"),
        (["train", "-h", "no.such"], "no.such"),
        (["train", "-j", "0x2"], "-j 0x2: a job has a node and a process at least"),
        (["train", "--max_retries", "-1"], "--max_retries -1: give at least 0"),
        (["export", "--checkpoint", "a", "--output", "b", "--cpu", "0"], "--cpu 0: give at least 1"),
        (["tensorboard", "--port", "99999"], "--port 99999: give at most 65535"),
        (["predict", "--input", "a", "--output", "b"], "one of --artifact and --checkpoint"),
        (["predict", "--input", "a", "--output", "b", "--artifact", "c", "--gpu", "1"], "neither overrides nor gpus"),
        (["predict", "--input", "a", "--output", "b", "--artifact", "c", "d=e"], "neither overrides nor gpus"),
        (["tensorboard", "--mounts", "type=x"], "invalid mount type"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_a_message(line, told):
    component, *rest = line
    with get_runner("snapshot") as runner, pytest.raises(ComponentValidationException, match=re.escape(told)):
        runner.dryrun_component(f"hilorec.{component}", rest, "local_cwd")


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ("configs/my model (2).yaml", "my-model-2"),
        ("100k.yaml", "run-100k"),
        (f"{'x' * 40}.yaml", "x" * 32),
        ("é.yaml", "run"),
        ("a.b.yaml", "a-b"),
    ],
)
def test_any_configs_name_makes_one_of_a_job(config, name):
    assert components.train(config=config).name == name


def test_an_interface_is_that_of_nccl_and_gloo():
    env = components.train(interface="ib0,ib1").roles[0].env
    assert (env["NCCL_SOCKET_IFNAME"], env["GLOO_SOCKET_IFNAME"]) == ("=ib0,ib1", "ib0,ib1")
    env = components.train(interface="ib0", env="NCCL_SOCKET_IFNAME=ib").roles[0].env
    assert (env["NCCL_SOCKET_IFNAME"], env["GLOO_SOCKET_IFNAME"]) == ("ib", "ib0")


def test_tensorboard_is_this_machines_own_unless_told_otherwise():
    assert "--host 127.0.0.1 " in " ".join(components.tensorboard().roles[0].args)
    assert "--host 0.0.0.0 " in " ".join(components.tensorboard(host="0.0.0.0").roles[0].args)


@pytest.mark.parametrize(("visible", "expected"), [(None, ["0,1", "2,3"]), ("4,5,6", ["4,5", "6"])])
def test_nodes_on_this_machine_share_its_gpus(visible, expected, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    def given(**arguments):
        with get_runner("snapshot") as runner:
            request = runner.dryrun(components.train(gpu=2, **arguments), "local_cwd").request
        return [replica.env.get("CUDA_VISIBLE_DEVICES") for replica in request.role_params["train"]]

    assert given(j="2x2") == expected
    assert given(j="1x2") == [None]
    assert given(j="2x2", env="CUDA_VISIBLE_DEVICES=7") == ["7", "7"]


def test_the_first_of_docker_names_is_a_letter_or_digit(monkeypatch):
    monkeypatch.setattr(ids, "random_id", lambda: "x" * 14)
    with get_runner("snapshot") as runner:
        app = components.train(name="abcd_23456789012345", j="2x1")
        request = runner.dryrun(app, "local_docker").request
    names = [container.kwargs["name"] for container in request.containers]
    assert names == [f"23456789012345-{'x' * 14}-train-{number}" for number in range(2)]
    assert {container.kwargs["environment"]["TORCHX_RANK0_HOST"] for container in request.containers} == {names[0]}


def test_aws_batch_starts_a_job_ten_times_at_most():
    with get_runner("snapshot") as runner, pytest.raises(ComponentValidationException, match="10 times"):
        runner.dryrun(components.train(max_retries=10), "aws_batch", cfg=SCHEDULERS["aws_batch"])


@pytest.mark.parametrize("code", [0, 1, 2])
def test_slurm_requeues_but_what_a_person_has_to_put_right(code, tmp_path):
    with get_runner("snapshot") as runner:
        app = components.export(checkpoint="x", output="y", max_retries=1)
        script = runner.dryrun(app, "slurm", cfg=SCHEDULERS["slurm"]).request.materialize()
    for name, line in {"srun": f"exit {code}", "scontrol": f'echo "$@" > {tmp_path}/told'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True)
    assert done.returncode == code
    assert (tmp_path / "told").exists() == (code == 1)


def test_defaults_of_the_project_are_what_torchx_knows(monkeypatch):
    """torchx passes over what it does not know without a word."""
    text = (Path(__file__).parents[2] / ".torchxconfig").read_text()
    parser = configparser.ConfigParser()
    parser.read_string(text)
    monkeypatch.delenv("TORCHXCONFIG", raising=False)
    with get_runner("snapshot") as runner:
        for section in parser.sections():
            if section.startswith("cli:"):
                continue
            found: dict[str, str] = {}
            load(section, io.StringIO(text), found)
            assert found == dict(parser[section])
            assert set(found) <= {name for name, _ in runner.scheduler_run_opts(section)}


def test_torchx_takes_the_projects_defaults_by_itself(tmp_path):
    """No queue is given, and no workspace: torchx would ask a docker daemon for an image of all that lies here."""
    env = {**os.environ, "HOME": str(tmp_path), "DOCKER_HOST": "tcp://127.0.0.1:1"}
    command = [sys.executable, "-m", "torchx.cli.main", "run", "-s", "kubernetes", "--dryrun", "hilorec.train"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "\n  queue: default\n" in done.stdout and "image: hilorec:cpu\n" in done.stdout


def test_launching_imports_no_torch():
    code = (
        "import sys, launch.components, launch.dist\n"
        "from torchx.runner import get_runner\n"
        "get_runner().dryrun_component('dist.ddp', ['x.py'], 'local_cwd')\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
