"""The installed versions and the project's commit, read without importing torch.

torch, torchrec and fbgemm only work as a matching trio, yet their wheels do not say so: torchrec names no
torch version at all. `check_versions` says it, before an import fails with a message that hides the cause.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import NamedTuple


class VersionError(RuntimeError):
    """The installed torch, torchrec and fbgemm do not belong together, or not on this machine.

    Args:
        problem: what was found.
        remedy: the way out.
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(f"{problem} {remedy}".rstrip())
        self.problem, self.remedy = problem, remedy


class Trio(NamedTuple):
    """Versions of torch, torchrec and fbgemm that work together."""

    torch: str
    torchrec: str
    fbgemm: str


SUPPORTED = (Trio("2.13.0", "1.8.0", "1.8.0"), Trio("2.14.1", "1.9.2", "1.9.0"), Trio("2.11.0", "1.6.1", "1.6.0"))
"""The first is what requirements/ pins."""

FBGEMM = ("fbgemm-gpu", "fbgemm-gpu-cpu")

_REPORTED = ("hilorec", "torch", "torchrec", *FBGEMM, "torchx", "pyarrow", "numpy", "pydantic", "tensorboard")


def versions() -> dict[str, str]:
    """The versions of Python and of those of the project's packages that are installed."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in _REPORTED:
        version = _version(name)
        if version is not None:
            found[name] = version
    return found


def check_versions() -> None:
    """Check that torch, torchrec and fbgemm are there, match, and find what they load.

    Raises:
        VersionError: with the versions found and the commands that mend them; or GPUs' fbgemm is where no driver is.
    """
    found = versions()
    fbgemm = [name for name in FBGEMM if name in found]
    listing = ", ".join(
        f"{name} {found.get(name, 'missing')}" for name in ("torch", "torchrec", *(fbgemm or ["fbgemm"]))
    )
    if len(fbgemm) == 2:
        trio = _nearest(found.get("torch"))
        wheel = _wheel_for_this_machine()
        raise VersionError(
            f"both fbgemm wheels are installed and overwrite each other's files: {listing}.",
            f"Mend it with:\n  pip uninstall -y {' '.join(FBGEMM)} && pip install --no-deps {wheel}=={trio.fbgemm}",
        )
    have = (found.get("torch"), found.get("torchrec"), found.get(fbgemm[0]) if fbgemm else None)
    if not any(all(map(_same_minor, have, trio)) for trio in SUPPORTED):
        trio = _nearest(found.get("torch"))
        wheel = fbgemm[0] if fbgemm else _wheel_for_this_machine()
        supported = "; ".join(f"torch {t.torch} with torchrec {t.torchrec} and fbgemm {t.fbgemm}" for t in SUPPORTED)
        raise VersionError(
            f"torch, torchrec and fbgemm do not match: {listing}. Supported: {supported}.",
            f"Mend it with:\n  pip install torch=={trio.torch} && "
            f"pip install --no-deps torchrec=={trio.torchrec} {wheel}=={trio.fbgemm}",
        )
    if fbgemm == ["fbgemm-gpu"] and not _has_nvml():
        raise VersionError(
            "fbgemm-gpu needs NVIDIA's driver, whose libnvidia-ml.so.1 is not here.",
            "Containers get it with NVIDIA's container toolkit by `docker run --gpus all`; without GPUs take "
            "hilorec:cpu, or packages by `make setup FLAVOUR=cpu`",
        )


def git_commit() -> str | None:
    """The commit of this code, with "-dirty" appended where files differ.

    Outside a checkout what `HILOREC_COMMIT` says, as images do (docker/Dockerfile), else None.
    """
    # A package installed inside some other project's checkout is not tracked there.
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return os.environ.get("HILOREC_COMMIT") or None
    return _git("describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")


def nvidia_driver() -> bool:
    """Whether an NVIDIA driver is loaded on this machine."""
    if Path("/proc/driver/nvidia/version").exists():
        return True
    return (
        shutil.which("nvidia-smi") is not None
        and subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0
    )


def _has_nvml() -> bool:
    """Whether the library is there that fbgemm's builds for GPUs are linked to; it comes with the driver alone."""
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False
    return True


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _same_minor(found: str | None, supported: str) -> bool:
    return found is not None and found.split("+")[0].split(".")[:2] == supported.split(".")[:2]


def _nearest(torch: str | None) -> Trio:
    """The trio of the torch that is there, so that the largest package can stay; else the newest."""
    return next((trio for trio in SUPPORTED if _same_minor(torch, trio.torch)), SUPPORTED[0])


def _wheel_for_this_machine() -> str:
    return "fbgemm-gpu" if nvidia_driver() else "fbgemm-gpu-cpu"


def _git(*arguments: str) -> str | None:
    try:
        run = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() if run.returncode == 0 else None
