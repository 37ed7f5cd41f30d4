import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    # What an outer make was told must not reach this one.
    env = {name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MFLAGS", "MAKELEVEL"}}
    for name in ("ARGS", "FLAVOUR", "NPROC", "PYTHON"):
        env.pop(name, None)
    return subprocess.run(["make", *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


def test_train_runs_the_documented_line():
    plan = make("--dry-run", "train", "FLAVOUR=cpu", "ARGS=--config configs/x.yaml a=b").stdout.splitlines()
    assert plan[-1] == "torchx run -s local_cwd dist.ddp -j 1x2 recsys/train.py --config configs/x.yaml a=b"
    assert make("--dry-run", "train", "NPROC=4").stdout.splitlines()[-1].split()[:7][-2:] == ["-j", "1x4"]


def test_train_takes_a_process_for_each_gpu(tmp_path):
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\necho 3\n")  # of torch, how many there are
    python.chmod(0o755)
    last = make("--dry-run", "train", "FLAVOUR=cuda", f"VENV={tmp_path}").stdout.splitlines()[-1]
    assert last.split()[:7][-2:] == ["-j", "1x3"]


def test_help_names_every_target():
    phony = next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith(".PHONY:"))
    shown = make("help").stdout
    assert all(f"make {target} " in shown for target in phony.split()[1:])


def test_unknown_flavour_is_refused():
    run = make("setup", "FLAVOUR=tpu")
    assert run.returncode != 0
    assert "cpu or cuda" in run.stderr


def test_unfit_interpreters_are_named(tmp_path):
    absent = make("setup", "--always-make", "PYTHON=no-such-python")
    assert absent.returncode != 0
    assert "no-such-python not found" in absent.stderr
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.9.2\nexit 1\n')
    old.chmod(0o755)
    unfit = make("setup", "--always-make", f"PYTHON={old}")
    assert unfit.returncode != 0
    assert "Python 3.9.2; HiloRec needs Python 3.11 to 3.14" in unfit.stderr
