import subprocess
import sys
from importlib import metadata

import pytest

from recsys import versions as module
from recsys.versions import SUPPORTED, VersionError, check_versions, git_commit, versions


@pytest.fixture
def installed(monkeypatch):
    packages = {}

    def version(name):
        if name not in packages:
            raise metadata.PackageNotFoundError(name)
        return packages[name]

    monkeypatch.setattr(module.metadata, "version", version)
    monkeypatch.setattr(module, "nvidia_driver", lambda: False)
    monkeypatch.setattr(module, "_has_nvml", lambda: True)
    return packages


def test_versions_names_what_is_installed(installed):
    installed |= {"torch": "2.13.0+cpu", "fbgemm-gpu-cpu": "1.8.0"}
    found = versions()
    assert found.pop("python") == ".".join(map(str, sys.version_info[:3]))
    assert found == {"torch": "2.13.0+cpu", "fbgemm-gpu-cpu": "1.8.0"}


@pytest.mark.parametrize("trio", SUPPORTED)
@pytest.mark.parametrize("wheel", ["fbgemm-gpu", "fbgemm-gpu-cpu"])
@pytest.mark.parametrize("suffix", ["", "+cpu", "+cu130"])
def test_supported_trios_pass(installed, trio, wheel, suffix):
    installed |= {
        "torch": trio.torch + suffix,
        "torchrec": trio.torchrec + suffix,
        wheel: trio.fbgemm + suffix,
    }
    check_versions()


@pytest.mark.parametrize("wheel", ["fbgemm-gpu", "fbgemm-gpu-cpu"])
def test_gpus_fbgemm_without_a_driver_is_told(installed, monkeypatch, wheel):
    """Else its import ends in a traceback that names a file of its own."""
    installed |= {"torch": "2.13.0+cu130", "torchrec": "1.8.0", wheel: "1.8.0"}
    monkeypatch.setattr(module, "_has_nvml", lambda: False)
    if wheel == "fbgemm-gpu-cpu":
        check_versions()
        return
    with pytest.raises(VersionError, match=r"libnvidia-ml\.so\.1 is not here.*--gpus all.*FLAVOUR=cpu"):
        check_versions()


def test_patch_releases_pass(installed):
    installed |= {"torch": "2.13.7", "torchrec": "1.8.2", "fbgemm-gpu-cpu": "1.8.1"}
    check_versions()


@pytest.mark.parametrize(
    ("have", "mend"),
    [
        (
            {"torch": "2.11.0+cpu", "torchrec": "1.8.0", "fbgemm-gpu-cpu": "1.8.0"},
            "pip install torch==2.11.0 && pip install --no-deps torchrec==1.6.1 fbgemm-gpu-cpu==1.6.0",
        ),
        (
            {"torch": "2.14.0", "torchrec": "1.8.0", "fbgemm-gpu-cpu": "1.8.0"},
            "pip install torch==2.14.1 && pip install --no-deps torchrec==1.9.2 fbgemm-gpu-cpu==1.9.0",
        ),
        (
            {"torch": "2.15.0", "torchrec": "1.8.0", "fbgemm-gpu": "1.8.0"},
            "pip install torch==2.13.0 && pip install --no-deps torchrec==1.8.0 fbgemm-gpu==1.8.0",
        ),
        # 2.1 is not 2.13, nor 1.80 1.8.
        (
            {"torch": "2.1.3", "torchrec": "1.80.0", "fbgemm-gpu-cpu": "1.8.0"},
            "pip install torch==2.13.0 && pip install --no-deps torchrec==1.8.0 fbgemm-gpu-cpu==1.8.0",
        ),
    ],
)
def test_mismatch_names_versions_and_remedy(installed, have, mend):
    installed |= have
    with pytest.raises(VersionError, match="do not match") as error:
        check_versions()
    assert str(error.value).splitlines()[1].strip() == mend
    for name, version in have.items():
        assert f"{name} {version}" in str(error.value)


def test_missing_fbgemm_is_named(installed):
    installed |= {"torch": "2.13.0", "torchrec": "1.8.0"}
    with pytest.raises(VersionError, match=r"fbgemm missing(.|\n)*fbgemm-gpu-cpu==1\.8\.0"):
        check_versions()


@pytest.mark.parametrize(("driver", "wheel"), [(True, "fbgemm-gpu==1.8.0"), (False, "fbgemm-gpu-cpu==1.8.0")])
def test_both_wheels_are_refused(installed, monkeypatch, driver, wheel):
    monkeypatch.setattr(module, "nvidia_driver", lambda: driver)
    installed |= {"torch": "2.13.0", "torchrec": "1.8.0", "fbgemm-gpu": "1.8.0", "fbgemm-gpu-cpu": "1.8.0"}
    with pytest.raises(VersionError) as error:
        check_versions()
    expected = f"pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu && pip install --no-deps {wheel}"
    assert str(error.value).splitlines()[1].strip() == expected


def test_this_environment_matches():
    check_versions()


def test_commit_is_that_of_the_checkout(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        run = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)
        return run.stdout.strip()

    source = tmp_path / "versions.py"
    source.write_text("a")
    monkeypatch.setattr(module, "__file__", str(source))
    monkeypatch.setenv("HILOREC_COMMIT", "")
    assert git_commit() is None
    git("init")
    assert git_commit() is None, "not tracked here"
    monkeypatch.setenv("HILOREC_COMMIT", "of the image")
    assert git_commit() == "of the image"
    git("add", ".")
    git("commit", "-m", "a")
    commit = git("rev-parse", "HEAD")
    assert git_commit() == commit
    source.write_text("b")
    assert git_commit() == f"{commit}-dirty"


def test_no_torch_is_imported():
    code = "import sys; from recsys import versions; versions.check_versions(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
