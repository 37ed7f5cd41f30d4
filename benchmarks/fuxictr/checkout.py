"""A checkout of FuxiCTR: whether it is one, and at which commit it is."""

import subprocess
from pathlib import Path

from recsys.errors import UserError


def check_checkout(checkout: Path) -> None:
    """Refuse a folder that is no clone of FuxiCTR.

    Raises:
        UserError: it lacks the package or the model zoo.
    """
    for path in (checkout / "fuxictr" / "version.py", checkout / "model_zoo"):
        if not path.exists():
            raise UserError(f"--checkout: no {path}; give a clone of FuxiCTR, which has the model zoo")


def checkout_commit(checkout: Path) -> str | None:
    """The checkout's commit, None outside git. Taken without git's optional locks, which would write there."""
    describe = ["describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    git = ["git", "--no-optional-locks", "-C", str(checkout), *describe]
    found = subprocess.run(git, capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else None
