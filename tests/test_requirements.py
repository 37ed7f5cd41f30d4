import contextlib
import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from recsys.versions import SUPPORTED

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(flavour: str) -> dict[str, str]:
    """The pins that hold for this interpreter."""
    lines = (ROOT / f"requirements/{flavour}.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if not line.lstrip().startswith("#")]
    return {
        canonicalize_name(requirement.name): str(requirement.specifier)
        for requirement in found
        if requirement.marker is None or requirement.marker.evaluate()
    }


@pytest.mark.parametrize("flavour", ["cpu", "cuda", "dev", "serving"])
def test_everything_is_pinned_and_nothing_names_a_host(flavour):
    assert all(re.fullmatch(r"==[\w.+]+", version) for version in pins(flavour).values())
    assert "://" not in (ROOT / f"requirements/{flavour}.txt").read_text()


@pytest.mark.parametrize("flavour", ["cpu", "cuda"])
def test_pins_satisfy_the_project(flavour):
    found = pins(flavour)
    wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]
    for requirement in map(Requirement, wanted):
        if requirement.name != "hilorec":
            assert requirement.specifier.contains(found[canonicalize_name(requirement.name)].lstrip("="))


@pytest.mark.parametrize(("flavour", "wheel"), [("cpu", "fbgemm-gpu-cpu"), ("cuda", "fbgemm-gpu")])
def test_pins_hold_one_supported_trio(flavour, wheel):
    found = pins(flavour)
    assert {name for name in found if name.startswith("fbgemm")} == {wheel}
    assert (found["torch"], found["torchrec"], found[wheel]) == tuple(f"=={version}" for version in SUPPORTED[0])


def test_cpu_pins_hold_nothing_of_cuda():
    assert not [name for name in pins("cpu") if re.match("nvidia|cuda|triton", name)]


def test_flavours_differ_only_in_cuda():
    cpu, cuda = pins("cpu"), pins("cuda")
    cpu.pop("fbgemm-gpu-cpu")
    assert cpu.items() <= cuda.items()


@pytest.mark.parametrize("flavour", ["cpu", "cuda"])
def test_images_leave_out_what_development_alone_needs(flavour):
    """Images take the lines of the flavour that are none of dev.txt's."""

    def lines(name):
        return [it for it in (ROOT / f"requirements/{name}.txt").read_text().splitlines() if not it.startswith("#")]

    assert set(lines("dev")) <= set(lines(flavour))
    kept = pins(flavour).keys() - pins("dev").keys()
    assert kept >= {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    assert kept >= pins("serving").keys()
    development = {Requirement(line).name for line in PROJECT["optional-dependencies"]["dev"]}
    assert {canonicalize_name(name) for name in development} & kept == {"setuptools"}, "torch needs it as well"
    for name in kept:
        with contextlib.suppress(metadata.PackageNotFoundError):  # of the other flavour
            for requirement in map(Requirement, metadata.requires(name) or []):
                if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                    assert canonicalize_name(requirement.name) not in pins("dev"), f"{name} needs {requirement.name}"


def test_serving_pins_are_some_of_the_others():
    found = pins("serving")
    assert found.items() <= pins("cpu").items()
    assert not [name for name in found if re.match("torchrec|torchx|fbgemm|tensorboard", name)]
    wanted = [line for line in (ROOT / "requirements/serving.in").read_text().splitlines() if not line.startswith("#")]
    assert set(wanted) <= set(PROJECT["dependencies"])


@pytest.mark.parametrize("flavour", ["cpu", "serving"])
def test_pins_are_complete(flavour):
    found = pins(flavour)
    left_out = {
        canonicalize_name(line)
        for line in (ROOT / "requirements/cpu.exclude").read_text().splitlines()
        if not line.startswith("#")
    }
    for name in found:
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # an environment of the other flavour
        for requirement in map(Requirement, requirements):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                needed = canonicalize_name(requirement.name)
                assert needed in found or needed in left_out, f"{name} needs {needed}"
