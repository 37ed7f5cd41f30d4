"""The image and compose files as far as they can be held without an engine; `make test-image` builds and runs them."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()
STAGES = {
    name: (base, body)
    for base, name, body in re.findall(r"^FROM (\S+) AS (\S+)\n(.*?)(?=^FROM|\Z)", DOCKERFILE, re.MULTILINE | re.DOTALL)
}
IMAGES = ("score", "cpu", "cuda")
COMPOSE = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
SERVICES = COMPOSE["services"]
ENTRYPOINT = ROOT / "docker/entrypoint.sh"

# Two ranks of a container meet, and tell where.
MEET = """
import os
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
ranks = torch.ones(1)
dist.all_reduce(ranks)
os.write(1, f"met {int(ranks)} at {os.environ['MASTER_ADDR']}\\n".encode())
"""


def _default(value: str) -> str:
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value)


def _lines(image: str) -> list[str]:
    """The instructions of an image, those of the stages that it stands on first."""
    lines: list[str] = []
    while image in STAGES:
        image, body = STAGES[image]
        lines = [*(line for line in body.splitlines() if line and not line.startswith("#")), *lines]
    return lines


def _of(image: str, instruction: str) -> list[str]:
    return [line.removeprefix(f"{instruction} ") for line in _lines(image) if line.startswith(f"{instruction} ")]


def test_every_stage_stands_on_an_earlier_one():
    known = {"${BASE}"}
    for name, (base, body) in STAGES.items():
        assert base in known
        assert set(re.findall(r"--from=(\S+)", body)) <= known
        known.add(name)
    assert known > set(IMAGES)


def test_bases_and_packages_are_pinned():
    assert re.search(r"^ARG BASE=python:\d+\.\d+\.\d+-slim-\w+$", DOCKERFILE, re.MULTILINE)
    assert all("-r " in line or line.endswith(" .") for line in re.findall(r"pip install .*", DOCKERFILE))


@pytest.mark.parametrize("image", IMAGES)
def test_images_run_as_a_numbered_user_and_hold_nothing_that_builds(image):
    assert _of(image, "USER") == ["1000:1000"]
    assert not [line for line in _of(image, "RUN") if "pip" in line or "apt" in line]
    assert not [line for line in _of(image, "COPY") if "requirements" in line]


@pytest.mark.parametrize("image", IMAGES)
def test_what_changes_most_often_comes_last(image):
    copies = _of(image, "COPY")
    assert copies[-2:] == [f"--from=build-{image} /venv /venv", "--from=project /project ."]
    assert _lines(image)[-1 if image != "score" else -3] == "ENV HILOREC_COMMIT=${COMMIT}"


def test_what_the_build_needs_is_there_and_not_ignored():
    admitted = re.findall(r"^!(\S+)", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    copied = [
        word
        for _, body in STAGES.values()
        for line in re.findall(r"^COPY (?!--from)(.*)", body, re.MULTILINE)
        for word in line.split()[:-1]
    ]
    assert len(copied) > 5
    for path in {*copied, *re.findall(r"requirements/\w+\.txt", DOCKERFILE)}:
        assert (ROOT / path).exists()
        assert any(Path(path).is_relative_to(allowed) for allowed in admitted), path


@pytest.mark.parametrize("name", SERVICES)
def test_services_build_what_is_there(name):
    build = SERVICES[name]["build"]
    context = ROOT / "docker" / build["context"]
    assert context.resolve() == ROOT
    assert (context / build["dockerfile"]).is_file()
    target = _default(build["target"])
    assert target in IMAGES
    assert all(re.search(rf"^ARG {argument}$", DOCKERFILE, re.MULTILINE) for argument in build["args"])
    assert _default(SERVICES[name]["image"]) == f"hilorec:{target}"
    for volume in SERVICES[name]["volumes"]:
        source, where = _default(volume).split(":")[:2]
        assert source in COMPOSE["volumes"], "a folder that is not there would be made, and be root's"
        assert where in json.loads(_of(target, "VOLUME")[0])


def test_configs_find_their_data_where_images_have_a_volume():
    small = yaml.safe_load((ROOT / "configs/small.yaml").read_text())
    assert Path("/app", small["data"]["synthetic"]["directory"]).is_relative_to("/app/data")
    assert any(volume.endswith(":/app/data") for volume in SERVICES["train"]["volumes"])
    (made,) = (line for line in _of("cpu", "RUN") if line.startswith("install -d"))
    assert made == "install -d -o 1000 -g 1000 data outputs", "embedded data must be writable by the image's user"


def test_tensorboard_is_published_on_this_machine_only_and_watched():
    assert SERVICES["tensorboard"]["ports"] == ["127.0.0.1:6006:6006"]
    assert SERVICES["tensorboard"]["healthcheck"]["test"][0] == "CMD"
    assert not any("ports" in service for name, service in SERVICES.items() if name != "tensorboard")


def test_gpus_are_asked_for_by_the_gpu_profile_only():
    assert SERVICES["train-gpu"]["profiles"] == ["gpu"]
    assert "deploy" in SERVICES["train-gpu"]
    assert "deploy" not in SERVICES["train"]


def _enter(*arguments: str, **env: str) -> list[str]:
    """What the entrypoint runs: each argument that a stand-in for commands was given, and the address for ranks."""
    run = subprocess.run(
        [ENTRYPOINT, *arguments], env={**os.environ, **env}, capture_output=True, text=True, check=True
    )
    return run.stdout.splitlines()


@pytest.fixture
def path(tmp_path):
    """A PATH on which torchrun and other only tell how they were called."""
    for name in ("torchrun", "other"):
        (tmp_path / name).write_text('#!/bin/sh\nprintf "%s\\n" "${0##*/}" "$@" "${PET_LOCAL_ADDR:-}"\n')
        (tmp_path / name).chmod(0o755)
    return f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"


def test_options_are_torchruns_and_anything_else_is_a_command(path):
    assert _enter("--standalone", "-m", "a b", PATH=path)[:4] == ["torchrun", "--standalone", "-m", "a b"]
    assert _enter(PATH=path)[0] == "torchrun"
    assert _of("cpu", "ENTRYPOINT") == _of("cuda", "ENTRYPOINT") == ['["/entrypoint.sh"]']
    for name in ("train", "train-gpu"):
        assert SERVICES[name]["entrypoint"][:2] == ["/entrypoint.sh", "--standalone"]
    # TorchX gives images a command of its own.
    assert _enter("other", "-c", "torchrun 'a b'", PATH=path)[:3] == ["other", "-c", "torchrun 'a b'"]


def test_ranks_meet_at_the_own_name_where_it_resolves_and_where_the_caller_says(path):
    assert _enter("other", PATH=path) == ["other", ""]
    assert _enter("other", PATH=path, PET_LOCAL_ADDR="192.0.2.1") == ["other", "192.0.2.1"]


def test_ranks_meet_where_the_own_name_does_not_resolve(tmp_path):
    nameless = ["unshare", "--map-root-user", "--uts", "sh", "-c", 'hostname no-such-host.invalid && exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*nameless, "true"], capture_output=True).returncode:
        pytest.skip("this machine does not let us have a host name of our own")
    (tmp_path / "meet.py").write_text(MEET)
    run = subprocess.run(
        [*nameless, ENTRYPOINT, "--standalone", "--nproc_per_node", "2", tmp_path / "meet.py"],
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.stdout.splitlines() == ["met 2 at 127.0.0.1"] * 2, run.stderr
