import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()
STAGES = re.findall(r"^FROM (\S+) AS (\S+)", DOCKERFILE, re.MULTILINE)
COMPOSE = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
SERVICES = COMPOSE["services"]


def _default(value: str) -> str:
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value)


def test_every_stage_stands_on_an_earlier_one():
    known = {"${BASE}"}
    for base, name in STAGES:
        assert base in known
        known.add(name)
    copied_from = set(re.findall(r"--from=(\S+)", DOCKERFILE))
    assert copied_from <= known
    assert {"cpu", "cuda"} <= known


def test_images_do_not_run_as_root():
    for target in ("cpu", "cuda"):
        stage = re.search(rf"^FROM \S+ AS {target}\n(.*?)(?=^FROM|\Z)", DOCKERFILE, re.MULTILINE | re.DOTALL)
        assert re.search(r"^USER hilorec$", stage[1], re.MULTILINE)


def test_what_the_build_needs_is_there_and_not_ignored():
    admitted = set(re.findall(r"^!(\S+)", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    assert {
        "LICENSE",
        "README.md",
        "pyproject.toml",
        "configs",
        "launch",
        "recsys",
        "requirements",
    } <= admitted
    for path in {"pyproject.toml", "launch", "recsys", "requirements"} | set(
        re.findall(r"requirements/\w+\.txt", DOCKERFILE)
    ):
        assert (ROOT / path).exists()


@pytest.mark.parametrize("name", SERVICES)
def test_services_build_what_is_there(name):
    build = SERVICES[name]["build"]
    context = ROOT / "docker" / build["context"]
    assert context.resolve() == ROOT
    assert (context / build["dockerfile"]).is_file()
    target = _default(build["target"])
    assert target in {stage for _, stage in STAGES}
    assert _default(SERVICES[name]["image"]) == f"hilorec:{target}"
    for volume in SERVICES[name]["volumes"]:
        source = _default(volume).split(":")[0]
        assert source in COMPOSE["volumes"] or source.startswith("../")


def test_tensorboard_is_published_on_this_machine_only():
    assert SERVICES["tensorboard"]["ports"] == ["127.0.0.1:6006:6006"]
    assert not any("ports" in service for name, service in SERVICES.items() if name != "tensorboard")


def test_gpus_are_asked_for_by_the_gpu_profile_only():
    assert SERVICES["train-gpu"]["profiles"] == ["gpu"]
    assert "deploy" in SERVICES["train-gpu"]
    assert "deploy" not in SERVICES["train"]
